"""Each operator at its real size beside its reference and beside what a user would otherwise call: `python -m cuda_ops.benchmark`.

Contestants take turns in one process, so that a slow moment of the machine hits all; the median counts. Sizes are those of a batch
of 800 × 1344 images: 268,569 anchors, 512 RoIs an image, 100 detections. Boxes are (x1, y1, x2, y2) in pixels.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

import cuda_ops
from cuda_ops.library import ROI_ALIGN_BACKWARDS, ROI_ALIGN_VARIABLE
from cuda_ops.reference.anchors import Conventions

IMAGE_SIZE = (800, 1344)
LEVEL_SHAPES = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))
ANCHOR_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.5, 1.0, 2.0)
CHANNELS = 256

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    name: str
    ours: Call
    rival_name: str
    rival: Call


@dataclass(frozen=True)
class Squares:
    """Polygons of one image for `rasterize_polygons`."""

    xy: Tensor
    part_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int
    max_parts: int = 1


def random_boxes(*shape: int, device: torch.device) -> Tensor:
    """Boxes of 8 to 400 px, log-uniform, anywhere in the image."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    height, width = IMAGE_SIZE
    side = 8 * torch.exp(torch.rand(*shape, 2, generator=generator) * math.log(50))
    start = torch.rand(*shape, 2, generator=generator) * (torch.tensor([width, height]) - side).clamp(min=0)
    return torch.cat((start, start + side), -1).to(device)


def anchors(device: torch.device) -> Tensor:
    """As torchvision's generator makes them."""
    sizes = [(size,) for size in ANCHOR_SIZES]
    return cuda_ops.generate_anchors(LEVEL_SHAPES, IMAGE_SIZE, sizes, RATIOS, device, conventions="torchvision")


def anchor_case(device: torch.device) -> Case:
    generator = AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), (RATIOS,) * 5)
    images = ImageList(torch.empty(1, 1, *IMAGE_SIZE, device=device), [IMAGE_SIZE])
    features = [torch.empty(1, 1, *shape, device=device) for shape in LEVEL_SHAPES]
    return Case("generate_anchors", lambda: anchors(device), "AnchorGenerator", lambda: generator(images, features))


def match_case(num_gt: int, device: torch.device) -> Case:
    boxes, gt_boxes = anchors(device), random_boxes(1, num_gt, device=device)
    counts = torch.tensor([num_gt], device=device)
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return Case(
        f"match_boxes, {num_gt} ground truths",
        lambda: cuda_ops.match_boxes(boxes, gt_boxes, counts, 0.7, 0.3, low_quality=True),
        "box_iou + Matcher",
        lambda: matcher(torchvision.ops.box_iou(gt_boxes[0], boxes)),
    )


def iou_case(device: torch.device) -> Case:
    one, two = random_boxes(2000, device=device), random_boxes(512, device=device)
    return Case(
        "box_iou, 2,000 × 512",
        lambda: cuda_ops.box_iou(one, two),
        "torchvision box_iou",
        lambda: torchvision.ops.box_iou(one, two),
    )


def proposal_case(device: torch.device) -> Case:
    """torchvision's filter_proposals up to its NMS, for two images."""
    sizes = [3 * height * width for height, width in LEVEL_SHAPES]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, sum(sizes), generator=generator).to(device)
    deltas = (torch.randn(2, sum(sizes), 4, generator=generator) * 0.2).to(device)
    boxes, image_sizes = anchors(device), torch.tensor([IMAGE_SIZE] * 2, device=device)
    coder = torchvision.models.detection._utils.BoxCoder((1.0, 1.0, 1.0, 1.0))

    def theirs() -> list[Tensor]:
        decoded = coder.decode(deltas.view(-1, 4), [boxes, boxes]).view(2, -1, 4)
        chosen = [level.topk(min(2000, level.shape[1]), dim=1)[1] for level in logits.split(sizes, 1)]
        offsets = [sum(sizes[:level]) for level in range(len(sizes))]
        idxs = torch.cat([idx + offset for idx, offset in zip(chosen, offsets, strict=True)], 1)
        kept = []
        for image in range(2):
            clipped = torchvision.ops.clip_boxes_to_image(decoded[image, idxs[image]], IMAGE_SIZE)
            kept.append(clipped[torchvision.ops.remove_small_boxes(clipped, 1e-3)])
        return kept

    return Case(
        "select_proposals, 2 images",
        lambda: cuda_ops.select_proposals(logits, deltas, boxes, image_sizes, sizes, 2000),
        "torchvision's steps",
        theirs,
    )


