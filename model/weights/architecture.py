"""Architecture of a detector, read from the names and shapes of its weights.

A state dict says nothing of itself, but its tensors tell body, parts, widths and number of classes. What no tensor
tells (`pixel_*`, `stride_in_1x1`, `conventions`) is taken from the library whose names these are.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from model.config import ModelConfig
from model.weights.conventions import assumed_conventions
from model.weights.file import StoredWeights, WeightsError
from model.weights.names import BODIES, NamedWeights, rename_weights

_BODY, _RPN, _BOX, _MASK = BODIES[0], "rpn.head.", "roi_heads.box_predictor.", "roi_heads.mask_predictor."
_PARTS = {"a body": _BODY, "a region proposal network": f"{_RPN}cls_logits.", "a box head": f"{_BOX}cls_score."}
# Number of blocks of layer3, and outputs and inputs of layer1.0.conv2 per 64 channels of the stem → body.
_RESNETS: dict[tuple[int, tuple[int, ...]], str] = {
    (6, (64, 64)): "resnet50", (23, (64, 64)): "resnet101", (6, (128, 128)): "wide_resnet50_2",
    (6, (128, 4)): "resnext50_32x4d", (23, (256, 8)): "resnext101_32x8d",
}  # fmt: skip
_BASIC_RESNETS = {2: "resnet18", 6: "resnet34"}  # with two convolutions per block
_CONVNEXTS = {9: "convnext_tiny", 27: "convnext_small"}  # number of blocks of the third stage
_ANCHORS = {"fpn": 3, "c4": 15, "c5": 15}  # per cell: 3 aspect ratios, of one size or of all 5
# Settings of C4 and C5 that all published ones have.
_USUAL: dict[str, dict[str, Any]] = {
    "c4": {"box_head": "res5", "box_pool_size": 14, "mask_pool_size": 14},
    "c5": {"res5_dilation": 2},
}
_NORM_IN_FPN = r"fpn_(inner|layer)\d\.1\.|fpn_(lateral|output)\d\.norm\.|fpn_.*_gn_|fpn\.(inner|layer)_blocks\.\d\.1\."


def read_architecture(stored: StoredWeights, source: str) -> tuple[ModelConfig, NamedWeights, int]:
    """Find the network that a file's weights are of.

    Returns:
        Its configuration, the weights under our names, and the number of classes, background not counted.

    Raises:
        WeightsError: if the names are of no known format, a part of a detector is absent, or the body is none of ours.
    """
    layout = _layout(stored.tensors)
    named = rename_weights(stored, ModelConfig(**layout), source)
    state = named.tensors
    if absent := [part for part, start in _PARTS.items() if not any(name.startswith(start) for name in state)]:
        raise WeightsError(
            f"{source}: must hold a whole detector to predict with, but has no {' and no '.join(absent)[2:]}; "
            "training can start from a part (model.weights=PATH)"
        )
    if (anchors := _side(state, f"{_RPN}cls_logits.bias", 0, source)) != _ANCHORS[layout["features"]]:
        raise WeightsError(
            f"{source}: must have {_ANCHORS[layout['features']]} anchors per cell, as usual, to be used without its "
            f"configuration, got {anchors}"
        )
    settings = layout | _body(state, source) | _heads(state, layout, source)
    settings |= assumed_conventions(stored, named, _config(settings, source))
    return _config(settings, source), named, _side(state, f"{_BOX}cls_score.bias", 0, source, least=2) - 1


def _config(settings: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return ModelConfig(**settings)
    except ValidationError as error:
        raise WeightsError(f"{source}: must be of a network that we have, but: {error.errors()[0]['msg']}") from error


def _side(state: Mapping[str, Tensor], name: str, axis: int, source: str, least: int = 1) -> int:
    """Length of a tensor along an axis.

    Raises:
        WeightsError: if the tensor is absent, or has no such axis or a shorter one.
    """
    shape = state[name].shape if name in state else None
    if shape is None or len(shape) <= axis or shape[axis] < least:
        got = "no such tensor" if shape is None else f"a shape of {tuple(shape)}"
        raise WeightsError(
            f"{source}: must hold a whole detector to predict with; of {name} axis {axis} must be at least {least} "
            f"long, got {got}; the file is damaged, or another network's"
        )
    return shape[axis]


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings on which our names of the file's tensors depend."""

    def has(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in tensors)

    def rows(pattern: str) -> int:
        return next((len(value) for name, value in tensors.items() if value.ndim and re.search(pattern, name)), 0)

    has_linear = has(r"box_head\.(fc6|fc1)\.|feature_extractor\.fc6\.|^fc6_w$")
    features = "fpn" if has("fpn") else "c5" if has_linear else "c4"
    layout: dict[str, Any] = {"weights": "none", "features": features}
    layout |= _USUAL.get(features, {})
    convs = r"box_head\.(?:conv)?(\d)\.(?:0\.)?weight$|xconvs\.(\d+)\.weight$|head_conv(\d)_w$"
    convolutions = [name for name, value in tensors.items() if value.ndim == 4 and re.search(convs, name)]
    if convolutions:
        layout |= {"box_head": "conv", "box_head_convs": len(convolutions)}
    if has(_NORM_IN_FPN) and not has("running_mean"):
        layout["norm"] = "group_norm"
    boxes = rows(r"box.?predictor\.bbox_pred\.bias$|^bbox_pred_b$|box\.predictor\.bbox_pred\.bias$")
    classes = rows(r"predictor\.cls_score\.bias$|^cls_score_b$")
    layout["class_agnostic_boxes"] = boxes == 4 or (boxes == 8 and classes > 2)
    return layout


