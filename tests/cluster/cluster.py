"""Starts and stops the test cluster: `python tests/cluster/cluster.py up | down | load ARCHIVE … | inside COMMAND …`.

The node runs in namespaces of its own (node.py), with one wire to this machine: nothing listens outside of them. `up`
builds what is missing, and tells the time of each step; `down` leaves the cache alone, and nothing else.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import addons
import programs
from run import run
from settings import BIN, CACHE, CGROUP, HOST_IP, KUBECONFIG, LINK, NODE_IP, PID, READY, SOCKET, STATE, WIRE_BITS

HERE = Path(__file__).resolve().parent
PROGRAMS = ("containerd", "runc", "ctr", "iptables", "ipset", "conntrack", "ip", "unshare", "nsenter", "go", "gcc")
PACKAGES = "containerd runc containernetworking-plugins iptables ipset conntrack iproute2 util-linux busybox-static gcc"


def up() -> None:
    """Start the cluster and wait until its parts are ready; nothing happens if it is up."""
    if _pid() and READY.exists():
        print(f"the cluster is up: export KUBECONFIG={KUBECONFIG}")
        return
    _check()
    down()
    with _timed("programs"):
        programs.main(())
    with _timed("images"):
        addons.make_images()
    with _timed("node"):
        _start()
    with _timed("add-ons"):
        load(addons.archives())
        addons.apply()
        addons.wait()
    READY.touch()
    print(f"the cluster is up: export KUBECONFIG={KUBECONFIG}")


def down() -> None:
    """Stop the cluster; its processes, mounts and addresses end with the node, its control groups and files here."""
    pid = _pid()
    if pid:
        os.kill(pid, signal.SIGKILL)  # process 1 of its namespace: the kernel ends all others
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.1)
    for group in _groups():
        _patiently(group.rmdir)
    if STATE.exists():
        _patiently(lambda: shutil.rmtree(STATE))


def load(archives: Sequence[Path]) -> None:
    """Import OCI archives into containerd."""
    for archive in archives:
        inside("ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", "--no-unpack", str(archive))


def inside(*command: str) -> str:
    """Run a command in the node's namespaces, and return what it prints."""
    words = ["nsenter", f"--target={_pid()}", "--mount", "--net", "--pid", *command]
    return run(*words)


def _check() -> None:
    if os.geteuid() != 0:
        sys.exit("error: make cluster must run as root: it makes namespaces, mounts and control groups")
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing:
        sys.exit(f"error: make cluster needs {', '.join(missing)}; on Debian: apt-get install {PACKAGES}, and Go 1.24")


def _start() -> None:
    (STATE / "log").mkdir(parents=True, exist_ok=True)
    with (STATE / "log" / "node.log").open("w") as log:
        spaces = ["--pid", "--mount", "--net", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        words = ["unshare", *spaces, sys.executable, str(HERE / "node.py")]
        outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    pid = _child(outer)
    PID.write_text(str(pid))
    run("ip", "link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    run("ip", "address", "add", f"{HOST_IP}/{WIRE_BITS}", "dev", LINK)
    run("ip", "link", "set", LINK, "up")
    for words in (
        ["address", "add", f"{NODE_IP}/{WIRE_BITS}", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["route", "add", "default", "via", HOST_IP],
    ):
        run("nsenter", f"--target={pid}", "--net", "ip", *words)
    while not (STATE / "started").exists():
        if outer.poll() is not None:
            sys.exit("error: the node has ended:\n" + (STATE / "log" / "node.log").read_text())
        time.sleep(0.2)
    print((STATE / "log" / "node.log").read_text(), end="")


def _child(outer: subprocess.Popen[bytes]) -> int:
    """Process 1 of the node's namespace, as it is numbered here."""
    while outer.poll() is None:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.05)
    sys.exit(f"error: unshare ended with status {outer.returncode}; see {STATE}/log/node.log")


def _pid() -> int | None:
    """The node's process, if it runs."""
    try:
        pid = int(PID.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"node.py" in words else None


def _groups() -> list[Path]:
    """The cluster's control groups, the innermost first."""
    roots = [root for root in Path("/sys/fs/cgroup").glob(f"*/{CGROUP}") if root.is_dir()]
    return [folder for root in roots for folder in [*sorted(_folders(root), key=lambda p: -len(p.parts)), root]]


def _folders(root: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(root):
        yield from (Path(folder, name) for name in names)


def _patiently(action: object, *, seconds: float = 20) -> None:
    """Call an action until it succeeds: the kernel may still be ending processes and mounts."""
    until_s = time.monotonic() + seconds
    while True:
        try:
            action()  # type: ignore[operator]
            return
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.2)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began_s = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began_s:.0f} s", flush=True)


def main(words: Sequence[str]) -> None:
    """Command line."""
    match list(words):
        case ["up"]:
            up()
        case ["down"]:
            down()
        case ["load", "images"]:
            import images  # it needs packages that starting does not

            load([images.archive(name) for name in images.IMAGES])
        case ["load", *archives]:
            load([Path(archive) for archive in archives])
        case ["kubeconfig"]:
            print(KUBECONFIG)
        case ["bin"]:
            print(BIN)
        case ["inside", *command]:
            print(inside(*command), end="")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    CACHE.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1:])
