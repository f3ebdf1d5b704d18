"""Weights in the published names of other projects: each layout is named whole, values arrive where they belong."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.mask_rcnn import MaskRCNN
from model.weights.file import StoredWeights, WeightsError
from model.weights.load import load_weights
from model.weights.names import rename_weights

Names = list[tuple[str, str]]  # substitutions, each applied in turn, from ours to theirs
CLASSES = 3

# What follows says ours → theirs, one layer after another; model/weights/names.py says theirs → ours.
NORM = [(r"\.bn(\d)\.", r".conv\1.norm."), (r"downsample\.0\.", "shortcut."), (r"downsample\.1\.", "shortcut.norm.")]
DETECTRON2: Names = [
    *NORM,
    (r"^backbone\.body\.conv1\.", "backbone.bottom_up.stem.conv1."),
    (r"^backbone\.body\.layer1\.", "backbone.bottom_up.res2."),
    (r"^backbone\.body\.layer2\.", "backbone.bottom_up.res3."),
    (r"^backbone\.body\.layer3\.", "backbone.bottom_up.res4."),
    (r"^backbone\.body\.layer4\.", "backbone.bottom_up.res5."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}"),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.1", lambda m: f"backbone.fpn_lateral{int(m[1]) + 2}.norm"),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0", lambda m: f"backbone.fpn_output{int(m[1]) + 2}"),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.1", lambda m: f"backbone.fpn_output{int(m[1]) + 2}.norm"),
    (r"^rpn\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv"),
    (r"^rpn\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits"),
    (r"^rpn\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas"),
    (r"box_head\.fc6", "box_head.fc1"),
    (r"box_head\.fc7", "box_head.fc2"),
    (r"box_head\.5\.", "box_head.fc1."),
    (r"box_head\.(\d)\.0", lambda m: f"box_head.conv{int(m[1]) + 1}"),
    (r"box_head\.(\d)\.1", lambda m: f"box_head.conv{int(m[1]) + 1}.norm"),
    (r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}"),
    (r"mask_head\.(\d)\.1", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.norm"),
    (r"mask_predictor\.conv5_mask", "mask_head.deconv"),
    (r"mask_predictor\.mask_fcn_logits", "mask_head.predictor"),
]  # fmt: skip
BENCHMARK: Names = [
    (r"^backbone\.body\.(conv1|bn1)\.", r"backbone.body.stem.\1."),
    (r"^roi_heads\.res5\.", "roi_heads.box.feature_extractor.head.layer4."),
    (r"fpn\.inner_blocks\.(\d)", lambda m: f"fpn.fpn_inner{int(m[1]) + 1}"),
    (r"fpn\.layer_blocks\.(\d)", lambda m: f"fpn.fpn_layer{int(m[1]) + 1}"),
    (r"^rpn\.head\.conv\.0\.0", "rpn.head.conv"),
    (r"box_head\.(fc\d)", r"box.feature_extractor.\1"),
    (r"box_head\.5\.", "box.feature_extractor.fc6."),
    (r"box_predictor", "box.predictor"),
    (r"mask_head\.(\d)", lambda m: f"mask.feature_extractor.mask_fcn{int(m[1]) + 1}"),
    (r"mask_predictor", "mask.predictor"),
]
PLAIN: Names = [(r"(fpn_inner\d|fpn_layer\d|mask_fcn\d)\.0", r"\1")]  # without norm there is no sequence
XCONVS = {3: (r"box_head\.(\d)\.([01])", lambda m: f"box.feature_extractor.xconvs.{int(m[1]) * 3 + int(m[2])}")} | {
    2: (r"box_head\.(\d)\.0", lambda m: f"box.feature_extractor.xconvs.{int(m[1]) * 2}")
}
LAST = {"2": 2, "3": 3, "4": 5, "5": 2}  # ResNet-50's last block of a stage, by which Detectron names pyramids
CAFFE2: Names = [
    (r"^backbone\.body\.conv1\.weight", "conv1_w"),
    (r"^backbone\.body\.bn1\.", "res_conv1_bn_"),
    (r"^(?:backbone\.body\.layer4|roi_heads\.res5)\.", "backbone.body.layer4."),
    (r"^backbone\.body\.layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch"),
    (r"branchconv(\d)\.weight", lambda m: f"branch2{'abc'[int(m[1]) - 1]}_w"),
    (r"branchbn(\d)\.", lambda m: f"branch2{'abc'[int(m[1]) - 1]}_bn_"),
    (r"branchdownsample\.0\.weight", "branch1_w"),
    (r"branchdownsample\.1\.", "branch1_bn_"),
    (r"bn_weight", "bn_s"), (r"bn_bias", "bn_b"),
    (r"^backbone\.fpn\.inner_blocks\.3\.", "fpn_inner_res5_2_sum."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.",
     lambda m: f"fpn_inner_res{int(m[1]) + 2}_{LAST[str(int(m[1]) + 2)]}_sum_lateral."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.", lambda m: f"fpn_res{int(m[1]) + 2}_{LAST[str(int(m[1]) + 2)]}_sum."),
    (r"^rpn\.head\.conv\.0\.0", "conv_rpn_fpn2"),
    (r"^rpn\.head\.(cls_logits|bbox_pred)", r"rpn_\1_fpn2"),
    (r"^roi_heads\.box_head\.(fc\d)", r"\1"),
    (r"^roi_heads\.box_head\.5\.", "fc6."),
    (r"^roi_heads\.box_head\.(\d)\.", lambda m: f"head_conv{int(m[1]) + 1}."),
    (r"^roi_heads\.box_predictor\.", ""),
    (r"^roi_heads\.mask_head\.(\d)\.", lambda m: f"_[mask]_fcn{int(m[1]) + 1}."),
    (r"^roi_heads\.mask_predictor\.", ""),
    (r"\.1\.weight", "_gn_s"), (r"\.1\.bias", "_gn_b"),
    (r"(?:\.0)?\.weight", "_w"), (r"(?:\.0)?\.bias", "_b"),
]  # fmt: skip


def to_theirs(format: str, config: ModelConfig) -> Callable[[str], str]:
    """Their name of a weight of ours in a network of this configuration."""
    grouped = config.norm == "group_norm"
    rules = {"detectron2": DETECTRON2, "maskrcnn-benchmark": BENCHMARK, "caffe2": CAFFE2, "torchvision": []}[format]
    if format == "detectron2" and config.features != "fpn":
        rules = [*rules, (r"bottom_up\.", "")]
    if format == "maskrcnn-benchmark":
        head = [rules[5], XCONVS[3 if grouped else 2]]
        rules = [*head, *rules] if grouped else [*head, *rules, *PLAIN]
    if format == "caffe2" and grouped:
        rules = [*rules, (r"^res_conv1_bn_", "conv1_gn_"), (r"_bn_", "_gn_")]
    if format == "caffe2" and config.features != "fpn":
        rules = [*rules, (r"_fpn2", "")]

    def rename(name: str) -> str:
        for pattern, template in rules:
            name = re.sub(pattern, template, name)
        return name

    return rename


R50 = {"backbone": "resnet50", "weights": "none"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fpn": {},
    "c4": {"features": "c4", "box_head": "res5", "mask_head_convs": 0, "box_pool_size": 14, "mask_pool_size": 14},
    "c5": {"features": "c5", "res5_dilation": 2},
    "gn": {"norm": "group_norm", "box_head": "conv"},
    "conv head without norm": {"box_head": "conv"},
    "x101": {"backbone": "resnext101_32x8d"},
    "no masks": {"task": "box"},
}
FORMATS = ("detectron2", "maskrcnn-benchmark", "caffe2", "torchvision")


def on_meta(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = MaskRCNN(config, CLASSES).state_dict()
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_of_a_published_layout_has_its_place(format: str, layout: str) -> None:
    config = ModelConfig(**(R50 | LAYOUTS[layout]))
    ours = on_meta(config)
    rename = to_theirs(format, config)
    theirs = {rename(name): value for name, value in ours.items() if "running" not in name or format != "caffe2"}
    assert len(theirs) == sum("running" not in name or format != "caffe2" for name in ours), "two have one name"
    named = rename_weights(StoredWeights(theirs), config, "a test")
    assert named.format == format
    assert not named.unused
    assert set(named.tensors) == set(ours)


def test_published_names_are_spelt_as_they_were_published() -> None:
    """Some of each project's names, copied from checkpoints: a check on the tables above."""
    fpn, grouped = ModelConfig(**R50), ModelConfig(**(R50 | LAYOUTS["gn"]))
    c4 = ModelConfig(**(R50 | LAYOUTS["c4"]))
    spelt = {
        ("detectron2", fpn): "backbone.bottom_up.res2.0.shortcut.norm.running_var backbone.fpn_lateral5.bias "
        "proposal_generator.rpn_head.anchor_deltas.weight roi_heads.mask_head.mask_fcn4.bias "
        "backbone.bottom_up.stem.conv1.norm.bias",
        ("detectron2", c4): "roi_heads.res5.2.conv3.norm.weight backbone.res4.5.conv1.weight",
        ("detectron2", grouped):
        "roi_heads.box_head.conv4.norm.weight roi_heads.box_head.fc1.bias backbone.fpn_output2.norm.bias",
        ("caffe2", fpn): "conv1_w res_conv1_bn_s res4_5_branch2c_bn_b "
        "fpn_inner_res4_5_sum_lateral_w fpn_inner_res5_2_sum_b "
        "fpn_res2_2_sum_w conv_rpn_fpn2_b rpn_cls_logits_fpn2_w fc6_w cls_score_b "
        "_[mask]_fcn1_w conv5_mask_b mask_fcn_logits_w",
        ("caffe2", c4): "conv_rpn_w rpn_bbox_pred_b res5_0_branch1_w",
        ("caffe2", grouped):
        "conv1_gn_s res3_0_branch1_gn_b fpn_res3_3_sum_gn_s head_conv2_gn_b _[mask]_fcn3_gn_s fc6_b",
        ("maskrcnn-benchmark", fpn): "backbone.body.stem.bn1.running_var backbone.body.layer3.5.bn2.bias "
        "backbone.fpn.fpn_inner1.weight "
        "rpn.head.conv.bias roi_heads.box.feature_extractor.fc7.weight roi_heads.mask.feature_extractor.mask_fcn2.bias",
        ("maskrcnn-benchmark", c4):
        "roi_heads.box.feature_extractor.head.layer4.0.downsample.1.weight roi_heads.box.predictor.bbox_pred.bias",
        ("maskrcnn-benchmark", grouped): "roi_heads.box.feature_extractor.xconvs.10.weight "
        "backbone.fpn.fpn_layer4.1.bias "
        "roi_heads.mask.feature_extractor.mask_fcn1.0.weight",
    }  # fmt: skip
    for (format, config), names in spelt.items():
        known = {to_theirs(format, config)(name) for name in on_meta(config)}
        assert set(names.split()) <= known, format


