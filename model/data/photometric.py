"""Changes of colour and sharpness in training, by torchvision.transforms.v2 on uint8.

Images are [h, w, 3] uint8 RGB. Ranges and random order are those of torchvision's ColorJitter; sigmas of the blur those
of SimCLR (arXiv:2002.05709). Importing torchvision takes more than a second, so only training with data.augment
imports this.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from model.config import AugmentConfig
from model.data.transforms import Pixels

_SIGMA_PX = (0.1, 2.0)


def change_colors(pixels: Pixels, augment: AugmentConfig, rng: np.random.Generator) -> Pixels:
    """Draw and apply the changes that are on; as many numbers are drawn whatever is on."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    changes = (
        (functional.adjust_brightness, augment.brightness, 1.0),
        (functional.adjust_contrast, augment.contrast, 1.0),
        (functional.adjust_saturation, augment.saturation, 1.0),
        (functional.adjust_hue, augment.hue, 0.0),
    )
    order, shares = rng.permutation(len(changes)), rng.uniform(-1, 1, len(changes))
    for k in order.tolist():
        change, extent, middle = changes[k]
        if extent:
            image = change(image, middle + extent * float(shares[k]))
    is_gray, is_blurred, sigma_px = rng.random(), rng.random(), rng.uniform(*_SIGMA_PX)
    if is_gray < augment.grayscale:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if is_blurred < augment.blur:
        image = _blur(image, sigma_px)
    return image.permute(1, 2, 0).contiguous().numpy()


def _blur(image: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of [3, h, w] uint8, one axis after the other: a fraction of the time of both at once."""
    height, width = image.shape[1:]
    radius = math.ceil(3 * sigma_px)
    across, down = (2 * min(radius, side - 1) + 1 for side in (width, height))  # the border is reflected once
    smooth = functional.gaussian_blur(image.float(), [across, 1], [sigma_px, sigma_px])
    smooth = functional.gaussian_blur(smooth, [1, down], [sigma_px, sigma_px])
    return smooth.round_().clamp_(0, 255).to(torch.uint8)
