"""Parts of the cluster that run as pods: DNS and a class of volumes. Their images are static programs, from scratch."""

import shutil
import subprocess
from pathlib import Path

import programs
from oci import NOBODY, write_image
from run import run
from settings import BIN, IMAGES, STATE

MANIFESTS = Path(__file__).resolve().parent / "manifests"
PREFIX = "localhost/maskrcnn-cluster"
_ROLLOUTS = (("kube-system", "deployment/coredns"), ("local-path-storage", "deployment/local-path-provisioner"))


def make_images() -> None:
    """Write the images' archives; equal programs give equal images."""
    pause, shell = BIN / "pause", Path("/bin/busybox")
    if not pause.exists():
        code = programs.source("kubernetes") / "build" / "pause" / "linux" / "pause.c"
        subprocess.run(["gcc", "-Os", "-static", "-DVERSION=1", "-o", str(pause), str(code)], check=True)
    tools = {
        f"/bin/{name}": "busybox" for name in ("sh", "mkdir", "rm", "cat", "sleep", "wget", "nslookup", "nc", "id")
    }
    for name, files, entrypoint, links, user in (
        ("pause", {"/pause": pause}, ["/pause"], {}, "65535:65535"),
        ("busybox", {"/bin/busybox": shell}, ["/bin/sh"], tools, "0:0"),
        ("coredns", {"/coredns": BIN / "coredns"}, ["/coredns"], {}, NOBODY),
        (
            "local-path-provisioner",
            {"/bin/local-path-provisioner": BIN / "local-path-provisioner"},
            ["local-path-provisioner"],
            {},
            "0:0",
        ),
    ):
        write_image(IMAGES / f"{name}.tar", f"{PREFIX}/{name}:1", files, entrypoint=entrypoint, links=links, user=user)


def archives() -> list[Path]:
    """Archives of the images."""
    return [IMAGES / f"{name}.tar" for name in ("pause", "busybox", "coredns", "local-path-provisioner")]


def apply() -> None:
    """Apply the manifests."""
    run("kubectl", "apply", "--server-side", "--filename", str(MANIFESTS / "coredns.yaml"))
    folder = STATE / "manifests" / "local-path"
    shutil.copytree(MANIFESTS / "local-path", folder)
    shutil.copy(programs.source("local-path-provisioner") / "deploy" / "local-path-storage.yaml", folder)
    run("kubectl", "apply", "--server-side", "--kustomize", str(folder))


def wait() -> None:
    """Wait until the node and the add-ons are ready."""
    run("kubectl", "wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
    for namespace, what in _ROLLOUTS:
        run("kubectl", "--namespace", namespace, "rollout", "status", what, "--timeout=120s")
