"""Architectures read from weights alone, for each layout and each library's names."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.mask_rcnn import MaskRCNN
from model.weights.architecture import read_architecture
from model.weights.file import StoredWeights, WeightsError

from .test_names import CLASSES, FORMATS, LAYOUTS, R50, on_meta, to_theirs

# What no tensor tells; see `assumed_conventions`.
UNTOLD = {"conventions", "pixel_order", "pixel_mean", "pixel_std", "stride_in_1x1"}


def in_names_of(format: str, config: ModelConfig) -> dict[str, Tensor]:
    """A state dict as the library stores it: Detectron2 has no rows of boxes and masks for the background."""
    rename = to_theirs(format, config)
    state = on_meta(config)
    if format == "detectron2":
        rows = {".bbox_pred.": 4, ".mask_fcn_logits.": 1}
        state |= {
            name: value[count:]
            for name, value in state.items()
            for part, count in rows.items()
            if part in name and name.startswith("roi_heads.")
        }
    return {rename(name): value for name, value in state.items() if "running" not in name or format != "caffe2"}


def told(config: ModelConfig) -> dict[str, Any]:
    return config.model_dump(exclude=UNTOLD) | {"norm_of_heads": config.norm_of_heads, "head_norm": None}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_recognised_in_each_librarys_names(format: str, layout: str) -> None:
    config = ModelConfig(**(R50 | LAYOUTS[layout]))
    found, named, classes = read_architecture(StoredWeights(in_names_of(format, config)), "a test")
    assert told(found) == told(config)
    assert classes == CLASSES
    assert {name: value.shape for name, value in named.tensors.items()} == {
        name: value.shape for name, value in on_meta(found).items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "resnet18"},
        {"backbone": "resnet18", "stem_channels": 32},
        {"backbone": "resnet34", "fpn_channels": 64, "box_head_channels": 48, "mask_head_channels": 32},
        {"backbone": "resnext50_32x4d", "mask_head_convs": 2},
        {"backbone": "resnext101_32x8d", "stem_channels": 128},
        {"backbone": "wide_resnet50_2", "class_agnostic_boxes": True},
        {"backbone": "convnext_tiny"},
        {"backbone": "convnext_small"},
        {"backbone": "swin_t", "task": "box"},
        {"head_norm": "frozen_batch_norm", "box_head": "conv", "rpn_convs": 2},
        {"head_norm": "group_norm", "box_head": "conv", "box_head_convs": 2, "box_head_conv_channels": 96},
        {"box_pool_size": 5, "mask_head_convs": 0},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_other_bodies_and_widths_are_told_by_their_tensors(changes: dict[str, Any]) -> None:
    config = ModelConfig(**({"weights": "none"} | changes))
    found, _, classes = read_architecture(StoredWeights(on_meta(config)), "a test")
    assert told(found) == told(config)
    assert classes == CLASSES


def test_conventions_are_those_of_the_library_unless_the_file_states_them() -> None:
    ours = on_meta(ModelConfig(**R50))
    torchvisions, _, _ = read_architecture(StoredWeights(ours), "a test")
    assert (torchvisions.conventions, torchvisions.pixel_order, torchvisions.stride_in_1x1) == (
        "torchvision",
        "rgb",
        False,
    )
    theirs = in_names_of("detectron2", ModelConfig(**R50))
    private, _, _ = read_architecture(StoredWeights(theirs), "a test")
    assert (private.conventions, private.pixel_order, private.stride_in_1x1) == ("detectron2", "bgr", True)
    assert private.pixel_mean == (103.53, 116.28, 123.675)
    stated = theirs | {"pixel_mean": torch.tensor([1.0, 2.0, 3.0]), "pixel_std": torch.tensor([4.0, 5.0, 6.0])}
    own, _, _ = read_architecture(StoredWeights(stated), "a test")
    assert (own.pixel_mean, own.pixel_std) == ((1, 2, 3), (4, 5, 6))


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if part not in name}


def test_what_is_no_whole_detector_of_a_known_kind_is_refused() -> None:
    state = on_meta(ModelConfig(**R50))
    for absent, says in (("rpn.", "no region proposal network"), ("box_predictor", "no box head")):
        with pytest.raises(WeightsError, match=f"a test: must hold a whole detector .*has {says}; training can start"):
            read_architecture(StoredWeights(without(state, absent)), "a test")
    with torch.device("meta"):
        many = MaskRCNN(ModelConfig(**R50, aspect_ratios=(0.5, 1.0, 1.5, 2.0)), 2).state_dict()
    with pytest.raises(WeightsError, match=r"a test: must have 3 anchors per cell.*got 4"):
        read_architecture(StoredWeights(many), "a test")
    deeper = state | {
        f"backbone.body.layer3.{i}.conv1.weight": state["backbone.body.layer3.5.conv1.weight"] for i in range(40)
    }
    with pytest.raises(
        WeightsError, match=r"a test: must have one of these bodies: resnet18, .*swin_t; got one of other"
    ):
        read_architecture(StoredWeights(deeper), "a test")


@pytest.mark.parametrize("layout", ["fpn", "gn"])
def test_a_damaged_tensor_is_named_whichever_it_is(layout: str) -> None:
    state = on_meta(ModelConfig(**(R50 | LAYOUTS[layout])))
    names = [name for name in state if name.startswith(("rpn.", "roi_heads."))]
    for name in (*names, "backbone.body.layer1.0.conv2.weight"):
        for damaged in (None, torch.empty(()), torch.empty(1, 0, 1, 1)):
            changed = without(state, name) | ({} if damaged is None else {name: damaged})
            with contextlib.suppress(WeightsError):  # no other error; other tensors are compared after this
                read_architecture(StoredWeights(changed), "a test")
    for absent in ("rpn.head.conv.0.0.weight", "roi_heads.box_predictor.cls_score.bias"):
        with pytest.raises(WeightsError, match=f"a test: must hold a whole detector .*{absent} .*no such tensor"):
            read_architecture(StoredWeights(without(state, absent)), "a test")
