"""Manifest of a job for the API server: a PyTorchJob or a TrainJob, from the templates in `k8s/job/`.

    manifest = build(describe(config, run_id))
    print(to_yaml(manifest))

Sources: the types of kubeflow.org/v1 (training operator 1.9) and trainer.kubeflow.org/v1alpha1 (Trainer 2.3).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from components.cluster.description import Description, literal_env, toleration
from components.cluster.rules import MAX_ITEMS, check
from components.config import canonical

TEMPLATES = Path(__file__).resolve().parents[2] / "k8s" / "job"
RUN_ID = "maskrcnn/run-id"  # annotations
DIGEST = "maskrcnn/description-digest"
Manifest = dict[str, Any]


def build(job: Description) -> Manifest:
    """Build the manifest for `cluster.api` and check it by the rules of its admission webhook.

    Raises:
        ManifestError: if the webhook would refuse it.
    """
    manifest = _pytorchjob(job) if job.cluster.job_api == "pytorchjob" else _trainjob(job)
    check(manifest)
    return manifest


def to_yaml(manifest: Manifest) -> str:
    """Format a manifest for `kubectl apply -f`; equal manifests give equal text."""
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.dump(manifest, stream)
    return stream.getvalue()


def _template(name: str) -> Manifest:
    return YAML(typ="safe", pure=True).load((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8"))


def _pytorchjob(job: Description) -> Manifest:
    cluster, manifest = job.cluster, _template("pytorchjob")
    spec = manifest["spec"]
    _name(manifest, job)
    spec["nprocPerNode"] = str(job.processes_per_node)
    spec["runPolicy"] |= {
        # The operator counts the restarts of all pods together, and one failure may restart each of them.
        "backoffLimit": cluster.restarts * cluster.nodes,
        # A limit in case the launcher is gone. The operator counts from when it first sees the job, and anew after each
        # suspension.
        "activeDeadlineSeconds": cluster.pending_timeout_s + cluster.run_timeout_s,
        "ttlSecondsAfterFinished": cluster.ttl_s,
    }
    min_nodes = cluster.min_nodes or cluster.nodes
    if cluster.scheduler == "volcano":
        spec["runPolicy"]["schedulingPolicy"] = {"queue": cluster.queue, "minAvailable": min_nodes}
    if cluster.form == "elastic":
        spec["elasticPolicy"] |= {"minReplicas": min_nodes, "maxReplicas": cluster.nodes}
        conf = spec["elasticPolicy"]["rdzvConf"]
        conf.append({"key": "join_timeout", "value": str(cluster.pending_timeout_s)})  # nodes may start this far apart
        spec["pytorchReplicaSpecs"] = {"Worker": _replicas(job, cluster.nodes)}
        return manifest
    del spec["elasticPolicy"]
    spec["pytorchReplicaSpecs"] = {"Master": _replicas(job, 1)}
    if cluster.nodes > 1:
        spec["pytorchReplicaSpecs"]["Worker"] = _replicas(job, cluster.nodes - 1)
    return manifest


def _replicas(job: Description, number: int) -> Manifest:
    # OnFailure, not ExitCode: when a node is lost, torchrun exits with 1 on the others too, which ExitCode takes as
    # final. With OnFailure and no restart allowed, a container would be restarted before the operator ends the job.
    policy = "OnFailure" if job.cluster.restarts else "Never"
    return {"replicas": number, "restartPolicy": policy, "template": pod_template(job)}


def _trainjob(job: Description) -> Manifest:
    cluster, manifest, pod = job.cluster, _template("trainjob"), pod_template(job)
    spec, container = manifest["spec"], pod["spec"]["containers"][0]
    _name(manifest, job)
    spec["runtimeRef"]["name"] = cluster.runtime
    spec["activeDeadlineSeconds"] = cluster.pending_timeout_s + cluster.run_timeout_s
    words, buffering = container["command"], {"name": "PYTHONUNBUFFERED", "value": "1"}  # PyTorchJobs get it, too
    spec["trainer"] = {
        "image": container["image"],
        "command": words[:MAX_ITEMS],
        **({"args": words[MAX_ITEMS:]} if len(words) > MAX_ITEMS else {}),  # Kubernetes joins the two
        "numNodes": cluster.nodes,
        "numProcPerNode": job.processes_per_node,
        "resourcesPerNode": container["resources"],
        "env": _merged([buffering, *container["env"]]),
    }
    left_out = {"containers", "automountServiceAccountToken", "enableServiceLinks"}  # not allowed in a patch
    if cluster.scheduler == "kueue":
        # Kueue up to 0.19 has Trainer 2.2's types, and drops what 2.3 added when it admits the job. Trainer would then
        # change the template of the JobSet, which is immutable, and the job would never start.
        left_out.add("terminationGracePeriodSeconds")
    patch = {name: value for name, value in pod["spec"].items() if name not in left_out}
    patch["containers"] = [
        {"name": "node", "securityContext": container["securityContext"], "volumeMounts": container["volumeMounts"]}
    ]
    node = {"name": "node", "template": {"spec": {"template": {"metadata": pod["metadata"], "spec": patch}}}}
    jobset = {"spec": {"replicatedJobs": [node]}}
    spec["runtimePatches"] = [{"manager": "maskrcnn/launcher", "trainingRuntimeSpec": {"template": jobset}}]
    return manifest


def _name(manifest: Manifest, job: Description) -> None:
    metadata = manifest["metadata"]
    metadata |= {"name": job.name, "namespace": job.cluster.namespace}
    if job.cluster.scheduler == "kueue":
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = job.cluster.queue
    metadata["annotations"] = {RUN_ID: job.run_id, DIGEST: digest(job)}


def digest(job: Description) -> str:
    """Digest of a job, to distinguish jobs of one name: everything but the launcher's time limits."""
    waits = {"context", "pending_timeout_s", "stuck_timeout_s", "run_timeout_s", "api_timeout_s", "poll_s"}
    cluster = job.cluster.model_dump(mode="json", exclude=waits) | {"api": job.cluster.job_api}
    identity = [job.name, job.command, job.env, cluster]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def pod_template(job: Description) -> Manifest:
    """Make the pod of a node; a TrainJob's runtime adds to it."""
    cluster, pod = job.cluster, _template("pod")
    spec, resources = pod["spec"], {"cpu": canonical(str(cluster.cpu)), "memory": cluster.memory}
    if cluster.gpus_per_node:
        resources["nvidia.com/gpu"] = canonical(str(cluster.gpus_per_node))
    container = spec["containers"][0]
    container |= {
        "image": cluster.image,
        "command": list(job.command),
        "workingDir": cluster.working_dir,
        "resources": {"requests": resources, "limits": dict(resources)},
    }
    container["env"] = _merged([*container["env"], *literal_env(job)])
    spec |= {"serviceAccountName": cluster.service_account, "terminationGracePeriodSeconds": cluster.grace_s}
    next(v for v in spec["volumes"] if v["name"] == "shm")["emptyDir"]["sizeLimit"] = cluster.shm
    for number, volume in enumerate(cluster.volumes):
        claim, path, *read_only = volume.split(":")
        # Go clients leave `false` out. Kueue's update of a TrainJob would so change its volumes, which are immutable.
        mode = {"readOnly": True} if read_only else {}
        spec["volumes"].append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim, **mode}})
        container["volumeMounts"].append({"name": f"volume-{number}", "mountPath": path, **mode})
    _place(spec, job)
    return pod


def _merged(variables: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Variables without duplicates, which the API server refuses; the last of a name applies."""
    return list({variable["name"]: variable for variable in variables}.values())


def _place(spec: Manifest, job: Description) -> None:
    """Set node selector, tolerations and pull secret, if configured."""
    cluster = job.cluster
    if cluster.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": cluster.image_pull_secret}]
    if cluster.node_selector:
        spec["nodeSelector"] = dict(label.split("=", 1) for label in cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [toleration(word) for word in cluster.tolerations]
