"""Names of weights: from those of Detectron (Caffe2), maskrcnn-benchmark, Detectron2 and torchvision to ours.

Also from OpenMMLab's classifiers; timm's ResNets have torchvision's names. Ours are torchvision's too
(`maskrcnn_resnet50_fpn`), except that with features c4 layer4 is `roi_heads.res5`. Formats
differ in more than names: Detectron2 has background last in the classifier and no rows for it among boxes and masks,
and frozen batch norms are stored with or without eps.
Sources: the published checkpoints' names, as read by Detectron2 (checkpoint/c2_model_loading.py) and
maskrcnn-benchmark (utils/c2_model_loading.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.layers import FrozenBatchNorm2d
from model.weights.file import StoredWeights, WeightsError

Format = Literal["caffe2", "maskrcnn-benchmark", "detectron2", "torchvision", "openmmlab"]
Rule = tuple[str, Callable[[re.Match[str], ModelConfig], str | None]]  # pattern of a full name → our name, None: unused

DESCRIPTIONS: dict[Format, str] = {
    "caffe2": "Detectron's (Caffe2) names",
    "maskrcnn-benchmark": "maskrcnn-benchmark's names",
    "detectron2": "Detectron2's names",
    "torchvision": "torchvision's names",
    "openmmlab": "OpenMMLab's names",
}
BODIES = ("backbone.body.", "roi_heads.res5.")
_CAFFE2_PARAMETERS = {"w": "weight", "s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"} | {
    "rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"
}  # fmt: skip
_CAFFE2_CONVS = {
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2c": ("conv3", "bn3"),
}


@dataclass(frozen=True)
class NamedWeights:
    """Weights under our names."""

    format: Format
    tensors: dict[str, Tensor]
    unused: dict[str, str]  # name in the file → reason why it is not used

    @property
    def is_body_alone(self) -> bool:
        """True for a classifier, with which everything but the body starts at random."""
        return all(name.startswith(BODIES) for name in self.tensors)


def rename_weights(stored: StoredWeights, config: ModelConfig, source: str) -> NamedWeights:
    """Give weights our names and our order of classes.

    Raises:
        WeightsError: if the names are of no known format.
    """
    found = {
        name.removeprefix("module."): value  # prefix of DataParallel
        for name, value in stored.tensors.items()
        if not name.endswith("num_batches_tracked")
    }
    format = _format_of(found, source)
    tensors: dict[str, Tensor] = {}
    unused: dict[str, str] = {}
    for name, value in found.items():
        ours, reason = _our_name(name, format, config)
        if ours is None:
            unused[name] = reason
        elif ours in tensors:
            unused[name] = f"shared with {ours}"
        else:
            tensors[ours] = value
    if format in ("caffe2", "maskrcnn-benchmark") and config.norm != "group_norm":
        _add_statistics(tensors)
    return NamedWeights(
        format, {name: _our_rows(name, value, format, config) for name, value in tensors.items()}, unused
    )


def body_name(name: str, config: ModelConfig) -> str:
    """Our name of a classifier's parameter: `layer4.0.bn1.bias` → `backbone.body.layer4.0.bn1.bias`."""
    if config.features == "c4" and name.startswith("layer4."):
        return name.replace("layer4.", "roi_heads.res5.", 1)
    return f"backbone.body.{name}"


def _format_of(names: Mapping[str, Tensor], source: str) -> Format:
    marks: dict[str, Format] = {
        r"res2_0_branch2a_w": "caffe2",
        r"(backbone\.(bottom_up\.)?)?res2\.0\.conv1\.weight": "detectron2",
        r"backbone\.body\.stem\.conv1\.weight": "maskrcnn-benchmark",
        r"(backbone\.body\.)?(layer1\.0\.conv1|features\.0\.0)\.weight": "torchvision",
    }
    if not any(name.startswith(("neck.", "rpn_head.", "roi_head.")) for name in names):
        marks[r"backbone\.layer1\.0\.conv1\.weight"] = "openmmlab"  # classifiers; their detectors are not known
    for mark, format in marks.items():
        if any(re.fullmatch(mark, name) for name in names):
            return format
    raise WeightsError(
        f"{source}: must have names of torchvision, Detectron, Detectron2, maskrcnn-benchmark or OpenMMLab's "
        "classifiers, or our own, got "
        f"{list(names)[:3]}"
    )


