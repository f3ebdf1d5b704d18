"""The overlays that serve a registered model; tests/components/test_register.py runs the commands of their pods, and
test_network.py has their policies.
"""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]


@cache
def resolved(overlay: str) -> dict[str, Json]:
    """The documents of an overlay as kubectl applies it, by kind. Only to be read."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl, which resolves overlays")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {document["kind"]: document for document in YAML(typ="safe").load_all(text)}


def pods(overlay: str) -> Json:
    """Labels and spec of the pods."""
    if overlay == "serving":
        template = resolved(overlay)["Deployment"]["spec"]["template"]
        return {"labels": template["metadata"]["labels"], **template["spec"]}
    beside = ("minReplicas", "deploymentStrategy")
    predictor = resolved(overlay)["InferenceService"]["spec"]["predictor"]
    return {key: value for key, value in predictor.items() if key not in beside}


both = pytest.mark.parametrize("overlay", ["kserve", "serving"])


@both
def test_every_manifest_is_known_to_the_api_and_lies_in_the_namespace(kubernetes_schema: ModuleType, overlay: str):
    documents = resolved(overlay)
    assert [fault for document in documents.values() for fault in kubernetes_schema.faults(document)] == []
    assert {document["metadata"]["namespace"] for document in documents.values()} == {"maskrcnn"}
    own = {"serving": {"Deployment", "Service"}, "kserve": {"InferenceService"}}[overlay]
    assert set(documents) == own | {"NetworkPolicy", "PodDisruptionBudget"}


@both
def test_the_pods_are_restricted_and_have_no_token(kubernetes_schema: ModuleType, overlay: str):
    pod = pods(overlay)
    assert kubernetes_schema.violations(pod) == []
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert container["resources"]["limits"]["memory"]
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written == ({"/tmp", "/model"} if container["name"] == "model" else {"/tmp"})


def test_kserve_makes_the_same_pods():
    same, other = pods("serving"), pods("kserve")
    text = json.dumps(other, sort_keys=True).replace('"kserve-container"', '"server"')
    assert json.loads(text) == same
    strategy = resolved("kserve")["InferenceService"]["spec"]["predictor"]["deploymentStrategy"]
    assert strategy == resolved("serving")["Deployment"]["spec"]["strategy"]


def test_selectors_are_of_these_pods_and_the_service_of_their_port():
    documents, labels = resolved("serving"), pods("serving")["labels"]
    (container,) = pods("serving")["containers"]
    for kind, path in {
        "Deployment": ("selector", "matchLabels"),
        "PodDisruptionBudget": ("selector", "matchLabels"),
        "NetworkPolicy": ("podSelector", "matchLabels"),
        "Service": ("selector",),
    }.items():
        selector = documents[kind]["spec"]
        for key in path:
            selector = selector[key]
        assert selector == labels, kind
    (port,) = container["ports"]
    assert [port["port"] for port in documents["Service"]["spec"]["ports"]] == [port["containerPort"]]
    assert f"--port={port['containerPort']}" in container["command"]
    assert all(container[f"{kind}Probe"]["httpGet"]["port"] == port["name"] for kind in ("startup", "readiness"))


def test_a_change_of_pods_waits_for_the_next_and_for_the_longest_request():
    deployment, pod = resolved("serving")["Deployment"]["spec"], pods("serving")
    (server,) = pod["containers"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert deployment["replicas"] > resolved("serving")["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    wait_s = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    (drain_s,) = (int(text) for text in re.findall(r"--timeout-graceful-shutdown=(\d+)", " ".join(server["command"])))
    values = {variable["name"]: variable.get("value") for variable in server["env"]}
    assert drain_s >= int(values["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > wait_s + drain_s


def test_headers_name_the_image_that_the_manifests_have():
    for overlay in ("serving", "kserve"):
        text = (ROOT / "k8s" / "overlays" / overlay / "kustomization.yaml").read_text()
        assert f"kubectl kustomize k8s/overlays/{overlay} | sed 's|maskrcnn:dev|IMAGE|' | kubectl apply -f -" in text
        containers = [*pods(overlay)["initContainers"], *pods(overlay)["containers"]]
        assert {container["image"] for container in containers} == {"maskrcnn:dev"}
