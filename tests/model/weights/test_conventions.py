"""Weights and a network of other conventions are not put together."""

import shlex
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.weights.conventions import check_conventions
from model.weights.file import StoredWeights, WeightsError
from model.weights.names import NamedWeights

BODY = {"backbone.body.conv1.weight": torch.zeros(1)}
WHOLE = BODY | {"rpn.head.cls_logits.weight": torch.zeros(1)}
MSRA = {
    "pixel_order": "bgr",
    "pixel_mean": (102.9801, 115.9465, 122.7717),
    "pixel_std": (1.0, 1.0, 1.0),
    "stride_in_1x1": True,
}
RGB = {
    "pixel_order": "rgb",
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
    "stride_in_1x1": False,
}
OLD = "backbone.fpn.inner_blocks.0.weight"  # of Mask R-CNN and of Faster R-CNN


def check(format: Any, tensors: dict[str, Tensor], model: ModelConfig, stored: dict[str, Any]) -> bool:
    weights = StoredWeights(**({"tensors": tensors} | stored))
    return check_conventions(weights, NamedWeights(format, tensors, {}), model, "w.pkl")


CASES: dict[str, tuple[Any, dict[str, Tensor], dict[str, Any], dict[str, Any]]] = {
    # format, weights by our names, what else is known of the file, what model must be
    "MSRA of Detectron": ("caffe2", BODY, {}, MSRA),
    "GN of Detectron": ("caffe2", BODY, {}, MSRA | {"norm": "group_norm", "stride_in_1x1": False}),
    "X-101 of Detectron": ("caffe2", BODY, {}, MSRA | {"backbone": "resnext101_32x8d", "stride_in_1x1": False}),
    "detector of Detectron": ("caffe2", WHOLE, {}, MSRA | {"conventions": "torchvision"}),
    "maskrcnn-benchmark": ("maskrcnn-benchmark", WHOLE, {}, MSRA | {"conventions": "torchvision"}),
    "MSRA of Detectron2": ("detectron2", BODY, {"author": "MSRA"}, MSRA | {"pixel_mean": (103.53, 116.28, 123.675)}),
    "torchvision's of Detectron2": ("detectron2", BODY, {"author": "torchvision"}, RGB),
    "detector of Detectron2": ("detectron2", WHOLE, {"author": "Zoo"}, MSRA | {"conventions": "detectron2"}),
    "X-101 of Detectron2": (
        "detectron2",
        WHOLE,
        {"author": "Zoo"},
        MSRA | {"backbone": "resnext101_32x8d", "stride_in_1x1": False, "pixel_std": (57.375, 57.12, 58.395)},
    ),
    "Detectron2 that says its pixels": (
        "detectron2",
        WHOLE,
        {
            "tensors": WHOLE
            | {"pixel_mean": torch.tensor(RGB["pixel_mean"]), "pixel_std": torch.tensor(RGB["pixel_std"])}
        },
        RGB,
    ),
    "classifier of torchvision": ("torchvision", BODY, {}, RGB),
    "detector of torchvision": (
        "torchvision",
        WHOLE,
        {"tensors": WHOLE | {OLD: torch.zeros(1)}},
        RGB | {"conventions": "torchvision"},
    ),
    "checkpoint of ours": (
        "torchvision",
        WHOLE,
        {"config": {"model": {"pixel_order": "bgr", "stride_in_1x1": True}}},
        MSRA,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_weights_were_trained_with_passes_and_is_listed(case: str) -> None:
    format, tensors, stored, wanted = CASES[case]
    assert check(format, tensors, ModelConfig(weights="w.pkl", **wanted), stored)


@pytest.mark.parametrize("case", CASES)
def test_anything_else_is_an_error_that_says_what_to_set(case: str) -> None:
    """What the message says to set is taken, and then passes."""
    format, tensors, stored, wanted = CASES[case]
    opposite = RGB if wanted["pixel_order"] == "bgr" else MSRA
    conventions = "detectron2" if wanted.get("conventions") == "torchvision" else "torchvision"
    other = ModelConfig(weights="w.pkl", **(wanted | opposite | {"conventions": conventions}))
    with pytest.raises(WeightsError, match=r"w\.pkl: these weights were trained with other settings") as error:
        check(format, tensors, other, stored)
    settings = dict(word.removeprefix("model.").split("=") for word in shlex.split(str(error.value).split("; set ")[1]))
    assert "pixel_order" in settings
    changed = {name: parsed(value) for name, value in settings.items()}
    assert check(format, tensors, other.model_copy(update=changed), stored)


def parsed(text: str) -> Any:
    if text.startswith("["):
        return tuple(float(number) for number in text.strip("[]").split(","))
    return {"true": True, "false": False}.get(text, text)


def test_a_state_dict_of_unknown_origin_is_taken_as_it_is() -> None:
    for format in ("torchvision", "detectron2"):
        tensors = WHOLE
        config = ModelConfig(weights="w.pkl", conventions="detectron2", **MSRA)
        assert check(format, tensors, config, {}) == (format == "detectron2")  # whose anchors are known at least
