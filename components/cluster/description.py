"""Description of a training job, independent of the API that runs it: name, command, environment, section `cluster`.

    job = describe(config, "shapes_demo-seed0")

The command has every value that training reads, so the pods need no parameter file but the image's. Errors that would
fail a pod after hours in a queue are found here: folders on no volume, a batch that the processes cannot share.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ruamel.yaml import YAML, YAMLError

from components.config import ClusterConfig, Config
from components.params import ConfigError

SECTIONS = ("data", "model", "train", "evaluate", "tracking")  # sections that `components.train` reads
MAX_NAME = 50  # leaves room in a label of 63 for `-worker-1234` of pods and services
# Variables set by torchrun and the operators; a TrainJob's `trainer.env` refuses some, a PyTorchJob's are overwritten.
RESERVED = re.compile(r"PET_\w+|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MLFLOW_(TRACKING_URI|RUN_ID)")


@dataclass(frozen=True)
class Description:
    """One training job, independent of PyTorchJob or TrainJob."""

    name: str
    run_id: str
    command: tuple[str, ...]
    env: tuple[tuple[str, str], ...]  # without secrets
    cluster: ClusterConfig

    @property
    def processes_per_node(self) -> int:
        """Processes per node: as configured, else one per GPU, or one on CPUs."""
        return _processes_per_node(self.cluster)


def describe(config: Config, run_id: str, *, mlflow_run_id: str = "", skip_test: bool = False) -> Description:
    """Describe the job that trains `config`; its pods get the experiment that this process's environment sets.

    Args:
        run_id: the same id gives the same name, so a second launcher finds the first one's job.
        mlflow_run_id: the MLflow run to log to; if empty, that of `train.output_dir` is continued or started.
        skip_test: do not evaluate after training.

    Raises:
        ConfigError: if the pods could not train with this configuration.
    """
    cluster = config.cluster
    _check_folders(config)
    _check_batch(config)
    _check_env(cluster)
    _check_tracking(config)
    env = []
    if config.tracking.enabled:
        env = [("MLFLOW_TRACKING_URI", cluster.tracking_uri), *experiment_variables(cluster).items()]
    if mlflow_run_id:
        env.append(("MLFLOW_RUN_ID", mlflow_run_id))
    # torchrun kills its processes this long after SIGTERM (default: 30 s); the remaining 10 s are for torchrun itself.
    env.append(("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(cluster.grace_s - 10)))
    env += [(name, value) for name, _, value in (word.partition("=") for word in cluster.env)]
    return Description(job_name(run_id), run_id, _command(config, skip_test), tuple(env), cluster)


def experiment_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Variables by which this process's environment sets MLflow's experiment; none if `cluster` sets it for pods."""
    own = {word.partition("=")[0] for word in (*cluster.env, *cluster.secrets)}
    names = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
    return {} if own & set(names) else {name: os.environ[name] for name in names if os.environ.get(name)}


def job_name(run_id: str) -> str:
    """Make a DNS-1035 label of a run id: legible, at most MAX_NAME long, and unique.

    Raises:
        ConfigError: if the id is empty.
    """
    if not run_id:
        raise ConfigError("--run-id: must not be empty; it names the job")
    name = "maskrcnn-" + re.sub(r"[^a-z0-9]+", "-", run_id.lower()).strip("-")
    if name == f"maskrcnn-{run_id}" and len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9].rstrip('-')}-{digest}"


def default_run_id(config: Config) -> str:
    """Run id if none is given: the folder's name and a digest of the training's configuration."""
    learnt = config.model_dump(mode="json", include={"data", "model", "train", "evaluate"})
    digest = hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.train.output_dir.name}-{digest}"


def _command(config: Config, skip_test: bool) -> tuple[str, ...]:
    """Command of torchrun, which reads nodes, processes and rendezvous from the operator's PET_… variables."""
    values = [
        f"{name}={_as_yaml(value)}"
        for name, value in config.flat().items()
        # The pods read the URI from the environment, so a password in it stays out of the manifest.
        if name.split(".")[0] in SECTIONS and name != "tracking.uri"
    ]
    options = ["--skip-test"] if skip_test else []
    # tini: as PID 1, torchrun would lose a signal that comes during its imports.
    words = ("tini", "--", "python", "-m", "components.launch", "-m", "components.train", *options, *values)
    return tuple(word.replace("$(", "$$(") for word in words)  # Kubernetes would expand $(NAME)