def _body(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Settings of the body."""

    def blocks(stage: str) -> int:
        start = f"{_BODY}{stage}."
        return len({name[len(start) :].split(".")[0] for name in state if name.startswith(start)})

    first = state.get(f"{_BODY}layer1.0.conv2.weight")
    settings: dict[str, Any] = {}
    if first is not None:
        stem = _side(state, f"{_BODY}conv1.weight", 0, source)
        settings["stem_channels"] = stem
        outputs, inputs = first.shape[:2] if first.ndim > 1 else (0, 0)
        depth, widths = blocks("layer3"), (outputs * 64 // stem, inputs * 64 // stem)
        is_basic = f"{_BODY}layer1.0.conv3.weight" not in state
        found = _BASIC_RESNETS.get(depth) if is_basic else _RESNETS.get((depth, widths))
    elif any("relative_position" in name for name in state):
        found = {6: "swin_t"}.get(blocks("features.5"))
    else:
        found = _CONVNEXTS.get(blocks("features.5"))
    if found is None:
        bodies = ", ".join([*_BASIC_RESNETS.values(), *_RESNETS.values(), *_CONVNEXTS.values(), "swin_t"])
        raise WeightsError(f"{source}: must have one of these bodies: {bodies}; got one of other depth or width")
    return settings | {"backbone": found}


def _heads(state: Mapping[str, Tensor], layout: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of FPN, RPN and heads, from the shapes and the presence of their tensors."""
    found: dict[str, Any] = {
        "task": "mask" if any(name.startswith(_MASK) for name in state) else "box",
        "rpn_convs": 2 if f"{_RPN}conv.1.0.weight" in state else 1,
    }
    channels = _side(state, f"{_RPN}conv.0.0.weight", 1, source)
    if layout["features"] == "fpn":
        norm = "backbone.fpn.inner_blocks.0.1."
        is_batch_norm = f"{norm}running_mean" in state
        in_heads = "frozen_batch_norm" if is_batch_norm else "group_norm" if f"{norm}weight" in state else "none"
        found |= {"fpn_channels": channels, "head_norm": in_heads}
    if layout["features"] != "c4":
        found["box_head_channels"] = _side(state, f"{_BOX}cls_score.weight", 1, source)
        linear = "fc6" if layout.get("box_head", "mlp") == "mlp" else str(layout["box_head_convs"] + 1)
        inputs = _side(state, f"roi_heads.box_head.{linear}.weight", 1, source)
        if layout.get("box_head") == "conv":
            channels = _side(state, "roi_heads.box_head.0.0.weight", 0, source)
            found["box_head_conv_channels"] = channels
        found["box_pool_size"] = max(math.isqrt(inputs // channels), 1)
    if found["task"] == "mask":
        convs = [name for name in state if re.fullmatch(r"roi_heads\.mask_head\.\d\.0\.weight", name)]
        found["mask_head_convs"] = len(convs)
        found["mask_head_channels"] = _side(state, f"{_MASK}mask_fcn_logits.weight", 1, source)
    return found
