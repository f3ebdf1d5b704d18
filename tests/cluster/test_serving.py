"""The overlay `serving` on a real cluster: a picture by curl, requests from labelled pods alone, and a new champion
during requests, none of which is lost.
"""

import base64
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from ruamel.yaml import YAML

from components import download, evaluate, prepare, register
from components.params import load_config
from model.data.index import CocoIndex
from model.engine.checkpoint import save_checkpoint
from model.network.mask_rcnn import MaskRCNN

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "maskrcnn:1-cpu"  # of images.py
WAIT = "--timeout=600s"
Json = dict[str, Any]
Kubectl = Any  # of conftest.py
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
# MLflow with a database in a file: what the overlay needs of k8s/base/mlflow.yaml, whose image has no part in this.
MLFLOW = (
    *("env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "mlflow", "server"),
    *("--host=0.0.0.0", "--port=5000", "--workers=1", "--allowed-hosts=*"),
    *("--backend-store-uri=sqlite:////tmp/mlflow.db", "--artifacts-destination=/tmp/artifacts"),
)
# Two clients that keep their connections and two that do not; it ends when /tmp/stop is there.
CLIENT = """\
import hashlib, http.client, json, os, socket, sys, threading, time
host, body = sys.argv[1:]
counts, lost = {}, []
until = time.monotonic() + 60
while True:  # the policies learn of a new pod within seconds
    try:
        socket.create_connection((host, 8080), 5).close()
        break
    except OSError as error:
        if time.monotonic() > until:
            sys.exit(f"not let in: {error}")
        time.sleep(0.2)
def ask(keeps):
    connection = None
    while not os.path.exists("/tmp/stop"):
        connection = connection or http.client.HTTPConnection(host, 8080, timeout=70)
        try:
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content, ends = answer.read(), answer.getheader("Connection") == "close"
            assert answer.status == 200, (answer.status, content)
            key = hashlib.sha256(content).hexdigest()[:8]
            counts[key] = counts.get(key, 0) + 1
        except Exception as error:
            lost.append(f"{time.strftime('%X')} {error!r}")
            ends = True
        if ends or not keeps:
            connection = connection.close()
        time.sleep(0.02)
threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(4)]
print("begun", flush=True)
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"counts": counts, "lost": lost}), flush=True)
"""


@dataclass(frozen=True)
class Place:
    """A namespace with the overlay, another one for clients, and MLflow with two versions, the first the champion."""

    kubectl: Kubectl
    clients: Kubectl
    mlflow: str
    images: list[Path]

    def send(self, name: str, *, is_client: bool) -> None:
        """Start a pod that sends requests."""
        body = json.dumps({"inputs": [encoded(self.images[0])]})
        labels = {"maskrcnn-client": "true"} if is_client else {}
        words = ("python", "-c", CLIENT, f"maskrcnn.{self.kubectl.namespace}", body)
        self.clients.apply(pod(name, labels, *words))

    def versions(self) -> list[str]:
        """What the logs say of the version of each pod."""
        label = "app.kubernetes.io/component=server"
        return self.kubectl("logs", f"--selector={label}", "--container=model", "--tail=1").splitlines()


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def pod(name: str, labels: dict[str, str], *command: str) -> Json:
    container = {
        **{"name": "main", "image": IMAGE, "command": ["tini", "--", *command], "securityContext": RESTRICTED},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "3Gi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}], "restartPolicy": "Never"}
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec, "enableServiceLinks": False}}


@contextmanager
def forwarded(kubectl: Kubectl, target: str, port: int) -> Iterator[str]:
    """The address here of a service's port."""
    words = [f"--kubeconfig={kubectl.kubeconfig}", f"--namespace={kubectl.namespace}"]
    command = ["kubectl", *words, "port-forward", target, f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().split(' -> ')[0].rpartition(':')[2]}"
        finally:
            process.terminate()


def make_versions(uri: str, folder: Path) -> list[Path]:
    """Register two networks that have learned nothing, and return images for them."""
    tiny = ROOT / "tests" / "components" / "tiny.yaml"
    unsure = ("data.source=shapes", "train.device=cpu", "model.score_threshold=0.01", "predict.score_threshold=0.0")
    folders = (f"data.raw_dir={folder}/raw", f"data.prepared_dir={folder}/prepared")
    for seed in (0, 1):
        where = (f"train.output_dir={folder}/run{seed}", "tracking.enabled=true", f"tracking.uri={uri}")
        config = load_config(tiny, [*unsure, *folders, *where])
        if seed == 0:
            download.run(config)
            prepare.run(config)
        index = CocoIndex.open(config.data.prepared_dir, "val")
        torch.manual_seed(seed)
        state = {
            "model": MaskRCNN(config.model, len(index.class_names)).state_dict(),
            "config": config.model_dump(mode="json"),
            "class_names": list(index.class_names),
            "category_ids": list(index.category_ids),
            "data_hash": index.data_hash,
        }
        save_checkpoint(config.train.output_dir, 7, state)
        evaluate.run(config)
        register.run(config)
    return [index.image_path(i) for i in range(len(index))]


