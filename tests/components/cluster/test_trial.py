"""Check from a pod: the pod on a server on loopback, which goes whatever happens, and its program as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from components import pytorchjob
from components.cluster import probe
from components.cluster.findings import Finding
from components.config import Config
from components.params import load_config

pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
# Waits of parts of a second, which no parameter file may set.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
ROOT = Path(__file__).resolve().parents[3]
NAME = "maskrcnn-try-1-check"
Make = Callable[..., Any]  # see make_cluster in ../conftest.py
Cluster = Any  # of kubernetes_stub.py


def config(*overrides: str, stuck_timeout_s: float = 30) -> Config:
    loaded = load_config(ROOT / "params.yaml", ["cluster.image=registry/maskrcnn:1", *overrides])
    cluster = loaded.cluster.model_copy(update={"poll_s": 0.05, "stuck_timeout_s": stuck_timeout_s})
    return loaded.model_copy(update={"cluster": cluster})


def check(*overrides: str, **seconds: float) -> list[str]:
    """What the pod adds to the findings."""
    found = pytorchjob.check(config(*overrides, **seconds), run_id="try-1", from_pod=True)
    return [str(one) for one in found if "pod" in one.subject and "dry run" not in one.subject]


def start(make_cluster: Make, kubelet: Callable[[Cluster, str], None]) -> Cluster:
    cluster = make_cluster()
    cluster.granted |= {("", "pods", verb) for verb in ("create", "get", "delete")}
    cluster.kubelet = kubelet
    return cluster


def test_the_pod_is_the_jobs_but_small_and_what_it_says_is_found(make_cluster: Make):
    seen = []

    def kubelet(cluster: Cluster, pod: str) -> None:
        seen.append(cluster.pods[pod])
        finding = {"level": "fault", "subject": "MLflow from a pod", "text": "mlflow:5000: timed out"}
        cluster.log(pod, "a warning of some library", json.dumps(finding))
        cluster.pods[pod]["status"] = {"phase": "Succeeded"}

    cluster = start(make_cluster, kubelet)
    assert check("cluster.secrets=[KEY=store/key]") == ["fault    MLflow from a pod: mlflow:5000: timed out"]
    assert NAME not in cluster.pods
    (pod,) = seen
    (container,) = pod["spec"]["containers"]
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "trainer", "network policies select by it"
    assert (pod["spec"]["serviceAccountName"], pod["spec"]["restartPolicy"]) == ("trainer", "Never")
    assert pod["spec"]["activeDeadlineSeconds"] == 30, "it ends by itself if the check is killed"
    assert container["image"] == "registry/maskrcnn:1"
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}, "no GPU, which may be in use"
    assert "KEY" in {variable["name"] for variable in container["env"]}
    assert json.loads(container["command"][-1]) == {
        "uri": "http://mlflow:5000",
        "volumes": [["/workspace/data", True], ["/workspace/runs", True]],
    }


@pytest.mark.parametrize(
    ("reason", "seconds", "words"),
    [
        ("ImagePullBackOff", 30, "ImagePullBackOff: ErrImagePull: not found; check cluster.image"),
        ("CreateContainerConfigError", 30, "CreateContainerConfigError: ErrImagePull: not found; check the secrets"),
        ("ErrImagePull", 0.5, "ErrImagePull: ErrImagePull: not found; check cluster.image"),
        ("ContainerCreating", 0.5, "did not end within cluster.stuck_timeout_s=0.5: pod maskrcnn-try-1-check: Cont"),
    ],
)
def test_a_pod_that_cannot_start_is_a_fault_and_goes(make_cluster: Make, reason: str, seconds: float, words: str):
    def kubelet(cluster: Cluster, pod: str) -> None:
        waiting = {"name": "pytorch", "state": {"waiting": {"reason": reason, "message": "ErrImagePull: not found"}}}
        cluster.pods[pod]["status"] = {"phase": "Pending", "containerStatuses": [waiting]}

    cluster = start(make_cluster, kubelet)
    began_s = time.monotonic()
    (fault,) = check(stuck_timeout_s=seconds)
    assert time.monotonic() - began_s < 25, "what does not change by itself is not waited for"
    assert fault.startswith("fault    pod: ")
    assert words in fault
    assert NAME not in cluster.pods


def test_a_pod_without_findings_is_a_fault_with_the_end_of_its_log(make_cluster: Make):
    def kubelet(cluster: Cluster, pod: str) -> None:
        cluster.log(pod, "hello", "a shell that knows no python")
        cluster.pods[pod]["status"] = {"phase": "Succeeded"}

    start(make_cluster, kubelet)
    (fault,) = check()
    assert "must write its findings, got a shell that knows no python; check that cluster.image has python" in fault


def test_a_pod_that_dies_is_a_fault_with_its_exit_code_and_one_that_was_left_is_replaced(make_cluster: Make):
    def kubelet(cluster: Cluster, pod: str) -> None:
        end = {"exitCode": 127, "reason": "Error", "finishedAt": "2026-01-01T00:00:09Z"}
        status = {"name": "pytorch", "state": {"terminated": end}}
        cluster.pods[pod]["status"] = {"phase": "Failed", "containerStatuses": [status]}

    cluster = start(make_cluster, kubelet)
    cluster.pods[NAME] = {"metadata": {"name": NAME, "labels": {}}, "status": {"phase": "Failed"}}
    _, fault = check()
    assert "ended with exit code 127, the image has no tini, or no python" in fault
    assert NAME not in cluster.pods


def test_a_check_that_is_cancelled_takes_its_pod_along(make_cluster: Make):
    def kubelet(cluster: Cluster, pod: str) -> None:
        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM]).start()

    cluster = start(make_cluster, kubelet)
    with pytest.raises(SystemExit) as end:
        check()
    assert end.value.code == 143
    assert cluster.pods == {}
    assert ("create", "pods") in cluster.calls


def test_an_account_that_may_not_start_pods_is_not_at_fault(make_cluster: Make):
    make_cluster()
    assert check() == ["unknown  pod: not allowed to look (create pods)"]


def run_probe(uri: str, *volumes: tuple[Path, bool], **env: str) -> list[Finding]:
    """What the program finds as it runs in the pod: from its text alone."""
    asked = {"uri": uri, "volumes": [[str(path), must_write] for path, must_write in volumes]}
    program = Path(probe.__file__).read_text().replace("_PATIENCE_S = 5, 30", "_PATIENCE_S = 0, 1")
    command = [sys.executable, "-c", program, json.dumps(asked)]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **env})
    return [Finding(**json.loads(line)) for line in done.stdout.splitlines()]


def test_the_probe_tells_a_name_without_an_address_from_a_closed_port_and_writes_where_training_would(tmp_path: Path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        found = run_probe(f"http://127.0.0.1:{port}", (tmp_path, True), (tmp_path / "absent", False))
    assert [(one.level, one.subject) for one in found] == [
        ("ok", "DNS from a pod"),
        ("fault", "MLflow from a pod"),
        ("ok", f"volume {tmp_path} from a pod"),
        ("fault", f"volume {tmp_path}/absent from a pod"),
    ]
    assert "Connection refused; check that MLflow runs" in found[1].text
    assert found[2].text.startswith("writable, ")
    assert "No such file or directory" in found[3].text
    assert list(tmp_path.iterdir()) == []
    (no_address,) = run_probe("http://no-such-host.invalid:5000")
    assert (no_address.level, no_address.subject) == ("fault", "DNS from a pod")
    assert "no-such-host.invalid: " in no_address.text


@pytest.mark.slow
@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (403, "fault")])
def test_the_probe_asks_mlflow_as_training_does(status: int, level: str):
    pytest.importorskip("mlflow", reason="needs mlflow")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/api/2.0/mlflow/experiments/search"
            answer = b'{"experiments": []}' if status == 200 else b"Invalid Host header - possible DNS rebinding attack"
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_address[1]}"
    dns, mlflow = run_probe(uri, MLFLOW_TRACKING_URI=uri)
    server.shutdown()
    server.server_close()
    assert (dns.level, mlflow.level) == ("ok", level)
    assert mlflow.text == f"{uri} answers" if status == 200 else "Invalid Host header" in mlflow.text
