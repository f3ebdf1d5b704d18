"""Manifests against the types of the API, offline: what a strict server would refuse, a misspelt field at any depth
too.

A manifest is read into the clients' own models and written again. What they do not know is lost on the way, what they
want to be of another type comes back as such, and what they require raises: so it must come back as it was.
"""

import json
from collections.abc import Iterator
from typing import Any

import kubernetes.client

Json = dict[str, Any]
# Kinds that no client on PyPI has types for, from their CRDs: field → type, * any field.
_CRDS: dict[str, Any] = {
    "kueue.x-k8s.io/v1beta2/ResourceFlavor": {
        "nodeLabels": {"*": str},
        "tolerations": [dict.fromkeys(("key", "operator", "value", "effect"), str)],
    },
    "kueue.x-k8s.io/v1beta2/LocalQueue": {"clusterQueue": str},
    "kueue.x-k8s.io/v1beta2/ClusterQueue": {
        "namespaceSelector": {"matchLabels": {"*": str}},
        "queueingStrategy": str,
        "preemption": {"withinClusterQueue": str},
        "resourceGroups": [
            {
                "coveredResources": [str],
                "flavors": [{"name": str, "resources": [{"name": str, "nominalQuota": str}]}],
            }
        ],
    },
    "scheduling.volcano.sh/v1beta1/Queue": {"weight": int, "reclaimable": bool, "capability": {"*": str}},
}
_KSERVE = ("minReplicas", "deploymentStrategy", "labels")  # fields of a predictor beside those of a pod, as far as used


def faults(manifest: Json) -> list[str]:
    """What is wrong with a manifest, a line each."""
    if not {"apiVersion", "kind"} <= manifest.keys():
        return ["apiVersion and kind must be there"]
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    try:
        back = _crd(manifest, kind) if kind in _CRDS else _round_trip(manifest)
    except (ValueError, AttributeError, TypeError) as error:
        return [f"{kind}: {error}"]
    return [f"{kind}: {fault}" for fault in _differences(manifest, back, "")]


def _round_trip(manifest: Json) -> Any:
    if manifest["kind"] == "TrainJob":
        from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

        job = TrainerV1alpha1TrainJob.from_dict(manifest)
        assert job is not None
        return job.to_dict()
    if manifest["kind"] == "InferenceService":
        return _inference_service(manifest)
    if manifest["kind"] == "PyTorchJob":
        from kubeflow.training.api_client import ApiClient

        client, model = ApiClient(), "KubeflowOrgV1PyTorchJob"
    else:
        version = manifest["apiVersion"].split("/")[-1]
        client, model = kubernetes.client.ApiClient(), f"{version[0].upper()}{version[1:]}{manifest['kind']}"
    return client.sanitize_for_serialization(client.deserialize(_Response(manifest), model))


def _inference_service(manifest: Json) -> Json:
    """The part of an InferenceService of KServe that its API knows: its predictor is a pod's spec, and a bit more."""
    predictor = manifest.get("spec", {}).get("predictor", {})
    pod = {key: value for key, value in predictor.items() if key not in _KSERVE}
    spec = {
        "replicas": predictor.get("minReplicas"),
        "strategy": predictor.get("deploymentStrategy"),
        "selector": {},
        "template": {"metadata": {"labels": predictor.get("labels")}, "spec": pod},
    }
    metadata = manifest.get("metadata", {})
    back = _round_trip({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})
    spec = back["spec"]
    known = (spec.get("replicas"), spec.get("strategy"), spec["template"]["metadata"].get("labels"))
    more = {key: value for key, value in zip(_KSERVE, known, strict=True) if key in predictor}
    names = {key: manifest[key] for key in ("apiVersion", "kind")}
    return {**names, "metadata": back["metadata"], "spec": {"predictor": {**spec["template"]["spec"], **more}}}


class _Response:
    """What the generated clients read from."""

    def __init__(self, value: Json) -> None:
        self.data = json.dumps(value)


def _crd(manifest: Json, kind: str) -> Json:
    common = {"apiVersion": str, "kind": str, "metadata": {"name": str, "namespace": str, "labels": {"*": str}}}
    return _known(manifest, {**common, "spec": _CRDS[kind]})


def _known(value: Any, shape: Any) -> Any:
    """The part of a value that has the shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return {k: _known(v, shape.get(k, shape.get("*"))) for k, v in value.items() if k in shape or "*" in shape}
    if isinstance(shape, list) and isinstance(value, list):
        return [_known(item, shape[0]) for item in value]
    return value if isinstance(shape, type) and type(value) is shape else None


def _differences(sent: Any, back: Any, path: str) -> Iterator[str]:
    if isinstance(sent, dict) and isinstance(back, dict):
        for key, value in sent.items():
            if key not in back:
                yield f"{path}.{key}: unknown field"
            else:
                yield from _differences(value, back[key], f"{path}.{key}")
    elif isinstance(sent, list) and isinstance(back, list) and len(sent) == len(back):
        for number, (ours, theirs) in enumerate(zip(sent, back, strict=True)):
            yield from _differences(ours, theirs, f"{path}[{number}]")
    elif sent != back or type(sent) is not type(back):
        yield f"{path}: must be like {back!r}, got {sent!r}"


def field_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field of a manifest."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            yield (*path, key)
        yield from field_paths(inner, (*path, key))


def violations(pod: Json) -> list[str]:
    """Where a pod's spec breaks the pod-security level "restricted" (which contains "baseline").

    Source: Kubernetes' Pod Security Standards, version 1.32.
    """
    found = [f"{field}: must not be true" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    outer = pod.get("securityContext", {})
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in pod.get("volumes", []):
        found += [f"volume {volume['name']}: {kind}" for kind in volume.keys() - {"name"} - allowed]
    for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
        inner, name = container.get("securityContext", {}), container["name"]
        both = {**outer, **inner}
        if inner.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation must be false")
        if both.get("runAsNonRoot") is not True:
            found.append(f"{name}: runAsNonRoot must be true")
        if both.get("runAsUser") == 0:
            found.append(f"{name}: runAsUser must not be 0")
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: seccompProfile must be RuntimeDefault or Localhost")
        if "ALL" not in inner.get("capabilities", {}).get("drop", []):
            found.append(f"{name}: capabilities must drop ALL")
        if set(inner.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: capabilities must add none but NET_BIND_SERVICE")
        if inner.get("privileged") or inner.get("procMount", "Default") != "Default":
            found.append(f"{name}: must not be privileged, nor unmask /proc")
        found += [f"{name}: hostPort" for port in container.get("ports", []) if port.get("hostPort")]
    return found