def overlay(folder: Path, namespace: str) -> str:
    """The overlay as docs/serving.md says it is applied, in another namespace and with requests for a small node."""
    where = (f"/spec/template/spec/{kind}/0/resources/requests/cpu" for kind in ("initContainers", "containers"))
    small = [{"op": "replace", "path": path, "value": "50m"} for path in where]
    relative = os.path.relpath(ROOT / "k8s" / "overlays" / "serving", folder.resolve())
    kustomization = {
        **{"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": namespace},
        "resources": [relative],
        "patches": [{"target": {"kind": "Deployment"}, "patch": json.dumps(small)}],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    resolve = f"kubectl kustomize '{folder.resolve()}' | sed 's|maskrcnn:dev|{IMAGE}|'"
    return subprocess.run(["bash", "-euc", resolve], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def place(cluster: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    name = f"test-{uuid.uuid4().hex[:8]}"
    own, clients = (replace(cluster, namespace=f"{name}{end}") for end in ("", "-clients"))
    try:
        for kubectl in (own, clients):
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            metadata = {"name": kubectl.namespace, "labels": labels}
            kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        own("apply", "--server-side", "-f", str(ROOT / "k8s" / "base" / "network.yaml"))
        services = YAML(typ="safe").load_all((ROOT / "k8s" / "base" / "mlflow.yaml").read_text())
        own.apply(*(document for document in services if document["kind"] == "Service"))
        mlflow = pod("mlflow", {"app.kubernetes.io/name": "mlflow"}, *MLFLOW)
        mlflow["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/health", "port": 5000}}
        own.apply(mlflow)
        own("wait", "--for=condition=Ready", "pod/mlflow", WAIT)
        with forwarded(own, "service/mlflow", 5000) as uri:
            images = make_versions(uri, tmp_path)
            MlflowClient(uri).set_registered_model_alias("maskrcnn", "champion", "1")
            (tmp_path / "overlay").mkdir()
            own("apply", "--server-side", "-f", "-", text=overlay(tmp_path / "overlay", own.namespace))
            rolled_out(own)
            yield Place(own, clients, uri, images)
    finally:
        for kubectl in (own, clients):
            kubectl("delete", "namespace", kubectl.namespace, "--wait=false", "--ignore-not-found")


def rolled_out(kubectl: Kubectl) -> None:
    """Wait for the pods; if they do not come, their logs and events are in the error."""
    command = ["rollout", "status", "deployment/maskrcnn", WAIT]
    done = subprocess.run(
        ["kubectl", f"--kubeconfig={kubectl.kubeconfig}", f"--namespace={kubectl.namespace}", *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        label = "--selector=app.kubernetes.io/component=server"
        pytest.fail(kubectl("logs", label, "--all-containers", "--prefix") + kubectl("get", "events"))


def test_a_picture_by_curl_and_a_new_champion_during_requests(place: Place, tmp_path: Path):
    with forwarded(place.kubectl, "service/maskrcnn", 8080) as address:
        (tmp_path / "request.json").write_text(json.dumps({"inputs": [encoded(path) for path in place.images]}))
        curl = ["curl", "--fail-with-body", "--silent", "-H", "Content-Type: application/json"]
        curl += ["--data-binary", f"@{tmp_path}/request.json", f"{address}/invocations"]
        answer = subprocess.run(curl, capture_output=True, text=True, check=True).stdout
    found = json.loads(answer)["predictions"]
    assert [image["size"] for image in found] == [[64, 64]] * len(place.images)
    assert all(image["detections"] for image in found)
    assert len(place.versions()) == 2
    assert all("model_version: '1'" in line or "model_version: 1" in line for line in place.versions())

    place.send("client", is_client=True)
    place.clients("wait", "--for=condition=Ready", "pod/client", WAIT)
    place.send("stranger", is_client=False)
    MlflowClient(place.mlflow).set_registered_model_alias("maskrcnn", "champion", "2")
    place.kubectl("rollout", "restart", "deployment/maskrcnn")
    rolled_out(place.kubectl)
    time.sleep(30)  # the last of the earlier pods ends meanwhile
    place.clients("exec", "client", "--", "touch", "/tmp/stop")
    place.clients("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/client", WAIT)
    result = json.loads(place.clients("logs", "client").splitlines()[-1])
    print(result)
    assert result["lost"] == []
    assert len(result["counts"]) == 2, "both versions have answered"
    assert sum(result["counts"].values()) > 50
    place.clients("wait", "--for=jsonpath={.status.phase}=Failed", "pod/stranger", WAIT)
    assert "not let in" in place.clients("logs", "stranger")
    assert all("2" in line for line in place.versions())
