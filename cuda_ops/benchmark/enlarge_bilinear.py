"""An image of 480 × 640 enlarged to a shorter side of 800, beside Pillow's resize. Hosts alone load images."""

import torch
from PIL import Image

import cuda_ops
from cuda_ops.benchmark import Case


def cases(device: torch.device) -> list[Case]:
    if device.type != "cpu":
        return []
    image = torch.randint(0, 256, (480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pillow = Image.fromarray(image.numpy())
    case = Case(
        "enlarge_bilinear, 480×640 to 800×1066",
        lambda: cuda_ops.enlarge_bilinear(image, (800, 1066)),
        "Pillow resize",
        lambda: pillow.resize((1066, 800), Image.Resampling.BILINEAR),
    )
    return [case]
