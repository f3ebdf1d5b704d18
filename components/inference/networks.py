"""The network to predict with, by the word of `--weights`: no parameter file and no run's folder is needed.

coco | coco_v2 (torchvision's, with COCO's 80 classes) | a checkpoint | the weights of a detector | a run's folder |
models:/NAME@ALIAS or models:/NAME/VERSION of MLflow's registry
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import Config
from components.runs.result import final_checkpoint
from model.config import TORCHVISIONS_DETECTORS, TrainConfig
from model.engine.pointers import POINTERS, require_checkpoint
from model.errors import UserError

if TYPE_CHECKING:
    from components.runs.trained import Trained

_REGISTRY = "models:/"


def require_network(word: str) -> None:
    """Refuse a word that names no network, before torch is loaded.

    Raises:
        UserError: if it is none of the kinds above.
    """
    path = Path(word)
    if word in TORCHVISIONS_DETECTORS or word.startswith(_REGISTRY) or path.is_file():
        return
    if path.is_dir():
        require_checkpoint(path, final_checkpoint(path, TrainConfig()))
        return
    raise UserError(
        f"--weights: must be {' or '.join(TORCHVISIONS_DETECTORS)}, a file of weights, a checkpoint, a run's folder, "
        f"or {_REGISTRY}NAME@champion of MLflow, got {word}, which does not exist"
    )


def load_network(config: Config, word: str, class_names: Sequence[str] = ()) -> "Trained":
    """Load the network that a word names onto `train.device`.

    Args:
        config: device, data loading and tracking.
        word: see above; also last and best, checkpoints of `train.output_dir`.
        class_names: names of the classes of weights that have none.

    Raises:
        UserError: if there is none, or it cannot be fetched or read.
    """
    from components.inference.detectors import load_detector
    from components.runs.trained import Trained, load_trained
    from model.distributed import pick_device
    from model.engine.checkpoint import is_checkpoint

    if word in POINTERS:
        return load_trained(config, word)
    require_network(word)
    path = Path(word)
    if word.startswith(_REGISTRY):
        from components.tracking.registered import fetched_checkpoint

        with fetched_checkpoint(config.tracking, word) as fetched:
            trained = load_trained(config, str(fetched))
        return Trained(trained.loaded, trained.config, word)
    if path.is_dir():
        path = require_checkpoint(path, final_checkpoint(path, TrainConfig()))
    if path.is_file() and is_checkpoint(path):
        return load_trained(config, str(path))
    loaded = load_detector(word, pick_device(config.train.device), class_names)
    return Trained.of(loaded, config, word)
