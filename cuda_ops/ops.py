"""The operators, as the rest of the code calls them: arguments are checked here, then a compiled kernel or plain torch computes.

Shapes: N images, A anchors or boxes, G ground-truth rows (padded), L levels, K boxes of a row, R rows or RoIs, M mask side.
Boxes are (x1, y1, x2, y2) in pixels; sizes are (height, width). Apart from `encode_masks`, output shapes follow from input
shapes and no operator makes the host wait for the device.
"""

from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from cuda_ops import library, reference
from cuda_ops.checks import (
    is_integer,
    kind,
    require,
    require_boxes,
    require_conventions,
    require_one_device,
    require_pyramid,
    shape_of,
)
from cuda_ops.reference.anchors import Conventions
from cuda_ops.reference.masks import RunLengthCode
from cuda_ops.reference.polygons import PackedPolygons

if library.HAS_CPU:
    from cuda_ops import compiled


def generate_anchors(
    feature_sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    conventions: Conventions = "detectron2",
) -> Tensor:
    """Anchors of every cell of every level.

    Args:
        feature_sizes: (height, width) of each level's feature map, finest first.
        image_size: padded (height, width) in pixels, from which the strides of the levels follow, see `conventions`.
        sizes: sides of a square anchor in pixels, as many for each level.
        aspect_ratios: height / width, shared by all levels.
        device: where the anchors are made.
        dtype: a floating type.
        conventions: torchvision: corners relative to the cell are rounded to whole pixels, and a level's stride is image_size // feature
            size on either axis. detectron2: nothing is rounded, and strides are powers of two.

    Returns:
        [A, 4], ordered by level, y, x, and within a cell by ratio and size (torchvision) or by size and ratio (detectron2).

    Raises:
        ValueError: if the levels of feature_sizes and sizes differ, an argument is empty or not positive, or the conventions are unknown.

    Source: Faster R-CNN (arXiv:1506.01497), FPN (arXiv:1612.03144); equals torchvision's AnchorGenerator, or Detectron2's
        DefaultAnchorGenerator.
    """
    op = "generate_anchors"
    require_conventions(op, conventions)
    require(len(feature_sizes) == len(sizes) > 0, op, "sizes", f"one a level, {len(feature_sizes)}", len(sizes))
    require(all(h > 0 and w > 0 for h, w in feature_sizes), op, "feature_sizes", "positive", list(feature_sizes))
    is_even = len({len(level) for level in sizes}) == 1 and len(sizes[0]) > 0
    require(is_even, op, "sizes", "as many for each level, one at least", [len(level) for level in sizes])
    flat_sizes = list(chain.from_iterable(sizes))
    require(min(*image_size, *flat_sizes) > 0, op, "image_size and sizes", "positive", (*image_size, *flat_sizes))
    require(min(aspect_ratios, default=0) > 0, op, "aspect_ratios", "positive, at least one", list(aspect_ratios))
    device = torch.get_default_device() if device is None else torch.device(device)
    return _serving(device).generate_anchors(
        feature_sizes, image_size, sizes, aspect_ratios, device, dtype, conventions
    )


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes1: [..., A, 4] float.
        boxes2: [..., B, 4] float, same dtype; leading dimensions broadcast.

    Returns:
        [..., A, B], 0 to 1, dtype of the boxes; what is less than float32 is computed in it. Two boxes without area have IoU 0.
        Gradient flows to both; plain torch computes it.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    require_boxes(boxes1, "box_iou", "boxes1")
    require_boxes(boxes2, "box_iou", "boxes2")
    require(boxes1.dtype == boxes2.dtype, "box_iou", "boxes2", f"{boxes1.dtype} as boxes1", boxes2.dtype)
    require_one_device("box_iou", boxes1=boxes1, boxes2=boxes2)
    return _serving(boxes1.device).box_iou(_widened(boxes1), _widened(boxes2)).to(boxes1.dtype)