def nms_case(num_boxes: int, num_groups: int, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(1, num_boxes, device=device), torch.rand(1, num_boxes, generator=generator).to(device)
    groups = torch.randint(num_groups, (1, num_boxes), generator=generator).to(device)
    return Case(
        f"batched_nms, {num_boxes:,} boxes, {num_groups} group{'s' if num_groups > 1 else ''}",
        lambda: cuda_ops.batched_nms(boxes, scores, 0.7, num_boxes, groups if num_groups > 1 else None),
        "torchvision batched_nms",
        lambda: torchvision.ops.batched_nms(boxes[0], scores[0], groups[0], 0.7),
    )


def pool_case(
    num_boxes: int, size: int, memory_format: torch.memory_format, device: torch.device, sampling_ratio: int = 2
) -> Case:
    """Forward and backward for four images; a sampling_ratio of 0 is adaptive."""
    features = [
        torch.randn(4, CHANNELS, *shape, device=device).to(memory_format=memory_format).requires_grad_()
        for shape in LEVEL_SHAPES[:4]
    ]
    boxes = random_boxes(4, num_boxes, device=device)
    pooler = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio)
    named = {str(level): feature for level, feature in enumerate(features)}
    gradient = torch.randn(4 * num_boxes, CHANNELS, size, size, device=device)

    def ours() -> None:
        pooled = cuda_ops.multilevel_roi_align(
            features, boxes, image_size=IMAGE_SIZE, output_size=size, sampling_ratio=sampling_ratio
        )
        torch.autograd.grad(pooled.flatten(0, 1), features, gradient)

    def theirs() -> None:
        torch.autograd.grad(pooler(named, list(boxes), [IMAGE_SIZE] * 4), features, gradient)

    layout = "channels-last" if memory_format == torch.channels_last else "NCHW"
    name = f"multilevel_roi_align, 4 × {num_boxes} at {size}×{size}, {layout}{'' if sampling_ratio else ', adaptive'}"
    return Case(name, ours, "MultiScaleRoIAlign", theirs)


@contextmanager
def backward_by(way: str) -> Iterator[None]:
    """Within it a GPU scatters or gathers the gradient of RoIAlign."""
    before = os.environ.get(ROI_ALIGN_VARIABLE)
    os.environ[ROI_ALIGN_VARIABLE] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ[ROI_ALIGN_VARIABLE]
        else:
            os.environ[ROI_ALIGN_VARIABLE] = before


def heads_case(way: str, device: torch.device) -> Case:
    """What a training step pools, forward and backward: the box head's RoIs and those of the mask head, which are the first of them."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # torchvision's kernel takes no bfloat16
    features = [
        torch.randn(4, CHANNELS, *shape, device=device, dtype=dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for shape in LEVEL_SHAPES[:4]
    ]
    boxes, sizes = random_boxes(4, 512, device=device), (7, 14)
    heads = [boxes, boxes[:, :128]]
    gradients = [
        torch.randn(4 * own.shape[1], CHANNELS, size, size, device=device, dtype=dtype)
        for own, size in zip(heads, sizes, strict=True)
    ]
    poolers = [torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2) for size in sizes]
    named = {str(level): feature for level, feature in enumerate(features)}

    def ours() -> None:
        pooled = cuda_ops.multilevel_roi_align_heads(
            features, heads, image_size=IMAGE_SIZE, output_sizes=sizes, sampling_ratio=2
        )
        with backward_by(way):
            torch.autograd.grad([out.flatten(0, 1) for out in pooled], features, gradients)

    def theirs() -> None:
        # Their boxes have the features' dtype.
        pooled = [
            pooler(named, list(own.to(dtype)), [IMAGE_SIZE] * 4) for pooler, own in zip(poolers, heads, strict=True)
        ]
        torch.autograd.grad(pooled, features, gradients)

    name = f"multilevel_roi_align_heads, 4 × (512 at 7×7, 128 at 14×14), {dtype}".replace("torch.", "")
    return Case(f"{name}{', ' + way if device.type == 'cuda' else ''}", ours, "MultiScaleRoIAlign", theirs)


def rasterize_case(device: torch.device) -> Case:
    """100 RoIs of outlines of 40 vertices; detectron2's way: one by one, by pycocotools."""
    boxes, angles = random_boxes(100, device=device), torch.linspace(0, 2 * math.pi, 41)[:40]
    circle = torch.stack((angles.cos(), angles.sin()), -1).to(device)
    outlines = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 + circle * (boxes[:, None, 2:] - boxes[:, None, :2]) * 0.55
    offsets = torch.arange(101, dtype=torch.int32, device=device)
    polygons = Squares(outlines.reshape(-1, 2), offsets * 40, offsets, max_vertices=40)
    rows = torch.arange(100, device=device)[None]
    host_boxes, host_outlines = boxes.double().cpu().numpy(), outlines.double().cpu().numpy()

    def theirs() -> list[np.ndarray]:
        masks = []
        for box, outline in zip(host_boxes, host_outlines, strict=True):
            scale = 28 / np.maximum(box[2:] - box[:2], 0.1)
            rles = coco_mask.frPyObjects([((outline - box[:2]) * scale).flatten()], 28, 28)
            masks.append(coco_mask.decode(coco_mask.merge(rles)))
        return masks

    return Case(
        "rasterize_polygons, 100 RoIs",
        lambda: cuda_ops.rasterize_polygons(boxes[None], rows, polygons, 28),
        "detectron2's path",
        theirs,
    )


