"""The network to predict with, by the word of `--weights`: no parameter file and no run's folder is needed.

coco | coco_v2 (torchvision's, with COCO's 80 classes) | a checkpoint | the weights of a detector | a run's folder, or
last_checkpoint or best_checkpoint there | models:/NAME@ALIAS or models:/NAME/VERSION of MLflow's registry
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from components.config import Config
from components.runs.result import checkpoint_at
from components.runs.thresholds import Thresholds, best_thresholds
from model.config import TORCHVISIONS_DETECTORS
from model.engine.pointers import POINTERS
from model.errors import UserError

if TYPE_CHECKING:
    from components.runs.trained import Trained

_REGISTRY = "models:/"
_SHOWN = 3  # names of classes in an error


@dataclass(frozen=True)
class Network:
    """A network, and the thresholds that were registered with it."""

    trained: "Trained"
    registered: Thresholds | None = None
    is_checkpoint: bool = True

    def lowest_scores(self, threshold: float | Literal["best"], classes: Sequence[str] = ()) -> dict[str, float]:
        """The lowest score of each wanted class: a threshold for all, or the class's own with the highest F1.

        Args:
            classes: names of the wanted classes; empty: all.

        Raises:
            UserError: if the network does not know a class, or its best thresholds are not known.
        """
        from model.inference.predictor import Predictor

        predictor = Predictor.of(self.trained.loaded)
        predictor.require_classes(classes)
        wanted = classes or predictor.class_names
        if threshold != "best":
            return dict.fromkeys(wanted, threshold)
        best = self._thresholds()
        return {name: best.per_class.get(name, best.of_all) for name in wanted}

    def caution(self, threshold: float | Literal["best"], *, in_tiles: bool) -> str:
        """A sentence if best thresholds are used for scores made otherwise than those they were found in, or nothing.

        Raises:
            UserError: if they are not known.
        """
        return self._thresholds().caution(in_tiles=in_tiles) if threshold == "best" else ""

    def _thresholds(self) -> Thresholds:
        """The thresholds that `maskrcnn evaluate` found.

        Raises:
            UserError: if `maskrcnn evaluate` has not found them.
        """
        if self.registered is not None:
            return self.registered
        if self.trained.name.startswith(_REGISTRY):
            raise UserError(
                f"--threshold best: must be used with a version that has thresholds, but {self.trained.name} was "
                "registered before `maskrcnn evaluate` had found any; give a number, or evaluate its run and use that "
                "(--weights runs/NAME)"
            )
        if not self.is_checkpoint:
            raise UserError(
                "--threshold best: must be used with a checkpoint that `maskrcnn evaluate` has scored, or a model that "
                f"was registered after it, got {self.trained.name}; give a number"
            )
        return best_thresholds(self.trained.loaded.path)


def require_network(word: str) -> None:
    """Refuse a word that names no network, before torch is loaded.

    Raises:
        UserError: if it is none of the kinds above.
    """
    path = Path(word)
    if word in TORCHVISIONS_DETECTORS or word.startswith(_REGISTRY):
        return
    if path.is_file() or path.is_dir():
        checkpoint_at(path)
        return
    found = "is a pipe or a device" if path.exists() else "does not exist"
    raise UserError(
        f"weights: must be {' or '.join(TORCHVISIONS_DETECTORS)}, a file of weights, a checkpoint, a run's folder, "
        f"or {_REGISTRY}NAME@champion of MLflow, got {word}, which {found}"
    )


def load_network(config: Config, word: str, class_names: Sequence[str] = ()) -> Network:
    """Load the network that a word names onto `train.device`.

    Args:
        config: device, data loading and tracking.
        word: see above; also last and best, checkpoints of `train.output_dir`.
        class_names: names of the classes of weights that have none.

    Raises:
        UserError: if there is none, it cannot be fetched or read, or has other names of classes of its own.
    """
    network = _load(config, word, class_names)
    own = network.trained.loaded.class_names
    if class_names and tuple(class_names) != own:
        raise UserError(f"class_names: must be left out, as {word} has names of its own: {', '.join(own[:_SHOWN])}, …")
    return network


def _load(config: Config, word: str, class_names: Sequence[str]) -> Network:
    from components.inference.detectors import load_detector
    from components.runs.trained import Trained, load_trained
    from model.distributed import pick_device
    from model.engine.checkpoint import is_checkpoint

    if word in POINTERS:
        return Network(load_trained(config, word))
    require_network(word)
    path = Path(word)
    if word.startswith(_REGISTRY):
        from components.tracking.registered import fetched_model

        with fetched_model(config.tracking, word) as (checkpoint, thresholds):
            trained = load_trained(config, str(checkpoint))
        return Network(Trained(trained.loaded, trained.config, word), thresholds, is_checkpoint=False)
    if word not in TORCHVISIONS_DETECTORS:  # a folder of data is often called coco
        path = checkpoint_at(path)
        if is_checkpoint(path):
            return Network(load_trained(config, str(path)))
        word = str(path)
    loaded = load_detector(word, pick_device(config.train.device), class_names)
    return Network(Trained.of(loaded, config, word), is_checkpoint=False)
