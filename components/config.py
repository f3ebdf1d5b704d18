"""The sections of `params.yaml` and their defaults; `components/params.py` reads the file.

`model/data_config.py` has the section `data`; `model/config.py` `model`, `train` and `evaluate`.
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from model.config import DataConfig, EvaluateConfig, Folder, Fraction, ModelConfig, Section, Seed, TrainConfig

MIN_TILE_PX = 32  # smaller tiles show no object, and a photo would have millions of them


def _no_tiles_or_large_ones(tile_px: int) -> int:
    if 0 != tile_px < MIN_TILE_PX:
        raise ValueError(f"must be 0, for no tiles, or at least {MIN_TILE_PX}")
    return tile_px


def _fraction_or_best(threshold: Any) -> Any:
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold != "best" and not (is_number and 0 <= threshold <= 1):
        raise ValueError(f"must be from 0 to 1, or best, got {threshold!r}")
    return threshold


class PredictConfig(Section):
    """Settings of `maskrcnn predict`: how it reads images and draws on them."""

    # Lowest score of drawn and written detections. best: each class's own, as `maskrcnn evaluate` found it.
    score_threshold: Annotated[float | Literal["best"], BeforeValidator(_fraction_or_best)] = 0.5
    classes: tuple[str, ...] = ()  # only objects of these classes; empty: all
    # Masks in predictions.json: COCO RLE; polygons, exact along the pixels' edges; or a PNG file for each object.
    masks: Literal["rle", "polygons", "png"] = "rle"
    crop: bool = False  # write each object's part of the image, transparent around its mask
    # Side of tiles for large images, each predicted as an image of its own. 0: no tiles.
    tile_px: Annotated[int, AfterValidator(_no_tiles_or_large_ones)] = 0
    tile_whole: bool = True  # with tiles, the whole image is predicted, too, for objects larger than a tile
    tile_overlap: Annotated[float, Field(gt=0.0, le=0.9)] = 0.2  # part of a tile's side; larger objects may be cut
    # Precision of the network's products; trained: that of its training.
    dtype: Literal["trained", "float32", "tf32", "bfloat16", "float16"] = "trained"
    batch_size: PositiveInt = 4
    images: PositiveInt = 8  # taken from the val split if no image is named (the DVC stage)


BenchmarkMode = Literal["train", "inference", "phases", "scaling", "loader", "evaluator"]


class BenchmarkConfig(Section):
    """Settings of `maskrcnn benchmark`: what it measures."""

    modes: tuple[BenchmarkMode, ...] = ("train", "inference")
    batch_sizes: tuple[PositiveInt, ...] = (2,)
    dtypes: tuple[Literal["float32", "tf32", "bfloat16", "float16"], ...] = ("float32",)
    warmup: NonNegativeInt = 2
    steps: PositiveInt = 10  # timed: each, or as many groups of steps_per_wait
    steps_per_wait: PositiveInt = 1  # more: steps follow one another without a wait for the device, as in training
    memory: bool = True  # peak memory of several networks, each measured in a process of its own
    height_px: NonNegativeInt = 0  # height of the synthetic images; 0: the first bucket
    width_px: NonNegativeInt = 0
    torchvision: bool = True  # time torchvision's model in the same run
    evaluator_images: PositiveInt = 5000  # scored by boxes; as many as COCO's val split has
    evaluator_mask_images: PositiveInt = 500  # scored by masks
    evaluator_detections: PositiveInt = 100  # an image
    loader_images: PositiveInt = 100  # generated for the mode `loader`
    processes: tuple[PositiveInt, ...] = (1, 2)  # for the mode `scaling`; each divides the largest


class StabilityConfig(Section):
    """Settings of `maskrcnn stability`: the same training from several seeds."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)  # train.seed of each run
    parallel: PositiveInt = (
        1  # seeds trained at a time, each in its own process; GPUs and cores are shared out among them
    )
    output_dir: Folder = Path("runs/stability")  # the table; and seed_<seed>/, a run folder each

    @model_validator(mode="after")
    def _seeds_differ(self) -> "StabilityConfig":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {list(self.seeds)}")
        return self


class TrackingConfig(Section):
    """MLflow. `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_EXPERIMENT_ID` and `MLFLOW_RUN_ID` go before."""

    enabled: bool = True
    uri: str = "sqlite:///mlflow.db"
    experiment: Annotated[str, Field(min_length=1)] = "maskrcnn"
    run_name: str = ""  # empty: the name of train.output_dir
    log_checkpoints: bool = True  # the final checkpoint as an artifact
    system_metrics_s: NonNegativeFloat = (
        10.0  # between samples of processor, memory, disk, network and GPUs; 0 takes none
    )