def match_boxes(
    boxes: Tensor, gt_boxes: Tensor, num_gt: Tensor, fg_iou: float, bg_iou: float, low_quality: bool = False
) -> Tensor:
    """Give each box the ground truth it should learn, or the reason why not.

    Args:
        boxes: [N, A, 4] float, or [A, 4] shared by all images.
        gt_boxes: [N, G, 4] float; rows from num_gt[n] on are padding.
        num_gt: [N] int, on the same device. 0 is allowed.
        fg_iou: IoU from which a box learns its best ground truth (of equals, the lowest row).
        bg_iou: IoU below which a box is background; between the two it is ignored.
        low_quality: whether boxes that overlap some ground truth more than any other box does also learn (their own best
            ground truth), however low their IoU is, unless it is 0.

    Returns:
        [N, A] int64: a row of gt_boxes, or BACKGROUND (-1), or IGNORE (-2).

    Raises:
        ValueError: if bg_iou > fg_iou, or a shape or dtype is not as above.

    Source: Faster R-CNN (arXiv:1506.01497), section 3.1.2; equals torchvision's Matcher.
    """
    op = "match_boxes"
    require_boxes(boxes, op, "boxes", dims=(2, 3))
    require_boxes(gt_boxes, op, "gt_boxes", dims=(3,))
    require(boxes.dtype == gt_boxes.dtype, op, "gt_boxes", f"{boxes.dtype} as boxes", gt_boxes.dtype)
    num_images = gt_boxes.shape[0]
    require(boxes.dim() == 2 or boxes.shape[0] == num_images, op, "boxes", f"of {num_images} images", boxes.shape)
    require(is_integer(num_gt) and num_gt.shape == (num_images,), op, "num_gt", f"[{num_images}] int", kind(num_gt))
    require(bg_iou <= fg_iou, op, "bg_iou", f"at most fg_iou ({fg_iou})", bg_iou)
    require_one_device(op, boxes=boxes, gt_boxes=gt_boxes, num_gt=num_gt)
    own, gt_boxes = _widened(boxes), _widened(gt_boxes)
    return _serving(gt_boxes.device).match_boxes(own, gt_boxes, num_gt, fg_iou, bg_iou, low_quality)