def _as_yaml(value: Any) -> str:
    """Format a value for an override; text is quoted only if YAML would read it as another type."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        is_plain = not value.strip() or YAML(typ="safe", pure=True).load(value) == value
    except YAMLError:
        is_plain = False
    return value if is_plain else json.dumps(value)


def _check_folders(config: Config) -> None:
    require_volume("data.prepared_dir", config.data.prepared_dir, config.cluster)
    key, path = "train.output_dir", config.train.output_dir
    mount = require_volume(key, path, config.cluster)
    if mount.endswith(":ro"):
        raise ConfigError(f"{key}: must be writable, got {path} on the read-only volume {mount} of cluster.volumes")


def require_volume(key: str, path: Path, cluster: ClusterConfig) -> str:
    """Find the entry of `cluster.volumes` that contains a path in pods; of several, the innermost.

    Args:
        key: name of the path in the configuration, for errors.

    Raises:
        ConfigError: if no volume contains it.
    """
    place = PurePosixPath(cluster.working_dir) / path.as_posix()
    under = [volume for volume in cluster.volumes if place.is_relative_to(volume.split(":")[1])]
    if not under:
        raise ConfigError(
            f"{key}: must lie on a volume, got {path} in {cluster.working_dir}; mount a claim there with "
            "cluster.volumes, "
            f"now {list(cluster.volumes)}"
        )
    return max(under, key=lambda volume: len(volume.split(":")[1]))


def _check_batch(config: Config) -> None:
    cluster, train = config.cluster, config.train
    per_node = _processes_per_node(cluster)
    for nodes in range(cluster.min_nodes or cluster.nodes, cluster.nodes + 1):
        if train.micro_batch_size % (nodes * per_node):
            raise ConfigError(
                f"train.batch_size: {train.batch_size} images in {train.accumulation_steps} micro-batches must be a "
                "multiple of the number "
                f"of processes, got {nodes * per_node}: {per_node} on each of {nodes} nodes (cluster.nodes, "
                "cluster.min_nodes)"
            )


def _processes_per_node(cluster: ClusterConfig) -> int:
    return cluster.processes_per_node or cluster.gpus_per_node or 1


def _check_env(cluster: ClusterConfig) -> None:
    names = [word.partition("=")[0] for word in (*cluster.env, *cluster.secrets)]
    for name in names:
        if RESERVED.fullmatch(name):
            raise ConfigError(
                f"cluster.env: must not set {name}, which the launcher, the operator or torchrun sets; remove it"
            )
        if names.count(name) > 1:
            raise ConfigError(f"cluster.env and cluster.secrets: must set a variable only once, got {name} twice")


def _check_tracking(config: Config) -> None:
    uri = config.cluster.tracking_uri
    if not config.tracking.enabled:
        return
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"cluster.tracking_uri: must be a server that pods can reach, http(s)://…, got {uri!r}; or set "
            "tracking.enabled=false"
        )
    if parts.password is not None:
        raise ConfigError(
            "cluster.tracking_uri: must not contain a password; put it into a secret and refer to that in "
            "cluster.secrets=[MLFLOW_TRACKING_USERNAME=SECRET/KEY, MLFLOW_TRACKING_PASSWORD=SECRET/KEY]"
        )


def literal_env(job: Description) -> list[Mapping[str, object]]:
    """Environment of the pods in the API's format; secrets by reference."""
    # Go clients leave an empty value out, and thereby change a job that they update; so it is not sent.
    env: list[Mapping[str, object]] = [{"name": name} | ({"value": value} if value else {}) for name, value in job.env]
    for name, secret, key in map(secret_reference, job.cluster.secrets):
        env.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return env


def secret_reference(word: str) -> tuple[str, str, str]:
    """Parts of an entry of `cluster.secrets`, NAME=SECRET/KEY: variable, secret, key."""
    name, _, reference = word.partition("=")
    secret, _, key = reference.partition("/")
    return name, secret, key


def toleration(word: str) -> dict[str, str]:
    """An entry of `cluster.tolerations`, KEY:EFFECT or KEY=VALUE:EFFECT, in the API's format."""
    taint, _, effect = word.rpartition(":")
    key, equals, value = taint.partition("=")
    rule = {"key": key, "operator": "Equal" if equals else "Exists", "effect": effect}
    return rule | ({"value": value} if value else {})  # none if it is empty, as in `literal_env`