def paste_exactly(probs: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether each pixel of an image [1, height, width] belongs to a mask [M, M], sampled as Detectron2 does: on a CPU within the box alone."""
    height, width = size
    x1, y1, x2, y2 = box
    left, top, right, bottom = 0, 0, width, height
    if box.device.type == "cpu":
        left, top = max(int(x1) - 1, 0), max(int(y1) - 1, 0)
        right, bottom = min(int(x2) + 2, width), min(int(y2) + 2, height)
    x = (torch.arange(left, right, device=box.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(top, bottom, device=box.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
    pasted = torch.zeros(1, height, width, dtype=torch.bool, device=box.device)
    pasted[:, top:bottom, left:right] = F.grid_sample(probs[None, None], grid[None], align_corners=False)[:, 0] >= 0.5
    return pasted


def encode_case(device: torch.device, conventions: Conventions = "detectron2") -> Case:
    axis = torch.linspace(-1, 1, 28)
    discs = (1.2 - (axis[:, None] ** 2 + axis**2).sqrt()).clamp(0, 1)  # around 0.5 at the rim of a disc
    probs, boxes = discs.expand(100, 28, 28).contiguous().to(device), random_boxes(100, device=device)
    height, width = 800, 1333

    def theirs() -> list[object]:
        if conventions == "torchvision":
            pasted = paste_masks_in_image(probs[:, None], boxes, (height, width))[:, 0] > 0.5
        else:
            pasted = torch.cat([paste_exactly(*pair, (height, width)) for pair in zip(probs, boxes, strict=True)])
        return [coco_mask.encode(np.asfortranarray(mask)) for mask in pasted.cpu().numpy().astype(np.uint8)]

    return Case(
        f"encode_masks, 100 at 800×1333, {conventions}",
        lambda: cuda_ops.encode_masks(probs, boxes, (height, width), conventions=conventions),
        "paste + pycocotools",
        theirs,
    )


def cases(device: torch.device) -> list[Case]:
    """All of them; building one allocates what it works on."""
    return [
        anchor_case(device),
        iou_case(device),
        match_case(64, device),
        match_case(8, device),
        proposal_case(device),
        nms_case(8819, 1, device),
        nms_case(8819, 5, device),
        pool_case(512, 7, torch.channels_last, device),
        pool_case(512, 7, torch.contiguous_format, device),
        pool_case(512, 7, torch.channels_last, device, sampling_ratio=0),
        pool_case(128, 14, torch.channels_last, device),
        pool_case(128, 14, torch.contiguous_format, device),
        *(heads_case(way, device) for way in (ROI_ALIGN_BACKWARDS if device.type == "cuda" else ("scatter",))),
        rasterize_case(device),
        encode_case(device, "detectron2"),
        encode_case(device, "torchvision"),
    ]


def measure(case: Case, device: torch.device, repetitions: int) -> dict[str, float]:
    """Median seconds of each contestant."""

    def referee() -> object:
        with cuda_ops.backend("reference"):
            return case.ours()

    contestants = {"compiled": case.ours, "reference": referee, "rival": case.rival}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, call in contestants.items():
            duration_s = timed(call, device)
            if repetition:  # the first warms up
                seconds[name].append(duration_s)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m cuda_ops.benchmark", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, times in seconds")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    with cuda_ops.backend("compiled"):
        for case in cases(device):
            result = measure(case, device, args.repetitions)
            if args.json:
                print(json.dumps({"case": case.name, "rival_name": case.rival_name, **result}), flush=True)
                continue
            compiled, reference, rival = (result[name] * 1e3 for name in ("compiled", "reference", "rival"))
            print(
                f"{case.name:58} {compiled:9.3f} ms   reference {reference:9.3f} ms, {reference / compiled:6.1f}×"
                f"   {case.rival_name} {rival:9.3f} ms, {rival / compiled:6.1f}×",
                flush=True,
            )


if __name__ == "__main__":
    main()