def _our_name(name: str, format: Format, config: ModelConfig) -> tuple[str | None, str]:
    """Our name, or None and the reason."""
    for pattern, rename in _RULES[format]:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return rename(match, config), "not needed for detection here"
    return None, "unknown"


def _add_statistics(tensors: dict[str, Tensor]) -> None:
    """Add statistics to affine norms, and subtract our eps from the variance, since these formats use none."""
    for name in [name for name in tensors if re.search(r"\.(bn\d|downsample\.1)\.weight$", name)]:
        stem = name.removesuffix("weight")
        tensors.setdefault(f"{stem}running_mean", torch.zeros_like(tensors[name]))
        variance = tensors.get(f"{stem}running_var", torch.ones_like(tensors[name]))
        tensors[f"{stem}running_var"] = variance - FrozenBatchNorm2d.eps


def _our_rows(name: str, value: Tensor, format: Format, config: ModelConfig) -> Tensor:
    """Reorder the rows of predictors to background first, with rows for every class."""
    if name.startswith("roi_heads.box_predictor.bbox_pred."):
        if config.class_agnostic_boxes:
            return value[4:] if len(value) == 8 else value  # Detectron's also has rows for background
        return torch.cat([torch.zeros_like(value[:4]), value]) if format == "detectron2" else value
    if format == "detectron2" and name.startswith("roi_heads.box_predictor.cls_score."):
        return torch.cat([value[-1:], value[:-1]])
    if format == "detectron2" and name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
        return torch.cat([torch.zeros_like(value[:1]), value])
    return value


def _not_needed(_match: re.Match[str], _config: ModelConfig) -> None:
    return None


def _same(match: re.Match[str], _config: ModelConfig) -> str:
    return match[0]


def _to(template: str) -> Callable[[re.Match[str], ModelConfig], str]:
    """Rule that expands a template of `re` with the groups of the match."""
    return lambda match, _config: match.expand(template)


def _body(template: str) -> Callable[[re.Match[str], ModelConfig], str]:
    return lambda match, config: body_name(match.expand(template), config)


def _stage(match: re.Match[str], config: ModelConfig) -> str:
    """Rename a parameter such as Detectron2's `res2.0.conv1.norm.bias`."""
    stage, block, conv, is_norm, parameter = match.groups()
    if conv == "shortcut":
        module = "downsample.1" if is_norm else "downsample.0"
    else:
        module = f"bn{conv[-1]}" if is_norm else conv
    return body_name(f"layer{int(stage) - 1}.{block}.{module}.{parameter}", config)


def _caffe2_stage(match: re.Match[str], config: ModelConfig) -> str:
    """Rename a parameter such as Detectron's `res2_0_branch2a_bn_s`."""
    stage, block, branch, norm, parameter = match.groups()
    module = _CAFFE2_CONVS[branch][1 if norm else 0]
    return body_name(f"layer{int(stage) - 1}.{block}.{module}.{_CAFFE2_PARAMETERS[parameter]}", config)


def _caffe2(module: Callable[[re.Match[str], ModelConfig], str]) -> Callable[[re.Match[str], ModelConfig], str]:
    """Rule that appends to a module's name the parameter named by the last group."""
    return lambda match, config: f"{module(match, config)}.{_CAFFE2_PARAMETERS[match.groups()[-1]]}"


def _layer(parent: str, first: int) -> Callable[[re.Match[str], ModelConfig], str]:
    """Rule for numbered convolutions: `parent.<number - first>.<0, or 1 for its norm>`; groups: number, norm marker."""
    return lambda match, _config: f"{parent}.{int(match[1]) - first}.{1 if match[2] else 0}"


def _named_layer(parent: str, first: int) -> Callable[[re.Match[str], ModelConfig], str]:
    """Rule like `_layer` that also appends the third group, the parameter."""
    layer = _layer(parent, first)
    return lambda match, config: f"{layer(match, config)}.{match[3]}"


