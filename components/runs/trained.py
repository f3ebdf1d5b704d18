"""A trained model as the stages after training take it up: weights, and the configuration they were trained with."""

from dataclasses import dataclass
from pathlib import Path

from components.config import Config
from components.params import config_from_dict
from components.runs.result import named_checkpoint
from model.data.index import CocoIndex
from model.distributed import pick_device
from model.engine.checkpoint import LoadedModel, load_model
from model.engine.pointers import LAST
from model.errors import UserError
from model.files import real


@dataclass(frozen=True)
class Trained:
    """A checkpoint and how to use it."""

    loaded: LoadedModel
    config: Config  # the training's, but data paths, data loading and tracking as configured now
    name: str  # the checkpoint's path, below the run's folder where it lies there

    @classmethod
    def of(cls, loaded: LoadedModel, config: Config, name: str) -> "Trained":
        """Take up a loaded model, with data paths, data loading and tracking of a configuration."""
        trained = config_from_dict(loaded.config, str(loaded.path))
        current = config.loading().model_dump(include={"raw_dir", "prepared_dir", "workers", "timeout_s"})
        data = trained.data.model_copy(update=current)
        return cls(loaded, trained.model_copy(update={"data": data, "tracking": config.tracking}), name)


def load_trained(config: Config, checkpoint: str) -> Trained:
    """Load a model onto `train.device`; network and image sizes are the checkpoint's own.

    Args:
        checkpoint: `last` or `best` of `train.output_dir`, or the path of a checkpoint, a run's folder or a pointer.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    run_dir = config.train.output_dir
    path = named_checkpoint(run_dir, checkpoint)
    loaded = load_model(path, pick_device(config.train.device))
    name = path.relative_to(run_dir) if path.is_relative_to(run_dir) else path
    return Trained.of(loaded, config, name.as_posix())


def run_around(folder: Path, run_dir: Path) -> Path:
    """The run's folder that a folder lies in, to be locked: `run_dir`, or another that has checkpoints; else itself."""
    folder, own = real(folder), real(run_dir)
    around = (parent for parent in (folder, *folder.parents) if parent == own or (parent / LAST).is_file())
    return next(around, folder)


def open_split(trained: Trained, split: str) -> CocoIndex:
    """A prepared split of the classes that the model knows.

    Raises:
        UserError: if it is not prepared, of other classes, or without the masks that model.task needs.
    """
    index = CocoIndex.open(trained.config.data.prepared_dir, split, trained.config.data.timeout_s)
    known, found = trained.loaded.category_ids, index.category_ids
    if known != found:
        raise UserError(
            f"{trained.config.data.prepared_dir}: must hold the {len(known)} classes that {trained.loaded.path} was "
            "trained on "
            f"(ids {known[:5]}…), got {len(found)} (ids {found[:5]}…); set data.prepared_dir to that data set"
        )
    index.require_masks(trained.config.model.task)
    index.require_pixel_range(trained.config.data.pixel_range)
    return index
