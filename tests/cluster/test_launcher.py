"""The launcher on a real cluster: beside an API server that restarts, and in a pod with its own token."""

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "maskrcnn:1-cpu"  # of images.py
Launcher = Any  # of conftest.py
COUNTING = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 1; done"


def api_server() -> int:
    """Process of the node's API server, which node.py starts again a second after its end."""
    found = subprocess.run(["pgrep", "-x", "kube-apiserver"], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 1, found
    return int(found[0])


def lines(said: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", said, re.MULTILINE)]


def log(launcher: Launcher, pod: str) -> str:
    """What a pod has said; nothing if it has not begun."""
    return launcher.kubectl.run("logs", pod).stdout


@pytest.fixture
def operators(cluster: Any) -> Iterator[None]:
    """Operators that run again afterwards: each restart of the API server ends them, and the kubelet starts them again
    only after up to five minutes.
    """
    yield
    cluster.wait_until(lambda: cluster.run("get", "--raw", "/readyz").returncode == 0)
    for namespace in ("jobset-system", "kubeflow-system", "kubeflow", "kueue-system"):
        space = type(cluster)(cluster.kubeconfig, namespace)
        space("delete", "pods", "--all")
        space("wait", "deployments", "--all", "--for=condition=Available", "--timeout=120s")


@pytest.mark.usefixtures("operators")
def test_an_api_server_that_restarts_costs_no_job_and_no_line(launcher: Launcher):
    """Twice: killed, and ended in order, for which it takes a minute and in which the job ends."""
    process = launcher.start(COUNTING)
    launcher.kubectl.wait_until(lambda: any("line 5" in log(launcher, pod) for pod in launcher.pods()))
    killed = api_server()
    os.kill(killed, signal.SIGKILL)
    time.sleep(15)
    assert api_server() != killed
    os.kill(api_server(), signal.SIGTERM)
    ended = launcher.finish(process)
    assert ended.status == 0, ended.said
    assert lines(ended.said) == list(range(1, 41))
    assert ended.said.rstrip().endswith("succeeded")


def start_in_a_pod(launcher: Launcher, do: str) -> None:
    """Start the launcher as a pipeline's step does: in the image, with the account `launcher` and no kubeconfig."""
    limits = {"cpu": "1", "memory": "1Gi"}
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "capabilities": {"drop": ["ALL"]},
    }
    container = {
        "name": "launcher",
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "command": ["maskrcnn", "pytorchjob", "--run-id", "try", *launcher.values(do)],
        "resources": {"limits": limits, "requests": {"cpu": "50m", "memory": "256Mi"}},
        "securityContext": security,
    }
    spec = {"serviceAccountName": "launcher", "restartPolicy": "Never", "containers": [container]}
    spec |= {"terminationGracePeriodSeconds": 60}
    launcher.kubectl.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "launcher"}, "spec": spec})


def test_the_image_has_the_code_of_this_tree(launcher: Launcher):
    code = "import hashlib, pathlib, components; root = pathlib.Path(components.__file__).parent\n"
    code += "[print(hashlib.sha256(p.read_bytes()).hexdigest(), p.relative_to(root)) for p in root.rglob('*.py')]"
    launcher.kubectl("run", "code", f"--image={IMAGE}", "--restart=Never", "--", "python", "-c", code)
    launcher.kubectl("wait", "pod/code", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
    found = dict(reversed(line.split()) for line in log(launcher, "code").splitlines())
    folder = ROOT / "components"
    assert found == {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.py")
    }


def test_in_a_pod_the_launcher_needs_its_account_alone(launcher: Launcher):
    start_in_a_pod(launcher, "echo done")
    launcher.kubectl("wait", "pod/launcher", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
    said = log(launcher, "launcher")
    assert "\ndone\n" in said
    assert said.rstrip().endswith("succeeded")


def test_a_pod_that_is_deleted_takes_its_job_along(launcher: Launcher):
    start_in_a_pod(launcher, "echo begun; sleep 600")
    launcher.kubectl.wait_until(lambda: "\nbegun\n" in log(launcher, "launcher"))
    launcher.kubectl("delete", "pod", "launcher", "--timeout=60s")
    assert launcher.jobs() == []
    launcher.kubectl.wait_until(lambda: launcher.pods() == [])
