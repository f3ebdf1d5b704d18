"""Anchors of a batch of 800 × 1344 images, beside torchvision's AnchorGenerator."""

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from cuda_ops.benchmark import ANCHOR_SIZES, IMAGE_SIZE, LEVEL_SHAPES, RATIOS, Case, anchors


def cases(device: torch.device) -> list[Case]:
    generator = AnchorGenerator(tuple((size,) for size in ANCHOR_SIZES), (RATIOS,) * 5)
    images = ImageList(torch.empty(1, 1, *IMAGE_SIZE, device=device), [IMAGE_SIZE])
    features = [torch.empty(1, 1, *shape, device=device) for shape in LEVEL_SHAPES]
    return [Case("generate_anchors", lambda: anchors(device), "AnchorGenerator", lambda: generator(images, features))]