def select_proposals(
    objectness: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    level_sizes: Sequence[int],
    pre_nms_top_n: int,
    min_size: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Of each level the boxes with the highest objectness, decoded and clipped: what goes into non-maximum suppression.

    Args:
        objectness: [N, A] float logits, levels one after another.
        box_deltas: [N, A, 4] float.
        anchors: [A, 4] float; its dtype is that of the result.
        image_sizes: [N, 2] (height, width) inside the padding, in pixels.
        level_sizes: anchors of each level; they sum to A.
        pre_nms_top_n: boxes to take of a level, at most.
        min_size: in pixels; boxes with a shorter side are marked.

    Returns:
        boxes [N, L, K, 4] with K = min(pre_nms_top_n, largest level), and scores [N, L, K] (probabilities), descending
        apart from marks: -inf marks boxes shorter than min_size and, where a level has fewer than K anchors, padding.
        No gradient flows.

    Raises:
        ValueError: if a shape or dtype is not as above, or pre_nms_top_n < 1.

    Source: FPN (arXiv:1612.03144); the steps of torchvision's RegionProposalNetwork.filter_proposals before its NMS.
    """
    op = "select_proposals"
    require_boxes(box_deltas, op, "box_deltas", dims=(3,))
    require_boxes(anchors, op, "anchors", dims=(2,))
    num_images, num_anchors = box_deltas.shape[:2]
    require(
        objectness.shape == (num_images, num_anchors), op, "objectness", [num_images, num_anchors], objectness.shape
    )
    require(len(anchors) == num_anchors, op, "anchors", f"{num_anchors} as box_deltas", len(anchors))
    require(image_sizes.shape == (num_images, 2), op, "image_sizes", [num_images, 2], image_sizes.shape)
    is_split = sum(level_sizes) == num_anchors > 0 and min(level_sizes) >= 0
    require(is_split, op, "level_sizes", f"a split of {num_anchors}", list(level_sizes))
    require(pre_nms_top_n > 0, op, "pre_nms_top_n", "positive", pre_nms_top_n)
    require_one_device(op, objectness=objectness, box_deltas=box_deltas, anchors=anchors, image_sizes=image_sizes)
    return _serving(box_deltas.device).select_proposals(
        objectness, box_deltas, anchors, image_sizes, level_sizes, pre_nms_top_n, min_size
    )


def batched_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, max_output: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of each row on its own.

    Args:
        boxes: [R, K, 4] float; a row is an image, or a level of an image. One whose IoU is no number (nan or an infinite area)
            neither suppresses nor is suppressed.
        scores: [R, K] float; -inf marks boxes that are never kept and suppress nothing.
        iou_threshold: 0 to 1; a box goes if its IoU with a kept, better one is greater. Of equals the first is better.
        max_output: boxes to keep of a row, at most.
        groups: [R, K] int; boxes of different groups never suppress each other.

    Returns:
        indices [R, max_output] int64 into K by descending score, 0 from counts on, and counts [R] int64.

    Raises:
        ValueError: if a shape or dtype is not as above, iou_threshold is not 0 to 1, or max_output < 0.

    Source: keeps what torchvision.ops.nms keeps of each row and group.
    """
    op = "batched_nms"
    require_boxes(boxes, op, "boxes", dims=(3,))
    require(scores.shape == boxes.shape[:2], op, "scores", list(boxes.shape[:2]), scores.shape)
    require(groups is None or groups.shape == scores.shape, op, "groups", list(scores.shape), shape_of(groups))
    require(0 <= iou_threshold <= 1, op, "iou_threshold", "0 to 1", iou_threshold)
    require(max_output >= 0, op, "max_output", "0 or more", max_output)
    require_one_device(op, boxes=boxes, scores=scores, groups=groups)
    return _serving(boxes.device).batched_nms(_widened(boxes), scores, iou_threshold, max_output, groups)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    *,
    image_size: tuple[int, int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool = False,
) -> Tensor:
    """Pool each box from the pyramid level that suits its size: `multilevel_roi_align_heads` for one head, [N, R, C, O, O]."""
    (pooled,) = multilevel_roi_align_heads(
        features,
        [boxes],
        image_size=image_size,
        output_sizes=[output_size],
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return pooled


def multilevel_roi_align_heads(
    features: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_sizes: Sequence[int],
    sampling_ratio: int,
    aligned: bool = False,
) -> list[Tensor]:
    """Pool the boxes of several heads, each box from the pyramid level that suits its size.

    As many calls for one head give the same values, but each a gradient of its own of the whole pyramid, and autograd adds these:
    here the heads' gradients meet in one, which is zeroed once and, in half precision, rounded once.

    Args:
        features: one [N, C, H_l, W_l] float a level, finest first; N, C, dtype and device are the same everywhere. Channels-last
            memory is fastest.
        boxes: one [N, R, 4] float a head, input pixels; 1 to 4 heads. They get no gradient; padding (without area, even nan) pools
            finite values.
        image_size: padded (height, width) of the input in pixels; level l has scale 2 ** round(log2(H_l / height)).
        output_sizes: O of each head, bins on either axis.
        sampling_ratio: samples of a bin on either axis; 0: adaptive, as many as the bin is cells long, rounded up, on each axis. (A box longer
            than its level, so one that reaches out of the image, has no more of them than one as long as the longest side of a level.)
        aligned: whether the centre of cell 0 lies half a cell from the image's border, as it should, rather than on it. Then boxes may also be
            less than a cell wide; else they are widened to one.

    Returns:
        One [N, R, C, O, O] a head, dtype of the features, channels-last in memory: flattened over N and R, a channels-last batch.

    Raises:
        ValueError: if a shape or dtype is not as above, or a number is out of range.

    Source: Mask R-CNN (arXiv:1703.06870), FPN (arXiv:1612.03144); equals torchvision's MultiScaleRoIAlign, which is not aligned, and with
        `aligned` Detectron2's ROIPooler with ROIAlignV2.
    """
    op = "multilevel_roi_align"
    require(
        0 < len(boxes) == len(output_sizes) <= 4, op, "boxes", "of 1 to 4 heads, with an output size each", len(boxes)
    )
    require_pyramid(features, op)
    num_images = features[0].shape[0]
    for own in boxes:
        require_boxes(own, op, "boxes", dims=(3,))
        require(own.shape[0] == num_images, op, "boxes", f"of {num_images} images", own.shape)
    require(min(image_size) > 0, op, "image_size", "positive", image_size)
    require(min(output_sizes) > 0, op, "output_size", "positive", min(output_sizes))
    require(sampling_ratio >= 0, op, "sampling_ratio", "0 or more", sampling_ratio)
    arguments = {f"boxes[{head}]": own for head, own in enumerate(boxes)}
    arguments |= {f"features[{level}]": feature for level, feature in enumerate(features)}
    require_one_device(op, **arguments)
    return _serving(features[0].device).multilevel_roi_align(
        features,
        boxes,
        image_size=image_size,
        output_sizes=output_sizes,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def rasterize_polygons(boxes: Tensor, instance_idxs: Tensor, polygons: PackedPolygons, size: int) -> Tensor:
    """Cut instances out by boxes and fill them: the targets of a mask head.

    Args:
        boxes: [N, R, 4] float, pixels of the polygons.
        instance_idxs: [N, R] int, row of the instance in its image, 0 … G - 1.
        polygons: N·G instances, packed; an instance without parts is empty everywhere.
        size: side of a mask in cells; a box is stretched over size × size of them, its sides taken as at least 0.1 px.

    Returns:
        [N, R, size, size] float32 of 0 and 1, whatever the numbers: a coordinate of a box that is nan counts as 0, a box of infinite
        length cuts out nothing, and a vertex that is nan lies on the first corner of its box.

    Raises:
        ValueError: if a shape or dtype is not as above, or the instances do not divide evenly among the images.

    Source: equals, bit for bit, detectron2's rasterize_polygons_within_box on pycocotools (frPyObjects, merge, decode).
    """
    op = "rasterize_polygons"
    require_boxes(boxes, op, "boxes", dims=(3,))
    shape = boxes.shape[:2]
    require(
        is_integer(instance_idxs) and instance_idxs.shape == shape,
        op,
        "instance_idxs",
        f"{list(shape)} int",
        kind(instance_idxs),
    )
    num_instances = polygons.instance_offsets.numel() - 1
    is_even = num_instances % shape[0] == 0 if shape[0] else num_instances == 0
    require(is_even, op, "polygons", f"the same number of instances for {shape[0]} images", num_instances)
    require(size > 0, op, "size", "positive", size)
    require_one_device(op, boxes=boxes, instance_idxs=instance_idxs, xy=polygons.xy)
    return _serving(boxes.device).rasterize_polygons(boxes, instance_idxs, polygons, size)


def encode_masks(
    mask_probs: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    conventions: Conventions = "detectron2",
) -> list[RunLengthCode]:
    """Run-length encode detected masks in the frame of their image. The host waits for the device here.

    Args:
        mask_probs: [D, M, M] float, 0 to 1, each in the frame of its box.
        boxes: [D, 4] float, pixels of the original image; may reach out of it. A box with a corner that is not finite, or with x1 > x2
            or y1 > y2, has an empty mask.
        image_size: (height, width) of the original image.
        threshold: a pixel belongs to the mask if its probability is greater (torchvision), or at least this (detectron2).
        conventions: detectron2: a pixel has the probability at its centre, interpolated between the centres of the cells, 0 beyond them.
            torchvision: the mask is stretched over whole pixels, its box widened by two cells and one pixel: larger than the object, the
            more so the smaller it is.

    Returns:
        D dictionaries {"size": [height, width], "counts": bytes}: COCO's compressed column-major RLE.

    Raises:
        ValueError: if a shape or dtype is not as above, image_size is not positive, or the conventions are unknown.

    Source: what pycocotools.mask.encode gives for Detectron2's paste_masks_in_image, or, bit for bit, for torchvision's
        paste_masks_in_image(padding=1) > threshold; nothing is painted.
    """
    op = "encode_masks"
    require_conventions(op, conventions)
    require_boxes(boxes, op, "boxes", dims=(2,))
    is_square = mask_probs.dim() == 3 and mask_probs.shape[1] == mask_probs.shape[2] > 0
    require(is_square and mask_probs.is_floating_point(), op, "mask_probs", "[D, M, M] float", kind(mask_probs))
    require(len(mask_probs) == len(boxes), op, "boxes", f"{len(mask_probs)} as mask_probs", len(boxes))
    require(min(image_size) > 0, op, "image_size", "positive", image_size)
    require_one_device(op, mask_probs=mask_probs, boxes=boxes)
    return _serving(mask_probs.device).encode_masks(mask_probs, boxes, image_size, threshold, conventions)


def enlarge_bilinear(image: Tensor, size: tuple[int, int], is_mirrored: bool = False) -> Tensor:
    """Enlarge an image, each pixel a mixture of the four around its centre.

    Args:
        image: [h, w, 3] uint8, at least 2 × 2.
        size: (height, width), neither smaller than the image's.
        is_mirrored: left becomes right, at no cost.

    Returns:
        [height, width, 3] uint8; within 2 of Pillow's BILINEAR, and mostly equal. The same bits from every backend.

    Raises:
        ValueError: if a shape, dtype or size is not as above.
    """
    op = "enlarge_bilinear"
    is_image = image.dim() == 3 and image.shape[2] == 3 and min(image.shape) >= 2 and image.dtype == torch.uint8
    require(is_image, op, "image", "[h, w, 3] uint8, at least 2 × 2", kind(image))
    is_larger = size[0] >= image.shape[0] and size[1] >= image.shape[1]
    require(is_larger, op, "size", f"at least {list(image.shape[:2])}", size)
    return _serving(image.device).enlarge_bilinear(image, size, is_mirrored)


def _serving(device: torch.device) -> ModuleType:
    """The module that computes on this device: compiled or reference, with the same functions."""
    return compiled if library.serves(device) else reference


def _widened(boxes: Tensor) -> Tensor:
    """Boxes as float32 at least: float16 holds no area beyond 65,504 px², bfloat16 three digits of one."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
