"""Features, boxes and calls of RoIAlign for its tests: of one head, or of several at once."""

import random
from contextlib import contextmanager

import torch

from cuda_ops import multilevel_roi_align, multilevel_roi_align_heads

IMAGE_SIZE = (128, 192)
STRIDES = (4, 8, 16, 32)
LAYOUTS = ("planes", "channels_last", "mixed", "slices", "columns")


def make_features(seed, num_images=2, channels=3, strides=STRIDES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_images, channels, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride) for stride in strides]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def make_boxes(seed, num_boxes, num_images=2):
    """Boxes of every size, some reaching out of the image, the first without area."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(num_images, num_boxes, 2, generator=generator) * 210 - 10
    half_side = torch.exp(torch.rand(num_images, num_boxes, 2, generator=generator) * 5) * 1.5
    boxes = torch.cat((centre - half_side, centre + half_side), dim=-1)
    boxes[:, :1, 2:] = boxes[:, :1, :2]
    return boxes


def image_size(features):
    """Height and width of the images of features whose first level has the least stride."""
    height, width = features[0].shape[-2:]
    return height * STRIDES[0], width * STRIDES[0]


def pool(features, boxes, output_size=3, sampling_ratio=2, aligned=False):
    return multilevel_roi_align(
        features,
        boxes,
        image_size=image_size(features),
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def laid_out(features, layout):
    """The same values in other places in memory; gradients flow to `features`."""

    def place(level, row):
        if layout == "channels_last" or (layout == "mixed" and row % 2):
            return level.contiguous(memory_format=torch.channels_last)
        if layout == "slices":
            return torch.nn.functional.pad(level, (1, 2, 3, 1, 2, 1))[:, 2:-1, 3:-1, 1:-2]
        return level.transpose(2, 3).contiguous().transpose(2, 3) if layout == "columns" else level

    return [place(level, row) for row, level in enumerate(features)]


def random_case(seed, device="cpu"):
    """Features, boxes and arguments with awkward shapes."""
    draw = random.Random(seed)
    num_images, channels = draw.choice((0, 1, 2, 3)), draw.choice((1, 2, 5, 8, 17, 36))
    num_boxes = draw.choice((0, 1, 7, 13))
    dtype = draw.choice((torch.float32, torch.float64))
    features = make_features(seed, num_images, channels, STRIDES[: draw.randint(1, 4)], dtype)
    boxes = make_boxes(seed, num_boxes, num_images).to(draw.choice((torch.float32, torch.float64)))
    if draw.random() < 0.3:
        boxes = (boxes / 16).round() * 16
    if draw.random() < 0.3:
        boxes = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if draw.random() < 0.3:
        boxes[:, 1::3] = boxes[:, 1::3].flip(-1)  # turned inside out, with x and y changing places
    output_size, sampling_ratio = draw.choice(
        ((7, 2), (14, 2), (1, 1), (3, 3), (5, 1), (2, 4), (7, 0), (14, 0), (3, 0))
    )
    if seed % 2:
        features = [level.mT.contiguous() for level in features]  # of upright images
    features = [level.detach().to(device).requires_grad_() for level in features]
    return features, boxes.to(device), draw.choice(LAYOUTS), output_size, sampling_ratio, draw.random() < 0.5


@contextmanager
def repeatable(is_asked):
    """Within it results must be the same each time, if that is asked."""
    torch.use_deterministic_algorithms(is_asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pooled_and_gradients(features, boxes, layout, output_size, sampling_ratio, aligned=False):
    pooled = pool(laid_out(features, layout), boxes, output_size, sampling_ratio, aligned)
    # Drawn in float32: for another dtype torch may draw other numbers.
    direction = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(pooled)
    direction[:, ::3] = 0
    return pooled, *torch.autograd.grad(pooled, features, direction)


def pool_heads(features, boxes, layout, output_sizes, sampling_ratio=2, aligned=False, at_once=True):
    """Output of each head, by one call or by a call a head."""
    levels, how = laid_out(features, layout), {"image_size": image_size(features), "sampling_ratio": sampling_ratio}
    if at_once:
        return multilevel_roi_align_heads(levels, boxes, output_sizes=output_sizes, aligned=aligned, **how)
    return [pool(levels, *head, sampling_ratio, aligned) for head in zip(boxes, output_sizes, strict=True)]


def gradients_of(pooled, features):
    """The gradient of all heads."""
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(out.shape, generator=generator).to(out) for out in pooled]
    return torch.autograd.grad(pooled, features, directions)


def heads_and_gradients(features, *case, at_once=True):
    pooled = pool_heads(features, *case, at_once=at_once)
    return pooled, gradients_of(pooled, features)


def heads_case(seed, dtype=torch.float32, device="cpu"):
    """Like a box head and a mask head, whose boxes are the first of the other's; then any two or four."""
    features = [level.detach().to(device, dtype).requires_grad_() for level in make_features(seed, channels=36)]
    boxes = make_boxes(seed, 13).to(device)
    if seed % 2:
        return features, [boxes, boxes[:, :4]], LAYOUTS[seed % 5], (7, 14), *((2, False), (0, True))[seed % 3 % 2]
    heads = [boxes, boxes[:, :0], boxes.flip(1).double(), boxes.flip(-1)]
    return features, heads, LAYOUTS[seed % 5], (3, 7, 5, 1), *((0, True), (2, False))[seed % 3 % 2]
