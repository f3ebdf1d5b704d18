"""Mask R-CNN: backbone, region proposals, RoI heads.

In training, a batch with targets becomes five losses; in evaluation, a batch becomes detections in input pixels.
Source: Mask R-CNN (arXiv:1703.06870).
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.backbone import Backbone
from model.config import ModelConfig
from model.roi_heads import RoIHeads
from model.rpn import RPN
from model.structures import Batch, Detections

PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
LOSSES = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")


class MaskRCNN(nn.Module):
    """The network for `num_classes` classes, background not counted."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.rpn = RPN(config)
        self.roi_heads = RoIHeads(config, num_classes)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def to_device(self, device: torch.device) -> "MaskRCNN":
        """Move there, with weights in the memory format of the activations; see `normalize`."""
        return self.to(device).to(memory_format=torch.channels_last)

    def forward(self, batch: Batch) -> dict[str, Tensor] | Detections:
        """Losses by name (`LOSSES`) in training, `Detections` in evaluation.

        Raises:
            ValueError: if the model is in training mode and the batch has no targets.
        """
        if self.training and batch.targets is None:
            raise ValueError("training needs a batch with targets, got targets=None; call model.eval() to detect")
        features = self.backbone(self.normalize(batch))
        proposals, rpn_losses = self.rpn(features, batch)
        detections, roi_losses = self.roi_heads(features, proposals, batch)
        return detections if detections is not None else rpn_losses | roi_losses

    def normalize(self, batch: Batch) -> Tensor:
        """[N, 3, H, W] uint8 → float32 of zero mean and unit variance; padding becomes 0.

        Convolutions follow the memory format of the images. Channels-last is fastest on GPUs and, but for the weight gradients of
        3 × 3 kernels with many channels on a few cells, on CPUs.
        """
        images = batch.images.to(torch.float32, memory_format=torch.channels_last)
        images = images.sub_(cast(Tensor, self.pixel_mean)).div_(cast(Tensor, self.pixel_std))
        rows = torch.arange(images.shape[2], device=images.device) < batch.image_sizes[:, :1]  # [N, H]
        columns = torch.arange(images.shape[3], device=images.device) < batch.image_sizes[:, 1:]  # [N, W]
        return images.mul_(rows[:, None, :, None] & columns[:, None, None, :])
