"""Proposals of two images, beside torchvision's filter_proposals up to its NMS."""

import torch
import torchvision
from torch import Tensor

import cuda_ops
from cuda_ops.benchmark import IMAGE_SIZE, LEVEL_SHAPES, Case, anchors


def cases(device: torch.device) -> list[Case]:
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

    case = Case(
        "select_proposals, 2 images",
        lambda: cuda_ops.select_proposals(logits, deltas, boxes, image_sizes, sizes, 2000),
        "torchvision's steps",
        theirs,
    )
    return [case]
