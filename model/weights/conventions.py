"""Conventions of weights: the pixel order, mean, std, stride position and anchors that they were trained with.

With wrong conventions every tensor loads, but nothing is detected, so a mismatch is an error that says what to set.
A file of unknown origin (a bare state dict in our names, a checkpoint of a private Detectron2 training) is not checked.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.config import TORCHVISION_MEAN, TORCHVISION_STD, ModelConfig
from model.weights.file import StoredWeights, WeightsError
from model.weights.names import NamedWeights

Wanted = dict[str, Any]  # key of `model` → value

MSRA_MEAN = (102.9801, 115.9465, 122.7717)
DETECTRON2_MEAN = (103.53, 116.28, 123.675)
DETECTRON2_RESNEXT_STD = (57.375, 57.12, 58.395)
_OF_A_RUN = ("pixel_order", "pixel_mean", "pixel_std", "stride_in_1x1", "conventions")
_MEAN_TOLERANCE = 1.0  # 0 to 255; the means of Detectron and Detectron2, for the same weights, differ by 0.9
# torchvision's first published detectors have such names, with batch norms of eps 0; ours never.
OLD_NAMES = "backbone.fpn.inner_blocks.0.weight"


def check_conventions(stored: StoredWeights, named: NamedWeights, config: ModelConfig, source: str) -> bool:
    """Check the conventions of a file against the network's; return False if the file has none.

    Raises:
        WeightsError: if they differ; the message says what to set.
    """
    wanted = wanted_conventions(stored, named, config)
    wrong = {key: value for key, value in wanted.items() if not _agrees(key, value, getattr(config, key))}
    if wrong:
        got = ", ".join(f"{key}={_spelt(getattr(config, key))}" for key in wrong)
        settings = " ".join(f"'model.{key}={_spelt(value)}'" for key, value in wrong.items())
        raise WeightsError(
            f"{source}: these weights were trained with other settings: `model` has {got}; set {settings}"
        )
    return bool(wanted)


def wanted_conventions(stored: StoredWeights, named: NamedWeights, config: ModelConfig) -> Wanted:
    """Values that `model` must have for these weights; empty if the file does not say."""
    if stored.config:
        trained = stored.config.get("model", {})
        return {key: _tuple(trained[key]) for key in _OF_A_RUN if key in trained}
    if named.format in ("torchvision", "openmmlab"):
        is_published = named.is_body_alone or OLD_NAMES in stored.tensors
        return _torchvisions() | _detectors(named, "torchvision") if is_published else {}
    if named.format == "detectron2":
        return _detectron2s(stored, named, config)
    return _bgr(MSRA_MEAN, (1.0, 1.0, 1.0)) | _strides(config) | _detectors(named, "torchvision")


def assumed_conventions(stored: StoredWeights, named: NamedWeights, config: ModelConfig) -> Wanted:
    """The conventions of a detector: those that the file states, and for the rest the defaults of its library."""
    if named.format == "torchvision":
        usual = _torchvisions() | _detectors(named, "torchvision")
    elif named.format == "detectron2":
        std = DETECTRON2_RESNEXT_STD if config.backbone.startswith("resnext") else (1.0, 1.0, 1.0)
        usual = _bgr(DETECTRON2_MEAN, std) | _strides(config) | _detectors(named, "detectron2")
    else:
        usual = {}  # always stated
    return usual | wanted_conventions(stored, named, config)


def _detectron2s(stored: StoredWeights, named: NamedWeights, config: ModelConfig) -> Wanted:
    """Conventions of a Detectron2 file: its own pixel_mean and pixel_std if present, else those of its author."""
    wanted: Wanted = {}
    if stored.author == "torchvision":
        wanted = _torchvisions()
    elif stored.author:
        is_resnext = config.backbone.startswith("resnext")
        wanted = _bgr(DETECTRON2_MEAN, DETECTRON2_RESNEXT_STD if is_resnext else (1.0, 1.0, 1.0)) | _strides(config)
    if "pixel_mean" in stored.tensors:
        mean, std = (_floats(stored.tensors, name) for name in ("pixel_mean", "pixel_std"))
        order = "bgr" if mean[0] < mean[2] else "rgb"  # red is the brightest channel of natural images
        wanted |= {"pixel_order": order, "pixel_mean": mean, "pixel_std": std}
    return wanted | _detectors(named, "detectron2")


def _torchvisions() -> Wanted:
    return {"pixel_order": "rgb", "pixel_mean": TORCHVISION_MEAN, "pixel_std": TORCHVISION_STD, "stride_in_1x1": False}


def _bgr(mean: tuple[float, ...], std: tuple[float, ...]) -> Wanted:
    return {"pixel_order": "bgr", "pixel_mean": mean, "pixel_std": std}


def _strides(config: ModelConfig) -> Wanted:
    """Stride position: the 1×1 for MSRA's ResNets; the 3×3 with group norm, for ResNeXt and blocks without a 1×1."""
    is_msra = config.backbone in ("resnet50", "resnet101") and config.norm != "group_norm"
    return {"stride_in_1x1": is_msra}


def _detectors(named: NamedWeights, conventions: str) -> Wanted:
    return {} if named.is_body_alone else {"conventions": conventions}


def _agrees(key: str, wanted: Any, got: Any) -> bool:
    if key == "pixel_mean":
        return all(abs(w - g) <= _MEAN_TOLERANCE for w, g in zip(wanted, got, strict=True))
    if key == "pixel_std":
        return all(math.isclose(w, g, rel_tol=0.01) for w, g in zip(wanted, got, strict=True))
    return bool(wanted == got)


def _floats(tensors: Mapping[str, Tensor], name: str) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in tensors[name].flatten().tolist())


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _spelt(value: Any) -> str:
    """Format a value as on the command line."""
    if isinstance(value, tuple):
        return f"[{', '.join(f'{number:g}' for number in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
