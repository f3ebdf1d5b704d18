"""Rules of the admission webhooks, checked before anything is sent, so that faults show at once and without a cluster.

All faults are reported together, each with its path in the manifest.
Sources: `validatePyTorchJob` of the training operator 1.9; the TrainJob's validation rules and reserved variables of
Kubeflow Trainer 2.3.
"""

import re
from typing import Any

from model.errors import UserError

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_CONTAINER = "pytorch"
_TRAINJOB_RESERVED = {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
MAX_ITEMS = 128  # in each list of a TrainJob
_MANAGERS = ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue")


class ManifestError(UserError):
    """The API server would refuse the job; the message names the fields and what they must be."""


def check(manifest: dict[str, Any]) -> None:
    """Check a PyTorchJob or a TrainJob.

    Raises:
        ManifestError: if there are faults, with one line per fault.
    """
    faults = _name_faults(manifest)
    faults += _pytorchjob_faults(manifest["spec"]) if manifest["kind"] == "PyTorchJob" else _trainjob_faults(manifest)
    if faults:
        raise ManifestError("\n".join(f"{manifest['kind']}: {fault}" for fault in faults))


def _name_faults(manifest: dict[str, Any]) -> list[str]:
    name = manifest["metadata"].get("name", "")
    if len(name) <= 63 and _DNS_1035.fullmatch(name):
        return []
    return [f"metadata.name: must be a DNS-1035 label (a-z, 0-9 and -, first a letter, at most 63), got {name!r}"]


def _pytorchjob_faults(spec: dict[str, Any]) -> list[str]:
    faults = []
    replicas, elastic = spec.get("pytorchReplicaSpecs"), spec.get("elasticPolicy")
    per_node = spec.get("nprocPerNode")
    if per_node is not None and not isinstance(per_node, str):
        faults.append(f'spec.nprocPerNode: must be a string, such as "8", got {per_node!r}')
    if elastic is not None:
        if "Worker" not in (replicas or {}):
            faults.append("spec.pytorchReplicaSpecs[Worker]: must be set with spec.elasticPolicy, got none")
        if elastic.get("nProcPerNode") is not None and per_node is not None:
            faults.append("spec.elasticPolicy.nProcPerNode: must not be set together with spec.nprocPerNode; remove it")
    manager = spec.get("runPolicy", {}).get("managedBy")
    if manager is not None and manager not in _MANAGERS:
        faults.append(f"spec.runPolicy.managedBy: must be one of {', '.join(_MANAGERS)}, got {manager!r}")
    if not replicas:
        return [*faults, "spec.pytorchReplicaSpecs: must have Master, Worker, or both, got none"]
    for role, replica in replicas.items():
        faults += _replica_faults(role, replica)
    return faults


def _replica_faults(role: str, replica: dict[str, Any]) -> list[str]:
    path, faults = f"spec.pytorchReplicaSpecs[{role}]", []
    if role not in ("Master", "Worker"):
        faults.append(f"{path}: must be Master or Worker")
    containers = replica.get("template", {}).get("spec", {}).get("containers", [])
    if not any(container.get("name") == _CONTAINER for container in containers):
        names = [container.get("name") for container in containers]
        faults.append(f"{path}.template.spec.containers: one must be named {_CONTAINER}, got {names}")
    for number, container in enumerate(containers):
        if not container.get("image"):
            faults.append(
                f"{path}.template.spec.containers[{number}].image: must be set, got none; set "
                "cluster.image=REGISTRY/NAME:TAG"
            )
    number_of = replica.get("replicas")
    if role == "Master" and number_of != 1:
        faults.append(f"{path}.replicas: must be 1, got {number_of}")
    elif number_of is not None and number_of < 1:
        faults.append(f"{path}.replicas: must be at least 1, got {number_of}")
    return faults


def _trainjob_faults(manifest: dict[str, Any]) -> list[str]:
    spec, faults = manifest["spec"], []
    trainer = spec.get("trainer", {})
    if not spec.get("runtimeRef", {}).get("name"):
        faults.append("spec.runtimeRef.name: must name a runtime, got none; set cluster.runtime")
    # The runtime's default image does not have components.train.
    if not trainer.get("image"):
        faults.append("spec.trainer.image: must be set, got none; set cluster.image=REGISTRY/NAME:TAG")
    reserved = sorted({env["name"] for env in trainer.get("env", [])} & _TRAINJOB_RESERVED)
    if reserved:
        faults.append(f"spec.trainer.env: must not set {', '.join(reserved)}, which the runtime sets")
    for field in ("command", "args", "env"):
        if len(trainer.get(field, [])) > MAX_ITEMS:
            faults.append(f"spec.trainer.{field}: must have at most {MAX_ITEMS} items, got {len(trainer[field])}")
    per_node = trainer.get("numProcPerNode")
    if per_node is not None and not isinstance(per_node, int):
        faults.append(f"spec.trainer.numProcPerNode: must be an integer, got {per_node!r}")
    return faults