def _sequence_layer(parent: str) -> Callable[[re.Match[str], ModelConfig], str]:
    """Rule like `_named_layer` with first 1, whose marker is maskrcnn-benchmark's index in a sequence, `0.` or `1.`."""
    return lambda match, _config: f"{parent}.{int(match[1]) - 1}.{(match[2] or '0.')[0]}.{match[3]}"


def _xconv(match: re.Match[str], config: ModelConfig) -> str:
    """Rename a layer of maskrcnn-benchmark's convolutional box head: convolution, norm if any, ReLU in turn."""
    step = 2 if config.norm_of_heads == "none" else 3
    return f"roi_heads.box_head.{int(match[1]) // step}.{int(match[1]) % step}.{match[2]}"


def _first_linear(match: re.Match[str], config: ModelConfig) -> str:
    """Name of the first fully connected layer of the box head, which may follow convolutions."""
    return f"roi_heads.box_head.{config.box_head_convs + 1 if config.box_head == 'conv' else 'fc6'}"


def _named_first_linear(match: re.Match[str], config: ModelConfig) -> str:
    return f"{_first_linear(match, config)}.{match[1]}"


_P = r"(weight|bias)"
_N = r"(weight|bias|running_mean|running_var)"
_BODY = r"(?:conv1|bn1|layer\d|features)\..+"
_CLASSIFIER: Rule = (r"(?:stem\.)?(?:fc|linear)\..*", _not_needed)
_C = "_(w|b)"
_G = "(_gn)?_(w|b|s)"

