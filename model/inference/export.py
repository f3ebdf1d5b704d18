"""A trained network as a torch.export program, for use with torch and the library of `cuda_ops`, without this code.

A program serves one bucket [H, W] on the device it was made for, and 1 to MAX_BATCH images, in float32. Its shapes
follow from its inputs: it processes padded candidates too, and always returns D = model.detections_per_image rows.

Source: torch.export (PyTorch 2).
"""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

MAX_BATCH = 64
OUTPUTS = ("boxes", "scores", "labels", "num_detections", "mask_probs")  # the last only from a network with masks


class Detector(nn.Module):
    """Detection as a function of tensors, without what only our own code needs."""

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Find the objects.

        Args:
            images: [N, 3, H, W] uint8 RGB, in the top left corner of the bucket; padding is 0.
            image_sizes: [N, 2] int32, valid (height, width) inside the padding.

        Returns:
            boxes [N, D, 4] float32 (x1, y1, x2, y2) in input pixels, scores [N, D] float32, labels [N, D] int64 from 1,
            num_detections [N] int64 and, if the network has masks, mask_probs [N, D, M, M] float32 in the frame of the
            box. Best first; rows from num_detections[n] on are padding.
        """
        numbers = torch.zeros(images.shape[0], dtype=torch.int64, device=images.device)
        found = self.model(Batch(images, image_sizes, image_sizes, numbers, numbers))
        return {name: value for name in OUTPUTS if (value := getattr(found, name)) is not None}


def export_detector(model: MaskRCNN, bucket: tuple[int, int]) -> ExportedProgram:
    """The program of a network in evaluation mode for images of one bucket (height, width)."""
    device = next(model.parameters()).device
    detector = Detector(model).eval()
    images = torch.zeros(2, 3, *bucket, dtype=torch.uint8, device=device)
    image_sizes = torch.tensor([bucket, bucket], dtype=torch.int32, device=device)
    batch = Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        detector(images, image_sizes)  # makes the anchors, which become the program's constants
        return torch.export.export(
            detector, (images, image_sizes), dynamic_shapes=({0: batch}, {0: batch}), strict=False
        )