def saved(path: Path, format: str, state: dict[str, Tensor]) -> Path:
    """As the project writes it."""
    arrays = {name: value.numpy() for name, value in state.items()}
    if format == "caffe2":
        arrays |= {"conv1_w_momentum": np.zeros(1, np.float32), "lr": np.zeros(1, np.float32)}
        path.write_bytes(pickle.dumps({"blobs": arrays}, protocol=2))
    elif format == "detectron2":
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"model": wrapped, "optimizer": {"state": {}}, "iteration": 9}, path)
    return path


BGR = {"pixel_order": "bgr", "pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (1.0, 1.0, 1.0)}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "detectron2": BGR | {"conventions": "detectron2"},
    "caffe2": BGR | {"conventions": "torchvision"},
    "maskrcnn-benchmark": BGR | {"conventions": "torchvision"},
}


def foreign(format: str, state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights as another project has them: names, order of classes, statistics of norms."""
    theirs = {name: value.clone() for name, value in state.items() if not name.endswith("num_batches_tracked")}
    if format == "detectron2":
        for name, value in theirs.items():
            if "cls_score" in name:
                theirs[name] = value.roll(-1, 0)
            elif "box_predictor.bbox_pred" in name and not config.class_agnostic_boxes:
                theirs[name] = value[4:]
            elif "mask_fcn_logits" in name:
                theirs[name] = value[1:]
    elif config.class_agnostic_boxes:
        for name in [name for name in theirs if "box_predictor.bbox_pred" in name]:
            theirs[name] = torch.cat([torch.ones_like(theirs[name]), theirs[name]])  # a background, too
    return {to_theirs(format, config)(name): value for name, value in theirs.items()}


def is_background(name: str, value: Tensor) -> Tensor:
    """Rows that mean nothing and that Detectron2 does not have."""
    rows = 4 if "box_predictor.bbox_pred" in name else 1 if "mask_fcn_logits" in name else 0
    return torch.arange(len(value)) < rows


@pytest.mark.parametrize("format", CONVENTIONS)
@pytest.mark.parametrize("agnostic", [False, True])
def test_values_arrive_where_they_belong(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig], format: str, agnostic: bool
) -> None:
    changes = CONVENTIONS[format] | {"class_agnostic_boxes": agnostic}
    source = MaskRCNN(tiny_config(**changes), CLASSES).state_dict()
    config = tiny_config(weights=str(tmp_path / "weights.pkl"), **changes)
    saved(tmp_path / "weights.pkl", format, foreign(format, source, config))
    torch.manual_seed(1)
    model = MaskRCNN(config, CLASSES)
    report = load_weights(model, config, ["a", "b", "c"], [1, 2, 3])
    assert not report.initialised
    assert report.matched == len(source)
    for name, value in model.state_dict().items():
        expected = source[name]
        if format == "detectron2" and not (agnostic and "bbox_pred" in name):
            nothing = is_background(name, value) if not name.startswith("rpn.") else torch.zeros(len(value)).bool()
            assert not value[nothing].any()
            value, expected = value[~nothing], expected[~nothing]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("format", ["caffe2", "maskrcnn-benchmark"])
def test_affine_norms_keep_their_scale(tiny_config: Callable[..., ModelConfig], format: str) -> None:
    """Detectron's norms are a factor and a summand alone; maskrcnn-benchmark's have statistics and no eps."""
    config = tiny_config(backbone="resnet18", norm="frozen_batch_norm")
    model = MaskRCNN(config, CLASSES)
    state = {name: value for name, value in model.state_dict().items() if "running" not in name}
    state["backbone.body.bn1.weight"] = torch.full((64,), 3.0)
    if format == "maskrcnn-benchmark":
        state |= {
            "backbone.body.bn1.running_mean": torch.zeros(64),
            "backbone.body.bn1.running_var": torch.full((64,), 4.0),
        }
    named = rename_weights(StoredWeights({to_theirs(format, config)(n): v for n, v in state.items()}), config, "a test")
    model.load_state_dict(named.tensors)
    scale, shift = model.backbone.body.bn1.scale_and_shift()
    torch.testing.assert_close(scale, torch.full((64,), 3.0 if format == "caffe2" else 1.5), rtol=1e-6, atol=0)
    assert not shift.any()


def test_an_imagenet_pickle_fills_the_body_and_names_what_starts_at_random(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    config = tiny_config(backbone="resnet18", norm="frozen_batch_norm", weights=str(tmp_path / "R.pkl"), **BGR)
    state = MaskRCNN(config, CLASSES).state_dict()
    body = {to_theirs("caffe2", config)(n): v for n, v in state.items() if ".body." in n and "running" not in n}
    body |= {"fc1000_w": torch.ones(2, 2), "conv1_b": torch.zeros(64)}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps({name: value.numpy() for name, value in body.items()}, protocol=2))
    report = load_weights(MaskRCNN(config, CLASSES), config, ["a", "b", "c"], [1, 2, 3])
    assert set(report.unused) == {"fc1000_w", "conv1_b"}
    assert {name.split(".")[0] for name in report.initialised} == {"backbone", "rpn", "roi_heads"}
    assert not any(name.startswith("backbone.body.") for name in report.initialised)
    assert "Detectron's (Caffe2) names" in str(report)


def test_another_number_of_classes_restarts_the_predictors_alone(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    source = MaskRCNN(tiny_config(**CONVENTIONS["detectron2"]), 5)
    config = tiny_config(weights=str(tmp_path / "five.pkl"), **CONVENTIONS["detectron2"])
    saved(tmp_path / "five.pkl", "detectron2", foreign("detectron2", source.state_dict(), config))
    report = load_weights(MaskRCNN(config, CLASSES), config, ["a", "b", "c"], [1, 2, 3])
    assert set(report.initialised.values()) == {"another number of classes"}
    assert len(report.initialised) == 6
    assert "6 start at random: another number of classes" in str(report)


def test_names_before_torchvision_0_13_are_known(tiny_config: Callable[..., ModelConfig]) -> None:
    """The published detectors have them."""
    config = tiny_config(backbone="resnet18", norm="frozen_batch_norm")
    ours = on_meta(config)
    old = {
        re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", name)
        .replace("rpn.head.conv.0.0", "rpn.head.conv")
        .replace(".0.weight" if "_blocks" in name else "\0", ".weight")
        .replace(".0.bias" if "_blocks" in name else "\0", ".bias"): value
        for name, value in ours.items()
    }
    assert "backbone.fpn.inner_blocks.0.weight" in old
    named = rename_weights(StoredWeights(old), config, "a test")
    assert set(named.tensors) == set(ours)


def test_names_of_no_known_format_are_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(WeightsError, match=r"must have names of torchvision.*got \['blocks\.0\.attn'\]"):
        rename_weights(StoredWeights({"blocks.0.attn": torch.zeros(1)}), tiny_config(), "vit.pth")
    detector = {"backbone.layer1.0.conv1.weight": torch.zeros(1), "neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="OpenMMLab's classifiers"):  # only the body of it would be used
        rename_weights(StoredWeights(detector), tiny_config(), "mask_rcnn.pth")