_RULES: dict[Format, tuple[Rule, ...]] = {
    "torchvision": (
        _CLASSIFIER,
        (r"(?:classifier|norm|head)\..+", _not_needed),  # ConvNeXt and Swin
        (_BODY, _body(r"\g<0>")),
        (rf"backbone\.body\.({_BODY})", _body(r"\1")),
        # Names before torchvision 0.13, which all its published detectors have:
        (rf"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.{_P}", _to(r"\1.0.\2")),
        (rf"rpn\.head\.conv\.{_P}", _to(r"rpn.head.conv.0.0.\1")),
        (rf"roi_heads\.mask_head\.mask_fcn(\d)()\.{_P}", _named_layer("roi_heads.mask_head", 1)),
        (r"(?:backbone\.fpn|rpn\.head|roi_heads)\..+", _same),
    ),
    "openmmlab": (
        (r"head\..+", _not_needed),
        (rf"backbone\.({_BODY})", _body(r"\1")),
    ),
    "maskrcnn-benchmark": (
        (r"backbone\.body\.stem\.((?:conv1|bn1)\..+)", _body(r"\1")),
        (rf"backbone\.body\.({_BODY})", _body(r"\1")),
        (r"roi_heads\.(?:box|mask)\.feature_extractor\.head\.(layer4\..+)", _body(r"\1")),
        (rf"backbone\.fpn\.fpn_inner(\d)\.([01]\.)?{_P}", _sequence_layer("backbone.fpn.inner_blocks")),
        (rf"backbone\.fpn\.fpn_layer(\d)\.([01]\.)?{_P}", _sequence_layer("backbone.fpn.layer_blocks")),
        (r"rpn\.anchor_generator\..+", _not_needed),
        (rf"rpn\.head\.conv\.{_P}", _to(r"rpn.head.conv.0.0.\1")),
        (r"rpn\.head\.(?:cls_logits|bbox_pred)\..+", _same),
        (rf"roi_heads\.box\.feature_extractor\.xconvs\.(\d+)\.{_P}", _xconv),
        (rf"roi_heads\.box\.feature_extractor\.fc6\.{_P}", _named_first_linear),
        (rf"roi_heads\.box\.feature_extractor\.fc7\.{_P}", _to(r"roi_heads.box_head.fc7.\1")),
        (r"roi_heads\.(box|mask)\.predictor\.(.+)", _to(r"roi_heads.\1_predictor.\2")),
        (
            rf"roi_heads\.mask\.feature_extractor\.mask_fcn(\d)\.([01]\.)?{_P}",
            _sequence_layer("roi_heads.mask_head"),
        ),
    ),
    "detectron2": (
        _CLASSIFIER,
        (r"pixel_(?:mean|std)", _not_needed),
        (r"proposal_generator\.anchor_generator\..+", _not_needed),
        (r"(?:backbone\.(?:bottom_up\.)?)?stem\.conv1\.weight", _body("conv1.weight")),
        (rf"(?:backbone\.(?:bottom_up\.)?)?stem\.conv1\.norm\.{_N}", _body(r"bn1.\1")),
        (
            rf"(?:backbone\.(?:bottom_up\.)?|roi_heads\.)?res(\d)\.(\d+)\.(conv\d|shortcut)\.(norm\.)?{_N}",
            _stage,
        ),
        (rf"backbone\.fpn_lateral(\d)\.(norm\.)?{_P}", _named_layer("backbone.fpn.inner_blocks", 2)),
        (rf"backbone\.fpn_output(\d)\.(norm\.)?{_P}", _named_layer("backbone.fpn.layer_blocks", 2)),
        (rf"proposal_generator\.rpn_head\.conv\.{_P}", _to(r"rpn.head.conv.0.0.\1")),
        (rf"proposal_generator\.rpn_head\.objectness_logits\.{_P}", _to(r"rpn.head.cls_logits.\1")),
        (rf"proposal_generator\.rpn_head\.anchor_deltas\.{_P}", _to(r"rpn.head.bbox_pred.\1")),
        (rf"roi_heads\.box_head\.conv(\d)\.(norm\.)?{_P}", _named_layer("roi_heads.box_head", 1)),
        (rf"roi_heads\.box_head\.fc1\.{_P}", _named_first_linear),
        (rf"roi_heads\.box_head\.fc2\.{_P}", _to(r"roi_heads.box_head.fc7.\1")),
        (rf"roi_heads\.box_predictor\.(?:cls_score|bbox_pred)\.{_P}", _same),
        (rf"roi_heads\.mask_head\.mask_fcn(\d)\.(norm\.)?{_P}", _named_layer("roi_heads.mask_head", 1)),
        (rf"roi_heads\.mask_head\.deconv\.{_P}", _to(r"roi_heads.mask_predictor.conv5_mask.\1")),
        (rf"roi_heads\.mask_head\.predictor\.{_P}", _to(r"roi_heads.mask_predictor.mask_fcn_logits.\1")),
    ),
    "caffe2": (
        (r".*_momentum|(?:fc1000|pred)_[wb]|conv1_b|lr|weight_order", _not_needed),
        (r"conv1_w", _body("conv1.weight")),
        (
            r"(?:res_)?conv1_(?:bn|gn)_(s|b|gamma|beta|rm|riv|running_mean|running_var)",
            _caffe2(_body("bn1")),
        ),
        (
            r"res(\d)_(\d+)_branch(1|2a|2b|2c)(_bn|_gn)?_(w|s|b|gamma|beta|rm|riv|running_mean|running_var)",
            _caffe2_stage,
        ),
        (rf"fpn_inner_res(\d)_\d+_sum(?:_lateral)?{_G}", _caffe2(_layer("backbone.fpn.inner_blocks", 2))),
        (rf"fpn_res(\d)_\d+_sum{_G}", _caffe2(_layer("backbone.fpn.layer_blocks", 2))),
        (rf"conv_rpn(?:_fpn2)?{_C}", _caffe2(_to("rpn.head.conv.0.0"))),
        (rf"rpn_cls_logits(?:_fpn2)?{_C}", _caffe2(_to("rpn.head.cls_logits"))),
        (rf"rpn_bbox_pred(?:_fpn2)?{_C}", _caffe2(_to("rpn.head.bbox_pred"))),
        (rf"head_conv(\d){_G}", _caffe2(_layer("roi_heads.box_head", 1))),
        (rf"fc6{_C}", _caffe2(_first_linear)),
        (rf"fc7{_C}", _caffe2(_to("roi_heads.box_head.fc7"))),
        (rf"(cls_score|bbox_pred){_C}", _caffe2(_to(r"roi_heads.box_predictor.\1"))),
        (rf"_(?:\[mask\]|mask)_fcn(\d){_G}", _caffe2(_layer("roi_heads.mask_head", 1))),
        (rf"(conv5_mask|mask_fcn_logits){_C}", _caffe2(_to(r"roi_heads.mask_predictor.\1"))),
    ),
}
