"""Images and weights of a benchmark: synthetic, with the work that real images and trained weights would cause."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cuda_ops
from components.benchmarks.case import NUM_CLASSES, Case
from model.data.collate import collate
from model.data.dataset import Sample
from model.data.index import CocoInstances
from model.network.mask_rcnn import MaskRCNN
from model.network.resnet import BasicBlock, Bottleneck
from model.structures import Batch

_OBJECTS = 7  # per image, COCO's average
_MIN_SIDE_PX = 12
_POSITIVES = 64  # per image: half of the limit for 512 samples; they determine the work on masks
_CANDIDATES = 300  # per image, above the score threshold
Boxes = NDArray[np.float32]


def calibrate(model: MaskRCNN, case: Case, device: torch.device) -> Batch:
    """Make random weights cause the load of trained ones, and return the batch to use.

    Activations stay finite. In inference, _CANDIDATES per image reach NMS. In training, the ground truth is where the
    network proposes boxes, so that about _POSITIVES per image can be sampled, as after training.
    """
    batch = synthetic_batch(case, random_boxes(case)).to(device)
    with torch.no_grad():
        for block in model.backbone.body.modules():
            if isinstance(block, BasicBlock | Bottleneck):
                last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                cast(Tensor, last_norm.weight).mul_(0.2)  # otherwise sums over many blocks grow without bound
        if case.mode == "train":
            return synthetic_batch(case, _proposed_boxes(model, batch, case)).to(device)
        _calibrate_scores(model.eval(), batch, case)
    return batch


def _proposed_boxes(model: MaskRCNN, batch: Batch, case: Case) -> list[Boxes]:
    """Choose _OBJECTS proposals per image, those with the right number of overlapping proposals."""
    proposals, _ = model.rpn(model.backbone(model.normalize(batch)), batch)
    chosen = []
    for boxes, count in zip(proposals.boxes, proposals.num_proposals.tolist(), strict=True):
        boxes = boxes[:count]
        around = (cuda_ops.box_iou(boxes, boxes) >= case.model.roi_fg_iou).sum(1)
        is_thin = (boxes[:, 2:] - boxes[:, :2]).amin(1) < _MIN_SIDE_PX
        misfit = (around - _POSITIVES / _OBJECTS).abs().masked_fill(is_thin, torch.inf)
        chosen.append(boxes[misfit.argsort(stable=True)[:_OBJECTS]].cpu().numpy())
    return chosen


def _calibrate_scores(model: MaskRCNN, batch: Batch, case: Case) -> None:
    """Spread each class's logits over the proposals, then raise the background logit until few candidates are left."""
    if model.roi_heads is None:  # the number of proposals does not depend on scores
        return
    seen: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(batch)
    hook.remove()
    logits = seen[0].flatten(0, -2)  # [N·P, 1 + C]
    mean, factor = logits.mean(0), 3.0 / logits.std(0)
    logits = (logits - mean) * factor
    low, high = 0.0, 50.0
    for _ in range(20):
        bias = (low + high) / 2
        shifted = torch.cat([logits[:, :1] + bias, logits[:, 1:]], 1)
        is_crowded = (shifted.softmax(1)[:, 1:] > case.model.score_threshold).sum() > _CANDIDATES * case.batch
        low, high = (bias, high) if is_crowded else (low, bias)
    cls_score = model.roi_heads.box_predictor.cls_score
    cls_score.weight.mul_(factor[:, None])
    cls_score.bias.copy_(-mean * factor)
    cls_score.bias[0] += high


def synthetic_batch(case: Case, boxes: Sequence[Boxes]) -> Batch:
    """Make noise images, padded to whole strides, with a polygon in each of an image's boxes [n, 4]."""
    rng = np.random.default_rng(0)
    bucket = (-(-case.height // 32) * 32, -(-case.width // 32) * 32)
    samples = [
        Sample(
            image=rng.integers(0, 256, (case.height, case.width, 3), dtype=np.uint8),
            image_id=n,
            original_size=(case.height, case.width),
            seed=n,
            instances=_instances(rng, of_image) if case.mode == "train" else None,
        )
        for n, of_image in enumerate(boxes)
    ]
    return collate(samples, (bucket,))


def random_boxes(case: Case) -> list[Boxes]:
    """Draw boxes anywhere in each image, with sides from a twelfth to half of the image's."""
    rng = np.random.default_rng(1)
    frame = np.array([case.width, case.height])
    sides = rng.uniform(1 / 12, 1 / 2, (case.batch, _OBJECTS, 2)) * frame
    corners = rng.uniform(0, 1, sides.shape) * (frame - sides)
    return list(np.concatenate([corners, corners + sides], 2).astype(np.float32))


def _instances(rng: np.random.Generator, boxes: Boxes) -> CocoInstances:
    """Make a star-shaped outline of 8 to 32 vertices that fills each box."""
    outlines = []
    for (x1, y1, x2, y2), vertices in zip(boxes, rng.integers(8, 33, len(boxes)), strict=True):
        angles = np.sort(rng.uniform(0, 2 * np.pi, vertices))
        star = rng.uniform(0.6, 1.0, (vertices, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        unit = (star - star.min(0)) / np.ptp(star, axis=0)
        outlines.append(np.array([x1, y1]) + unit * np.array([x2 - x1, y2 - y1]))
    return CocoInstances(
        boxes=boxes,
        labels=rng.integers(1, NUM_CLASSES + 1, len(boxes)),
        is_crowd=np.zeros(len(boxes), dtype=bool),
        xy=np.concatenate(outlines).astype(np.float32),
        part_offsets=np.concatenate([[0], np.cumsum([len(outline) for outline in outlines])]),
        instance_offsets=np.arange(len(boxes) + 1),
    )
