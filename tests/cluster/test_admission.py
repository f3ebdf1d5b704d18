"""Jobs of every form are accepted by the API servers' schemas and the operators' webhooks, field by field."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.cluster
Kubectl = Any  # of conftest.py
ELSEWHERE = Path(__file__).resolve().parents[1] / "components" / "cluster" / "test_manifest.py"
FORMS = {
    "two nodes, TrainJob": ["cluster.api=trainjob", "cluster.nodes=2"],
    "without a GPU, TrainJob": ["cluster.api=trainjob", "cluster.gpus_per_node=0", "cluster.processes_per_node=2"],
    "48 nodes": ["cluster.nodes=48", "cluster.gpus_per_node=8", "train.batch_size=768"],
    "48 nodes, TrainJob": [
        "cluster.api=trainjob",
        "cluster.nodes=48",
        "cluster.gpus_per_node=8",
        "train.batch_size=768",
    ],
    "no restart, short times": ["cluster.restarts=0", "cluster.ttl_s=1", "cluster.run_timeout_s=1"],
    "a master alone": ["cluster.form=master_worker"],
    "values with dollars, spaces and equal signs": ["cluster.env=['A=$(B)', 'C=x y', 'D=', 'E=a=b']"],
    "an image by digest": [f"cluster.image=registry.example:5000/team/maskrcnn@sha256:{'a' * 64}"],
    "no tracking": ["tracking.enabled=false"],
}


def forms() -> ModuleType:
    """The forms of jobs in the tests without a cluster, and the function that makes their manifests."""
    spec = importlib.util.spec_from_file_location("forms", ELSEWHERE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*forms().FORMS, *FORMS])
def test_every_form_is_accepted(cluster: Kubectl, name: str):
    module = forms()
    job = module.manifest(*{**module.FORMS, **FORMS}[name])
    job["metadata"]["namespace"] = cluster.namespace
    words = ("create", "--dry-run=server", "--validate=strict", "--output=json", "-f", "-")
    assert json.loads(cluster(*words, text=json.dumps(job)))["spec"], "the server keeps the job's specification"


def refused(kubectl: Kubectl, job: dict[str, Any]) -> str:
    job["metadata"]["namespace"] = kubectl.namespace
    done = subprocess.run(
        ["kubectl", f"--kubeconfig={kubectl.kubeconfig}", "create", "--dry-run=server", "-f", "-"],
        **{"input": json.dumps(job), "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode, f"accepted: {done.stdout}"
    return done.stderr


def test_the_webhooks_refuse_what_our_rules_refuse(cluster: Kubectl):
    module = forms()
    job = module.manifest()
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = "main"
    assert "pytorch" in refused(cluster, job)
    job = module.manifest("cluster.api=trainjob")
    job["spec"]["trainer"]["env"].append({"name": "PET_NNODES", "value": "2"})
    assert "PET_NNODES" in refused(cluster, job)
    job = module.manifest("cluster.api=trainjob", "cluster.runtime=none")
    assert "none" in refused(cluster, job)