class RegistryConfig(Section):
    """Settings of `maskrcnn register`: which models enter MLflow's registry, and under what name."""

    model_name: Annotated[str, Field(pattern=r"^[^/:]+$")] = "maskrcnn"
    min_bbox_ap: Fraction = 0.0  # a model of less is not registered
    min_segm_ap: Fraction = 0.0


_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"  # DNS-1123, as namespaces, secrets and claims are named
_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
# Kubernetes' units of bytes
_UNITS = {"": 1, **{unit: 1000**n for n, unit in enumerate("kMGTPE", 1)}}
_BINARY_UNITS = {"": 1, **{f"{unit}i": 1024**n for n, unit in enumerate("KMGTPE", 1)}}


def canonical(quantity: str) -> str:
    """Write bytes, or a number, in the one form that Kubernetes' Go clients give them: 1024Mi is 1Gi.

    A controller's update of a job rewrites quantities so, and is refused where the field is immutable.

    Raises:
        ValueError: if it is not a positive whole number of bytes.
    """
    amount, units = _bytes(quantity), _BINARY_UNITS if quantity.endswith("i") else _UNITS
    unit = max((unit for unit in units if amount % units[unit] == 0), key=units.__getitem__)
    return f"{amount // units[unit]}{unit}"


def _bytes(quantity: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([A-Za-z]{0,2})", quantity, flags=re.ASCII)
    unit = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
    amount = Decimal(match[1]) * unit if match and unit else Decimal(0)
    if not 0 < amount < 2**63 or amount % 1:
        raise ValueError(f"must be whole bytes with a unit of Kubernetes, such as 512Mi or 32Gi, got {quantity!r}")
    return int(amount)


def _cores(value: Any) -> Any:
    """Whole cores from a quantity: 2000m is 2."""
    if isinstance(value, str) and re.fullmatch("[0-9]+m", value):
        cores, rest = divmod(int(value[:-1]), 1000)
        if rest:
            raise ValueError(f"must be whole cores, since requests equal limits and workers are counted, got {value}")
        return cores
    return value


Label = Annotated[str, Field(pattern=rf"^{_LABEL}$")]
LabelOrNone = Annotated[str, Field(pattern=rf"^({_LABEL})?$")]
Cores = Annotated[PositiveInt, BeforeValidator(_cores)]
Memory = Annotated[str, AfterValidator(canonical)]
VolumeMount = Annotated[str, Field(pattern=rf"^{_LABEL}:/[^:]*(:ro)?$")]
EnvValue = Annotated[str, Field(pattern=rf"^{_VARIABLE}=")]
EnvSecret = Annotated[str, Field(pattern=rf"^{_VARIABLE}={_LABEL}/[-._A-Za-z0-9]+$")]
# Labels of nodes: a name, of a DNS domain maybe, and a value.
_NAME = r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_KEY = rf"([a-z0-9]([-.a-z0-9]{{0,251}}[a-z0-9])?/)?{_NAME}"
NodeLabel = Annotated[str, Field(pattern=rf"^{_KEY}=({_NAME})?$")]
Toleration = Annotated[str, Field(pattern=rf"^{_KEY}(=({_NAME})?)?:(NoSchedule|PreferNoSchedule|NoExecute)$")]
# Reference of an image: registry, path, tag, digest. Source: github.com/distribution/reference.
_HOST = r"([A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(:[0-9]+)?"
_PART = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_VERSION = r"(:[A-Za-z0-9_][-.A-Za-z0-9_]{0,127})?(@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?"
Image = Annotated[str, Field(pattern=rf"^(({_HOST}/)?{_PART}(/{_PART})*{_VERSION})?$")]


class ClusterConfig(Section):
    """Settings of `maskrcnn pytorchjob`: training on Kubernetes. Requests equal limits: nothing is overcommitted."""

    # kubeflow.org/v1, or Kubeflow Trainer's v1alpha1. auto: trainjob with kueue, whose support of PyTorchJobs is
    # ending; otherwise pytorchjob.
    api: Literal["auto", "pytorchjob", "trainjob"] = "auto"
    # For a PyTorchJob. In `master_worker` the operator adds an init container, which the pod-security level
    # "restricted" refuses.
    form: Literal["elastic", "master_worker"] = "elastic"
    runtime: Label = "torch-distributed"  # the ClusterTrainingRuntime that a TrainJob refers to
    context: str = ""  # kubeconfig context; empty: the pod's own cluster, or the current context
    namespace: Label = "maskrcnn"
    service_account: Label = "trainer"
    image: Image = ""
    image_pull_secret: LabelOrNone = ""
    working_dir: Annotated[str, Field(pattern="^/")] = "/workspace"  # relative paths of `data` and `train` start here
    nodes: PositiveInt = 1
    min_nodes: NonNegativeInt = 0  # fewest nodes with which an elastic PyTorchJob continues; 0: all
    gpus_per_node: NonNegativeInt = 1  # 0 trains on CPUs
    processes_per_node: NonNegativeInt = 0  # 0: one for each GPU, or one
    cpu: Cores = 8  # a node
    memory: Memory = "32Gi"  # a node, with /dev/shm and the batches of loader workers
    shm: Memory = "8Gi"  # /dev/shm of a node, which NCCL uses
    volumes: tuple[VolumeMount, ...] = (
        "data:/workspace/data",
        "runs:/workspace/runs",
    )  # claim:/path, or claim:/path:ro
    env: tuple[EnvValue, ...] = (
        "TORCH_HOME=/workspace/data/torch",
    )  # NAME=value, nothing secret; where weights are fetched to
    secrets: tuple[EnvSecret, ...] = ()  # NAME=secret/key
    tracking_uri: str = "http://mlflow:5000"  # MLflow as the pods reach it
    scheduler: Literal["default", "kueue", "volcano"] = "default"
    queue: LabelOrNone = ""
    node_selector: tuple[NodeLabel, ...] = ()  # label=value
    tolerations: tuple[Toleration, ...] = ()  # key:Effect, or key=value:Effect
    restarts: NonNegativeInt = 3  # restarts per node before the job fails; the launcher counts those of a TrainJob
    grace_s: Annotated[int, Field(ge=30)] = 120  # from SIGTERM to SIGKILL: a checkpoint must be written in it
    ttl_s: PositiveInt = 86400  # time for which a finished PyTorchJob is kept
    pending_timeout_s: PositiveInt = 3600  # until the first pod runs; in a queue too, also later
    stuck_timeout_s: PositiveInt = 300  # in which an image or a secret that cannot be had must turn up
    run_timeout_s: PositiveInt = 604800  # from there to the end, without the time in a queue
    api_timeout_s: PositiveInt = 300  # without an answer of the API server
    poll_s: PositiveInt = 15  # between looks at the job, should watching it tell nothing

    @model_validator(mode="after")
    def _parts_agree(self) -> "ClusterConfig":
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes must be at most nodes, got {self.min_nodes} > {self.nodes}")
        if _bytes(self.shm) >= _bytes(self.memory):
            raise ValueError(f"shm must be less than memory, which holds it, got {self.shm} and {self.memory}")
        elastic = self.job_api == "pytorchjob" and self.form == "elastic"
        with_api = f"api: {self.api}{' and scheduler: kueue' if self.api == 'auto' else ''}"
        if self.min_nodes and not elastic:
            raise ValueError(
                "min_nodes must be 0 but for an elastic PyTorchJob; others have a fixed number of nodes; got "
                f"{self.min_nodes} with form: {self.form}, {with_api}"
            )
        if self.job_api == "trainjob" and self.form != "elastic":
            raise ValueError(
                f"form must be elastic with {with_api}, since a TrainJob has no other; got {self.form}; "
                "api: pytorchjob has it"
            )
        if self.api == "trainjob" and self.scheduler == "volcano":
            raise ValueError("scheduler must not be volcano with api: trainjob, whose runtime decides on gangs")
        if (self.scheduler == "default") == bool(self.queue):
            raise ValueError(f"queue must be named for kueue and volcano, and for them alone, got {self.queue!r}")
        return self

    @property
    def job_api(self) -> Literal["pytorchjob", "trainjob"]:
        """API of the job: `api`, with `auto` resolved."""
        if self.api == "auto":
            return "trainjob" if self.scheduler == "kueue" else "pytorchjob"
        return self.api


class Config(Section):
    """The whole configuration of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    predict: PredictConfig = PredictConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    stability: StabilityConfig = StabilityConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _patience_is_informed(self) -> "Config":
        if self.train.patience and not self.evaluate.every_epoch:
            raise ValueError(
                f"train.patience must be 0 without evaluate.every_epoch, whose scores it needs, got "
                f"{self.train.patience}; set evaluate.every_epoch=true"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted name, as MLflow's parameters have it."""
        return flatten(self.model_dump(mode="json"))

    def loading(self) -> DataConfig:
        """Section `data` as the loader gets it: its time limit ends before that of the ranks that wait meanwhile."""
        return self.data.model_copy(update={"timeout_s": min(self.data.timeout_s, self.train.timeout_s / 2)})


# Keys of earlier versions, which checkpoints, run folders and studies may hold, and what they are called now.
RENAMED = {"evaluate.min_bbox_ap": "evaluate.target_bbox_ap", "evaluate.min_segm_ap": "evaluate.target_segm_ap"}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree of sections, each under its dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
