"""Placement of a pipeline's steps: in pods of a cluster, as `cluster` says, or as processes of this machine.

Sources: kfp-kubernetes 2.17; the names, volumes and accounts are those of k8s/base.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components.cluster.description import experiment_variables, secret_reference, toleration
from components.config import ClusterConfig, Config
from components.kubeflow import steps
from components.kubeflow.context import COMPILED, compiled_values

# NetworkPolicies go by these: `name` opens MLflow, `component` the API server, which training is launched through.
LABELS = {"app.kubernetes.io/name": "maskrcnn", "app.kubernetes.io/component": "launcher"}
_USER = 1000  # the image's user; k8s/job/pod.yaml has the same
_ON_ACCELERATOR = {"evaluate", "predict", "benchmark"}  # training has pods of its own
_LIGHT = {"train", "seeds", "finish"}  # these wait, or read a little
# Reserve and limit of a light step. While `train` waits for its job, a reserved core would be idle, and on a
# small cluster missing for the job itself.
_LIGHT_CPU, _LIGHT_MEMORY = ("100m", "1"), ("1Gi", "4Gi")
# The server decides what is retried, by the retryPolicy that it adds to these numbers: with the manifests of Kubeflow
# Pipelines 2.17 OnError, which is a pod that was deleted or whose node was lost; elsewhere OnFailure, which is an error
# of the step itself, or Always. Downloads get more tries.
_RETRIES = {"download": 3}


@dataclass(frozen=True)
class Placement:
    """Translation of steps into pods or local processes."""

    train: Callable[..., PipelineTask]
    parallel: int  # seeds of a study at a time
    config: Config | None  # configuration of the pods; None: this machine

    def place(self, step: str, task: PipelineTask) -> PipelineTask:
        """Prepare one task for where it will run; `step` is its component's name."""
        # Every step reads or writes a volume or MLflow, unseen by a cache. Stages skip by themselves what is done.
        task.set_caching_options(False)
        return task if self.config is None else _in_pod(step, task, self.config)


def on_cluster(config: Config) -> Placement:
    """Steps in pods; training as the job of `cluster.api`."""
    return Placement(steps.train, config.stability.parallel, config)


def on_this_machine(config: Config) -> Placement:
    """Steps as processes, training in `train.processes` of them."""
    return Placement(steps.train_here, config.stability.parallel, None)


def _in_pod(step: str, task: PipelineTask, config: Config) -> PipelineTask:
    cluster = config.cluster
    task.set_container_image(cluster.image).set_display_name(step)
    if step != "finish":  # kfp tries an exit handler once
        task.set_retry(_RETRIES.get(step, 1), backoff_duration="30s", backoff_factor=2.0)
    for label, value in LABELS.items():
        kubernetes.add_pod_label(task, label, value)
    kubernetes.set_security_context(task, run_as_user=_USER, run_as_group=_USER, run_as_non_root=True)
    if step != "train":  # it has limits of its own, for each wait in a queue anew, and ends its job at one
        kubernetes.set_timeout(task, cluster.pending_timeout_s + cluster.run_timeout_s)
    if cluster.image_pull_secret:
        kubernetes.set_image_pull_secrets(task, [cluster.image_pull_secret])
    _set_resources(step, task, cluster)
    _set_environment(task, config)
    for volume in cluster.volumes:
        claim, path, *_ = volume.split(":")
        kubernetes.mount_pvc(task, pvc_name=claim, mount_path=path)
    return task


def _set_resources(step: str, task: PipelineTask, cluster: ClusterConfig) -> None:
    own = (str(cluster.cpu),) * 2, (cluster.memory,) * 2
    cpu, memory = (_LIGHT_CPU, _LIGHT_MEMORY) if step in _LIGHT else own
    task.set_cpu_request(cpu[0]).set_cpu_limit(cpu[1]).set_memory_request(memory[0]).set_memory_limit(memory[1])
    if step in _LIGHT:
        return
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=cluster.shm)
    if step in _ON_ACCELERATOR and cluster.gpus_per_node:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1)
    for label in cluster.node_selector:
        kubernetes.add_node_selector(task, *label.split("=", 1))
    for word in cluster.tolerations:
        options: dict[str, Any] = {**toleration(word)}
        kubernetes.add_toleration(task, **options)


def _set_environment(task: PipelineTask, config: Config) -> None:
    cluster = config.cluster
    task.set_env_variable(COMPILED, compiled_values(config))
    task.set_env_variable("HOME", "/tmp")  # caches of libraries go where writing is allowed
    task.set_env_variable("MLFLOW_TRACKING_URI", cluster.tracking_uri)
    for name, value in experiment_variables(cluster).items():
        task.set_env_variable(name, value)
    for word in cluster.env:
        task.set_env_variable(*word.split("=", 1))
    for name, secret, key in map(secret_reference, cluster.secrets):
        kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env={key: name})
