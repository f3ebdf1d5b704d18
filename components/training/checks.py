"""Checks of configuration and data before the network is built, and the file that model.weights stands for."""

from pathlib import Path

from components.config import Config
from components.params import ConfigError
from components.runs.result import checkpoint_at
from model.config import TORCHVISIONS_BODIES, TORCHVISIONS_DETECTORS, ModelConfig
from model.data.index import CocoIndex
from model.distributed import world_size
from model.engine.pointers import LAST
from model.errors import UserError


def check_learnable(config: Config, index: CocoIndex) -> None:
    """Check that the configuration and the data can train.

    Raises:
        ConfigError: if frozen norms or frozen stages would keep random values, or masks for copy-paste are missing.
        UserError: if no image has an instance to learn from, instances lack the masks that model.task needs, or the
            data were prepared otherwise than `config` says.
    """
    model = config.model
    for key, norm, without in (
        ("norm", model.norm if model.is_resnet else "layer_norm", ("none",)),
        ("head_norm", model.norm_of_heads, ("none", *TORCHVISIONS_BODIES)),
    ):
        if norm == "frozen_batch_norm" and model.weights in without:
            raise ConfigError(
                f"model.{key}: frozen_batch_norm needs pre-trained weights with statistics for it, got "
                f"model.weights={model.weights}; set model.{key} to batch_norm, sync_batch_norm or group_norm, or "
                "model.weights to those of a whole network"
            )
    if model.weights == "none" and model.frozen_stages:
        raise ConfigError(
            f"model.freeze_stages: must be 0 with model.weights=none, got {model.frozen_stages}; frozen random "
            "filters would never learn"
        )
    if not index.has_instances.any():
        raise UserError(
            f"{config.data.prepared_dir}: a training image must have an instance that is not a crowd, but none has; "
            "add annotations"
        )
    index.require_masks(model.task)
    if config.data.augment.copy_paste and not index.has_masks:
        raise ConfigError(
            f"data.augment.copy_paste: needs a mask for each instance, but some of {config.data.prepared_dir} have a "
            f"box alone; set it to 0, got {config.data.augment.copy_paste:g}, or add segmentations and run `maskrcnn "
            "prepare model.task=mask`"
        )
    index.require_pixel_range(config.data.pixel_range)
    index.require_values(config.data)


def check_annotations(config: Config) -> None:
    """Check, for a new run, that the annotations of what it learns from and is scored by are those of `prepare`.

    Raises:
        UserError: if they have changed.
    """
    for split in sorted({"train", config.evaluate.split}):
        CocoIndex.open(config.data.prepared_dir, split).require_annotations(config.data)


def check_divisible(config: Config) -> None:
    """Check that the processes can share a batch evenly.

    Raises:
        ConfigError: if they cannot.
    """
    train, processes = config.train, world_size()
    if train.micro_batch_size % processes:
        raise ConfigError(
            f"train.batch_size: {train.batch_size} images in {train.accumulation_steps} micro-batches must be a "
            "multiple of the number of "
            f"processes, got {processes}; set train.batch_size to {train.accumulation_steps * processes} or a "
            "multiple of it"
        )


def with_checkpoint(model: ModelConfig) -> ModelConfig:
    """The section with a file as model.weights, if that names a run's folder, or last_checkpoint or best_checkpoint
    there.

    Raises:
        CheckpointError: if the run has no such checkpoint, or it cannot be read.
        ConfigError: if the config.yaml of the run cannot be read.
    """
    path = Path(model.weights)
    is_published = model.weights in ("none", *TORCHVISIONS_BODIES, *TORCHVISIONS_DETECTORS)  # a folder may be called so
    if is_published or (path.is_dir() and not (path / LAST).is_file()):
        return model
    return model.model_copy(update={"weights": str(checkpoint_at(path))})
