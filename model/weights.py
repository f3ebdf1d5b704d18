"""Initial weights: from scratch, from torchvision, or from a file; and a plain account of what was used.

All state dicts have torchvision's names (`maskrcnn_resnet50_fpn`), which are ours too; only that with features c4 layer4 is `roi_heads.res5`.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, MaskRCNN_ResNet50_FPN_Weights

from model.config import ModelConfig
from model.errors import UserError
from model.layers import FrozenBatchNorm2d
from model.mask_rcnn import MaskRCNN

BODIES = ("backbone.body.", "roi_heads.res5.")
PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


class WeightsError(UserError):
    """Weights cannot be had, or do not fit the network."""


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` did, for the log."""

    source: str
    matched: int
    initialised: tuple[str, ...] = ()  # parameters that keep their random values
    unused: tuple[str, ...] = ()  # entries of the file that the network has no place for

    def __str__(self) -> str:
        if self.source == "none":
            return "weights: from scratch"
        text = f"weights: {self.source}: {self.matched} tensors loaded"
        if self.initialised:
            text += f", {len(self.initialised)} start at random ({_abridged(self.initialised)})"
        if self.unused:
            text += f", {len(self.unused)} not used ({_abridged(self.unused)})"
        return text


def load_weights(
    model: MaskRCNN, config: ModelConfig, class_names: Sequence[str], category_ids: Sequence[int]
) -> WeightsReport:
    """Fill the network as `model.weights` says.

    Raises:
        WeightsError: if a file is absent, damaged, cannot be fetched, or belongs to another architecture.
    """
    if config.weights == "none":
        return WeightsReport("none", 0)
    if config.weights == "imagenet":
        return _load_body(model, config)
    if config.weights == "coco":
        if config.backbone != "resnet50":
            raise WeightsError(
                f"model.weights=coco are a ResNet-50's, got model.backbone={config.backbone}; use imagenet"
            )
        # The detector without masks was trained on its own; proposals alone are those of either.
        published = MaskRCNN_ResNet50_FPN_Weights if config.task == "mask" else FasterRCNN_ResNet50_FPN_Weights
        weights = published.COCO_V1
        state = _fetch(weights)
        _absorb_eps(state)
        rows = _rows_of_classes(weights.meta["categories"], class_names, category_ids)
        if rows is not None:
            state = {name: _pick_rows(name, value, rows) for name, value in state.items()}
        return fit_state_dict(model, state, "torchvision's COCO_V1")
    return fit_state_dict(model, _read_state_dict(Path(config.weights)), config.weights)


def fit_state_dict(model: MaskRCNN, state: Mapping[str, Tensor], source: str) -> WeightsReport:
    """Load what fits; predictors for another number of classes stay as initialised, anything else amiss is an error."""
    own = model.state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    unused = tuple(name for name in state if name not in own)
    misfits = {name for name in own if name in state and own[name].shape != state[name].shape}
    absent = {name for name in own if name not in state and not name.endswith("num_batches_tracked")}
    wrong = sorted(name for name in misfits | absent if not name.startswith(PREDICTORS))
    if wrong:
        example = wrong[0]
        got = f"{tuple(state[example].shape)}" if example in state else "nothing"
        raise WeightsError(
            f"{source}: must hold the weights of this network, but {len(wrong)} of {len(own)} tensors do not fit: {example} must be "
            f"{tuple(own[example].shape)}, got {got}; check model.backbone, model.norm and the widths under `model`"
        )
    fitting = {name: value for name, value in state.items() if name in own and name not in misfits}
    model.load_state_dict(fitting, strict=False)
    return WeightsReport(source, len(fitting), tuple(sorted(misfits | absent)), unused)


def _load_body(model: MaskRCNN, config: ModelConfig) -> WeightsReport:
    weights = get_model_weights(config.backbone)["IMAGENET1K_V1"]
    state = _fetch(weights)
    own = model.state_dict()
    fitting = {body_name(name, config): value for name, value in state.items() if body_name(name, config) in own}
    model.load_state_dict(fitting, strict=False)
    left = {name for name in own if name not in fitting and not name.endswith("num_batches_tracked")}
    assert not any(name.startswith(BODIES) for name in left), left
    initialised = tuple(name for name, _ in model.named_parameters() if name in left)
    unused = tuple(
        name for name in state if body_name(name, config) not in own and not name.endswith("num_batches_tracked")
    )
    return WeightsReport(f"torchvision's {weights}", len(fitting), initialised, unused)


def body_name(name: str, config: ModelConfig) -> str:
    """Where a classifier's parameter of torchvision's name stands in the network: `layer4.0.bn1.bias` → `backbone.body.layer4.0.bn1.bias`."""
    if config.features == "c4" and name.startswith("layer4."):
        return name.replace("layer4.", "roi_heads.res5.", 1)
    return f"backbone.body.{name}"


def _fetch(weights: object) -> dict[str, Tensor]:
    """Torchvision's file, its hash checked, from its cache or the network."""
    url = str(weights.url)  # type: ignore[attr-defined]
    try:
        return torch.hub.load_state_dict_from_url(url, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        raise WeightsError(
            f"{weights}: cannot be fetched from {url} ({error}); put the file at {cache}, or set model.weights to none or a path"
        ) from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"model.weights: must be none, imagenet, coco or the path of a file, got {path}, which does not exist"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise WeightsError(
            f"{path}: not a state dict that loads safely ({error}); save one with torch.save(model.state_dict(), …)"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: must hold a state dict or a checkpoint with one under `model`, got something else")
    return state


def _absorb_eps(state: dict[str, Tensor]) -> None:
    """COCO_V1 was trained with a frozen batch norm of eps 0; ours adds eps, so it is taken off the variance."""
    for name, value in state.items():
        if name.endswith("running_var"):
            state[name] = value - FrozenBatchNorm2d.eps


def _rows_of_classes(
    categories: Sequence[str], class_names: Sequence[str], category_ids: Sequence[int]
) -> list[int] | None:
    """Rows of torchvision's 91-way predictors for our classes: its labels are COCO's ids. None where the classes are others."""
    rows = [0, *category_ids]
    same = all(
        id < len(categories) and categories[id] == name for id, name in zip(category_ids, class_names, strict=True)
    )
    return rows if same else None


def _pick_rows(name: str, value: Tensor, rows: list[int]) -> Tensor:
    if not name.startswith(PREDICTORS):
        return value
    if ".bbox_pred." in name:  # four rows a class
        return value.unflatten(0, (-1, 4))[rows].flatten(0, 1)
    return value[rows]


def _abridged(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
