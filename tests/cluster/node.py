"""The cluster's one node: process 1 of its own namespaces of processes, mounts and network. Started by `cluster.py`.

Its end takes every process, container, mount and address of the cluster along, whatever it died of. All logs are in
STATE/log. The parts are those of a normal cluster: RBAC, node authorisation, pod security and quotas are on.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pki import Authority
from settings import (
    API_IP,
    BIN,
    CGROUP,
    DNS_IP,
    KUBECONFIG,
    NODE,
    NODE_IP,
    POD_CIDR,
    SERVICE_CIDR,
    SOCKET,
    STATE,
)

PKI, LOG, KUBELET = STATE / "pki", STATE / "log", STATE / "kubelet"
CONTAINERD = f"""version = 2
root = "{STATE}/containerd"
state = "/run/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/maskrcnn-cluster/pause:1"
  restrict_oom_score_adj = true # this machine may forbid lower scores than its own
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{STATE}/cni"
"""
CNI = f"""{{
  "cniVersion": "1.0.0",
  "name": "bridge",
  "plugins": [
    {{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
      "ipam": {{"type": "host-local", "dataDir": "{STATE}/ipam", "ranges": [[{{"subnet": "{POD_CIDR}"}}]],
               "routes": [{{"dst": "0.0.0.0/0"}}]}}}},
    {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
  ]
}}
"""
KUBELET_CONFIG = f"""apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /{CGROUP}
clusterDNS: [{DNS_IP}]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://{SOCKET}
enforceNodeAllocatable: [pods]
evictionHard:
  memory.available: 100Mi
  nodefs.available: 500Mi
  imagefs.available: 500Mi
evictionPressureTransitionPeriod: 10s
imageGCHighThresholdPercent: 100
failSwapOn: false
resolvConf: {STATE}/resolv.conf
authentication:
  x509:
    clientCAFile: {PKI}/ca.crt
"""


def main() -> None:
    """Set up the namespaces, start all parts in order, and start again what ends."""
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"
    _mounts()
    _network()
    _files()
    parts = {}
    for name, command, is_ready in _parts():
        parts[name] = _start(name, command)
        _wait(name, parts[name], is_ready)
    (STATE / "started").touch()
    while True:
        pid, status = os.wait()  # also reaps what containers leave
        for name, command, _ in _parts():
            if parts[name].pid == pid:
                print(f"{name} ended with status {os.waitstatus_to_exitcode(status)} and starts again", flush=True)
                time.sleep(1)
                parts[name] = _start(name, command)


def _mounts() -> None:
    """Private mounts: /run, /var/log and the kubelet's folder are the node's own."""
    _run("mount", "--make-rprivate", "/")
    for source, target in ((STATE / "run", "/run"), (LOG, "/var/log"), (KUBELET, str(KUBELET))):
        source.mkdir(parents=True, exist_ok=True)
        _run("mount", "--bind", str(source), target)
    _run("mount", "--make-rshared", str(KUBELET))
    Path("/run/maskrcnn-volumes").mkdir()
    for controller in Path("/sys/fs/cgroup").iterdir():
        if controller.name == "unified":
            continue
        group = controller / CGROUP
        group.mkdir(exist_ok=True)
        if controller.name == "cpuset":
            for kind in ("cpuset.cpus", "cpuset.mems"):
                (group / kind).write_text((controller / kind).read_text())


def _network() -> None:
    _run("ip", "link", "set", "lo", "up")
    while "default" not in _out("ip", "route"):  # cluster.py plugs in the wire
        time.sleep(0.1)
    for path in ("ipv4/ip_forward", "ipv4/conf/all/route_localnet", "bridge/bridge-nf-call-iptables"):
        Path("/proc/sys/net", path).write_text("1")


def _files() -> None:
    authority = Authority(PKI)
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    authority.issue("apiserver", "kube-apiserver", "system:masters", [*names, API_IP, NODE_IP, "127.0.0.1"])
    authority.signing_key("accounts.key")
    server = f"https://{NODE_IP}:6443"
    for user, group in (
        ("system:kube-controller-manager", ""),
        ("system:kube-scheduler", ""),
        ("system:kube-proxy", ""),
        (f"system:node:{NODE}", "system:nodes"),
        ("kube-router", "system:masters"),
    ):
        authority.kubeconfig(PKI / f"{user.split(':')[1] if ':' in user else user}.conf", server, user, group)
    authority.kubeconfig(KUBECONFIG, server, "admin", "system:masters")
    for path, text in (
        (STATE / "containerd.toml", CONTAINERD),
        (STATE / "cni" / "10-bridge.conflist", CNI),
        (STATE / "kubelet.yaml", KUBELET_CONFIG),
        (STATE / "resolv.conf", f"nameserver {NODE_IP}\n"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _parts() -> list[tuple[str, list[str], Callable[[], bool]]]:
    """Name, command and sign of readiness of each part, in order of their starts."""
    conf = {path.stem: f"--kubeconfig={path}" for path in PKI.glob("*.conf")}
    return [
        ("containerd", ["containerd", f"--config={STATE}/containerd.toml"], Path(SOCKET).exists),
        ("etcd", _etcd(), lambda: _answers("http://127.0.0.1:2379/readyz")),
        ("kube-apiserver", _apiserver(), lambda: _succeeds("kubectl", "get", "--raw=/readyz")),
        ("kube-controller-manager", _controller_manager(conf["kube-controller-manager"]), lambda: True),
        ("kube-scheduler", ["kube-scheduler", conf["kube-scheduler"], "--bind-address=127.0.0.1"], lambda: True),
        (
            "kubelet",
            ["kubelet", conf["node"], f"--config={STATE}/kubelet.yaml", f"--root-dir={KUBELET}", *_names()],
            lambda: _succeeds("kubectl", "get", f"node/{NODE}"),
        ),
        ("kube-proxy", _kube_proxy(conf["kube-proxy"]), lambda: True),
        ("kube-router", _kube_router(conf["kube-router"]), lambda: True),
    ]


def _names() -> list[str]:
    return [f"--hostname-override={NODE}", f"--node-ip={NODE_IP}"]


def _etcd() -> list[str]:
    url = "http://127.0.0.1:2379"
    return [
        "etcd",
        f"--data-dir={STATE}/etcd",
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",  # the data are thrown away with the cluster
    ]


def _kube_proxy(kubeconfig: str) -> list[str]:
    return [
        "kube-proxy",
        kubeconfig,
        f"--hostname-override={NODE}",
        f"--cluster-cidr={POD_CIDR}",
        "--metrics-bind-address=127.0.0.1:10249",
        # The limits of connection tracking are the machine's, not the node's.
        "--conntrack-max-per-core=0",
        "--conntrack-min=0",
        "--conntrack-tcp-timeout-established=0s",
        "--conntrack-tcp-timeout-close-wait=0s",
    ]


def _kube_router(kubeconfig: str) -> list[str]:
    """Enforces NetworkPolicies, and does nothing else."""
    return [
        "kube-router",
        kubeconfig,
        f"--hostname-override={NODE}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        "--run-firewall=true",
        "--run-router=false",
        "--run-service-proxy=false",
        "--run-loadbalancer=false",
        "--health-port=0",
    ]


def _apiserver() -> list[str]:
    own = [f"--tls-cert-file={PKI}/apiserver.crt", f"--tls-private-key-file={PKI}/apiserver.key"]
    kubelet = [f"--kubelet-client-certificate={PKI}/apiserver.crt", f"--kubelet-client-key={PKI}/apiserver.key"]
    accounts = [
        f"--service-account-key-file={PKI}/accounts.key",
        f"--service-account-signing-key-file={PKI}/accounts.key",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
    ]
    return [
        "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={NODE_IP}",
        f"--service-cluster-ip-range={SERVICE_CIDR}",
        f"--client-ca-file={PKI}/ca.crt",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",  # beside those that are on by default
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",  # nothing here knows the node's name
        *own,
        *kubelet,
        *accounts,
    ]


def _controller_manager(kubeconfig: str) -> list[str]:
    return [
        "kube-controller-manager",
        kubeconfig,
        "--bind-address=127.0.0.1",
        "--use-service-account-credentials=true",
        f"--service-account-private-key-file={PKI}/accounts.key",
        f"--root-ca-file={PKI}/ca.crt",
        "--allocate-node-cidrs=true",  # kube-router reads the node's range
        f"--cluster-cidr={POD_CIDR}",
        "--node-cidr-mask-size=16",
    ]


def _start(name: str, command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"KUBECONFIG": str(KUBECONFIG)}
    with (LOG / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _wait(name: str, part: subprocess.Popen[bytes], is_ready: Callable[[], bool], *, seconds: float = 120) -> None:
    began_s = time.monotonic()
    while not is_ready():
        if part.poll() is not None:
            sys.exit(f"{name} ended with status {part.returncode}; see {LOG}/{name}.log")
        if time.monotonic() - began_s > seconds:
            sys.exit(f"{name} was not ready within {seconds:.0f} s; see {LOG}/{name}.log")
        time.sleep(0.2)
    print(f"{name} is ready after {time.monotonic() - began_s:.1f} s", flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _succeeds(*command: str) -> bool:
    environment = os.environ | {"KUBECONFIG": str(KUBECONFIG)}
    return subprocess.run(command, capture_output=True, env=environment).returncode == 0


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _out(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
