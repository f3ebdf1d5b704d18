"""The NetworkPolicies of k8s/base, enforced: what must be reached is reached, and nothing else.

Each pod has the labels of a part of the system, and answers on the ports that the policies name.
"""

import http.server
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
Kubectl = Any  # of conftest.py
SHELL = "localhost/maskrcnn-cluster/busybox:1"
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
LABELS = {
    "trainer": {NAME: "maskrcnn", COMPONENT: "trainer"},
    "other-trainer": {NAME: "maskrcnn", COMPONENT: "trainer"},
    "launcher": {NAME: "maskrcnn", COMPONENT: "launcher"},
    "download": {NAME: "maskrcnn", COMPONENT: "download"},
    "step": {NAME: "maskrcnn", COMPONENT: "launcher", "pipelines.kubeflow.org/v2_component": "true"},
    "mlflow": {NAME: "mlflow"},
    "postgres": {NAME: "postgres"},
    "store": {NAME: "store"},
    "stranger": {NAME: "stranger"},
}
PORTS = (5000, 5432, 8333, 29500, 41234)


def pod(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """A pod that answers on all PORTS, as restricted as those of jobs."""
    servers = "; ".join(f"busybox httpd -p {port} -h /tmp" for port in PORTS)
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    container = {
        **{"name": "shell", "image": SHELL, "imagePullPolicy": "Never", "securityContext": security},
        "command": ["sh", "-c", f"{servers}; sleep 3600"],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        "resources": {"requests": {"cpu": "1m", "memory": "4Mi"}},
    }
    return {
        **{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}},
        "spec": {
            **{"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0, "containers": [container]},
            "securityContext": {
                **{"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            },
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


@pytest.fixture(scope="module")
def parts(applied: Callable[..., Kubectl], cluster: Kubectl) -> Iterator[tuple[Kubectl, Kubectl]]:
    """The namespace of k8s/base with a pod of each part, and one without policies, where a pod has every label."""
    kubectl = applied("base", without=["Deployment", "StatefulSet", "PersistentVolumeClaim"])
    outside = type(cluster)(cluster.kubeconfig, f"{kubectl.namespace}-outside")
    outside("create", "namespace", outside.namespace)
    try:
        kubectl.apply(*[pod(name, labels) for name, labels in LABELS.items()])
        outside.apply(pod("outside", LABELS["trainer"]))
        for namespace in (kubectl, outside):
            namespace("wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
        yield kubectl, outside
    finally:
        outside("delete", "namespace", outside.namespace, "--wait=false")


def address(kubectl: Kubectl, name: str) -> str:
    return kubectl("get", "pod", name, "-o", "jsonpath={.status.podIP}")


def reaches(kubectl: Kubectl, source: str, target: str, port: int) -> bool:
    """Whether a connection from a pod is taken within 2 seconds."""
    done = subprocess.run(
        [
            *("kubectl", f"--kubeconfig={kubectl.kubeconfig}", f"--namespace={kubectl.namespace}", "exec", source),
            *("--", "busybox", "timeout", "2", "busybox", "nc", target, str(port), "-e", "busybox", "true"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode == 0


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("trainer", "other-trainer", 29500, True),
        ("trainer", "other-trainer", 41234, True),
        ("trainer", "mlflow", 5000, True),
        ("trainer", "store", 8333, True),
        ("launcher", "mlflow", 5000, True),
        ("download", "mlflow", 5000, True),
        ("step", "mlflow", 5000, True),
        ("mlflow", "postgres", 5432, True),
        ("mlflow", "store", 8333, True),
        ("trainer", "postgres", 5432, False),
        ("trainer", "mlflow", 41234, False),
        ("trainer", "launcher", 29500, False),
        ("trainer", "stranger", 5000, False),
        ("launcher", "trainer", 29500, False),
        ("launcher", "postgres", 5432, False),
        ("mlflow", "trainer", 29500, False),
        ("postgres", "mlflow", 5000, False),
        ("store", "postgres", 5432, False),
        ("stranger", "mlflow", 5000, False),
        ("stranger", "store", 8333, False),
        ("stranger", "trainer", 29500, False),
    ],
)
def test_pods_of_the_namespace_reach_what_they_use(
    parts: tuple[Kubectl, Kubectl], source: str, target: str, port: int, allowed: bool
):
    kubectl, _ = parts
    assert reaches(kubectl, source, address(kubectl, target), port) is allowed


@pytest.mark.parametrize(
    ("target", "port"), [("mlflow", 5000), ("postgres", 5432), ("store", 8333), ("trainer", 29500)]
)
def test_pods_of_another_namespace_reach_nothing_whatever_their_labels(
    parts: tuple[Kubectl, Kubectl], target: str, port: int
):
    kubectl, outside = parts
    assert not reaches(outside, "outside", address(kubectl, target), port)


@pytest.mark.parametrize("source", ["trainer", "launcher", "mlflow", "stranger"])
def test_pods_reach_no_pod_of_another_namespace(parts: tuple[Kubectl, Kubectl], source: str):
    kubectl, outside = parts
    assert reaches(outside, "outside", address(outside, "outside"), 5000), "it answers"
    assert not reaches(kubectl, source, address(outside, "outside"), 5000)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """An HTTP server outside the cluster: on this machine's end of the wire to the node."""
    answers = http.server.ThreadingHTTPServer(("10.213.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=answers.serve_forever, daemon=True).start()
    yield answers.server_address[0], answers.server_port
    answers.shutdown()


def test_training_reaches_nothing_outside_the_cluster(parts: tuple[Kubectl, Kubectl], server: tuple[str, int]):
    kubectl, outside = parts
    assert reaches(outside, "outside", *server), "it answers"
    for source in ("trainer", "mlflow", "postgres", "store", "stranger"):
        assert not reaches(kubectl, source, *server), source


@pytest.mark.parametrize(
    ("source", "allowed"),
    [("launcher", True), ("step", True), ("trainer", False), ("mlflow", False), ("stranger", False)],
)
def test_the_api_server_is_reached_by_what_launches_jobs(parts: tuple[Kubectl, Kubectl], source: str, allowed: bool):
    kubectl, _ = parts
    service = kubectl("get", "service", "--namespace=default", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
    assert reaches(kubectl, source, service, 443) is allowed


@pytest.mark.parametrize("source", list(LABELS))
def test_every_pod_resolves_names(parts: tuple[Kubectl, Kubectl], source: str):
    kubectl, _ = parts
    name = f"mlflow.{kubectl.namespace}.svc.cluster.local"
    said = kubectl("exec", source, "--", "busybox", "nslookup", "-type=a", name)
    service = kubectl("get", "service", "mlflow", "-o", "jsonpath={.spec.clusterIP}")
    assert f"Address: {service}" in said


def test_services_lead_to_their_pods(parts: tuple[Kubectl, Kubectl]):
    kubectl, _ = parts
    assert reaches(kubectl, "trainer", "mlflow", 5000)
    assert reaches(kubectl, "mlflow", "postgres", 5432)
    assert reaches(kubectl, "mlflow", "store", 8333)


def test_in_the_namespace_of_kubeflow_pipelines_the_policies_bind_our_pods_alone(
    applied: Callable[..., Kubectl], server: tuple[str, int]
):
    kubectl = applied("pipelines", without=["Deployment", "StatefulSet", "PersistentVolumeClaim"])
    kubectl.apply(pod("trainer", LABELS["trainer"]), pod("stranger", LABELS["stranger"]))
    kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s")
    assert reaches(kubectl, "stranger", *server)
    assert not reaches(kubectl, "trainer", *server)
    assert not reaches(kubectl, "stranger", address(kubectl, "trainer"), 29500)
