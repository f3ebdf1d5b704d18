"""torchvision's Mask R-CNN or Faster R-CNN with our configuration, for comparison in benchmarks.

It has the same layers, names and weights, and the same numbers of proposals, samples and detections. Its resizing and
mask pasting are off: both networks end with 28 × 28 masks.
"""

from functools import partial
from typing import Any

import pycocotools.mask as coco_mask
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from model.config import ModelConfig
from model.structures import Batch

_LEVELS = ["0", "1", "2", "3"]  # torchvision's names of P2 to P5
_STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")
_NORMS: dict[str, Any] = {
    "frozen_batch_norm": FrozenBatchNorm2d,
    "batch_norm": nn.BatchNorm2d,
    "sync_batch_norm": nn.BatchNorm2d,  # the comparison is of one process
    "group_norm": partial(nn.GroupNorm, 32),
    "none": None,
}


class _NormalizeOnly(GeneralizedRCNNTransform):
    """Transform that only normalises and pads; sizes and results are unchanged."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result


def has_twin(model: ModelConfig) -> bool:
    """True if torchvision can build this network: a ResNet-FPN of its width, strides in the 3×3, RGB; anchors, RoIAlign
    may differ.
    """
    is_torchvisions = model.features == "fpn" and not model.stride_in_1x1 and model.pixel_order == "rgb"
    has_body = model.is_resnet and model.stem_channels == 64
    return is_torchvisions and has_body and model.task != "proposals" and not model.class_agnostic_boxes


def torchvision_twin(model: ModelConfig, num_classes: int) -> FasterRCNN:
    """Build torchvision's network for `load_state_dict(ours.state_dict())`; `num_classes` excludes background."""
    assert has_twin(model)
    classes = num_classes + 1
    ratios = (tuple(model.aspect_ratios),) * len(model.anchor_sizes_px)
    network = (MaskRCNN if model.task == "mask" else FasterRCNN)(
        _backbone(model),
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in model.anchor_sizes_px), ratios),
        rpn_head=RPNHead(model.fpn_channels, len(model.aspect_ratios), model.rpn_convs),
        box_roi_pool=MultiScaleRoIAlign(_LEVELS, model.box_pool_size, model.sampling_ratio),
        box_head=_box_head(model),
        box_predictor=FastRCNNPredictor(model.box_head_channels, classes),
        **(_mask_head(model, classes) if model.task == "mask" else {}),
        **_numbers(model),
    )
    mean, std = ([value / 255 for value in values] for values in (model.pixel_mean, model.pixel_std))
    network.transform = _NormalizeOnly(1, 1, mean, std)
    return network


def _box_head(model: ModelConfig) -> nn.Module:
    if model.box_head == "mlp":
        return TwoMLPHead(model.fpn_channels * model.box_pool_size**2, model.box_head_channels)
    size = (model.fpn_channels, model.box_pool_size, model.box_pool_size)
    convs = [model.box_head_conv_channels] * model.box_head_convs
    return FastRCNNConvFCHead(size, convs, [model.box_head_channels], norm_layer=_NORMS[model.norm_of_heads])


def _mask_head(model: ModelConfig, classes: int) -> dict[str, nn.Module]:
    widths = [model.mask_head_channels] * model.mask_head_convs
    last = [model.fpn_channels, *widths][-1]
    return {
        "mask_roi_pool": MultiScaleRoIAlign(_LEVELS, model.mask_pool_size, model.sampling_ratio),
        "mask_head": MaskRCNNHeads(model.fpn_channels, widths, 1, norm_layer=_NORMS[model.norm_of_heads]),
        "mask_predictor": MaskRCNNPredictor(last, model.mask_head_channels, classes),
    }


def torchvision_images(batch: Batch) -> list[Tensor]:
    """Convert a batch's images to torchvision's format: [3, h, w] float32, 0 to 1, contiguous, without padding."""
    sizes = batch.image_sizes.tolist()
    return [(image[:, :h, :w] / 255).contiguous() for image, (h, w) in zip(batch.images, sizes, strict=True)]


def torchvision_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """Convert ground truth to torchvision's format, with a dense mask per instance; outlines must have one part."""
    targets = batch.targets
    assert targets is not None
    rows, polygons = targets.gt_boxes.shape[1], targets.polygons
    first_part, first_vertex = polygons.instance_offsets.tolist(), polygons.part_offsets.tolist()
    result = []
    for n, (count, (height, width)) in enumerate(zip(targets.num_gt.tolist(), batch.image_sizes.tolist(), strict=True)):
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for g in range(count):
            part = first_part[n * rows + g]
            outline = polygons.xy[first_vertex[part] : first_vertex[part + 1]].flatten().tolist()
            masks[g] = torch.from_numpy(coco_mask.decode(coco_mask.frPyObjects([outline], height, width))[..., 0])
        boxes, labels = targets.gt_boxes[n, :count], targets.gt_labels[n, :count]
        result.append({"boxes": boxes, "labels": labels, "masks": masks})
    return result


def _backbone(model: ModelConfig) -> BackboneWithFPN:
    """Build torchvision's `resnet_fpn_backbone`, but with any width."""
    body = getattr(torchvision.models, model.backbone)(weights=None, norm_layer=_NORMS[model.norm])
    frozen = _STAGES[: model.frozen_stages] + (("bn1",) if model.frozen_stages else ())
    for name, parameter in body.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    widths = [body.inplanes // 2**k for k in (3, 2, 1, 0)]
    return BackboneWithFPN(
        body,
        return_layers={f"layer{k + 1}": level for k, level in enumerate(_LEVELS)},
        in_channels_list=widths,
        out_channels=model.fpn_channels,
        norm_layer=_NORMS[model.norm_of_heads],
    )


def _numbers(model: ModelConfig) -> dict[str, float]:
    """Counts and thresholds by torchvision's names."""
    return {
        "rpn_pre_nms_top_n_train": model.rpn_pre_nms_top_n_train,
        "rpn_pre_nms_top_n_test": model.rpn_pre_nms_top_n_test,
        "rpn_post_nms_top_n_train": model.rpn_post_nms_top_n_train,
        "rpn_post_nms_top_n_test": model.rpn_post_nms_top_n_test,
        "rpn_nms_thresh": model.rpn_nms_iou,
        "rpn_fg_iou_thresh": model.rpn_fg_iou,
        "rpn_bg_iou_thresh": model.rpn_bg_iou,
        "rpn_batch_size_per_image": model.rpn_batch_size,
        "rpn_positive_fraction": model.rpn_positive_fraction,
        "box_score_thresh": model.score_threshold,
        "box_nms_thresh": model.nms_iou,
        "box_detections_per_img": model.detections_per_image,
        "box_fg_iou_thresh": model.roi_fg_iou,
        "box_bg_iou_thresh": model.roi_bg_iou,
        "box_batch_size_per_image": model.roi_batch_size,
        "box_positive_fraction": model.roi_positive_fraction,
    }
