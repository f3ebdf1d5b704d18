"""Mask R-CNN: backbone, region proposal network, RoI heads; Faster R-CNN without the mask head; RPN without RoI heads.

In training, a batch with targets becomes losses; in evaluation, a batch becomes detections in input pixels.
Source: Mask R-CNN (arXiv:1703.06870), Faster R-CNN (arXiv:1506.01497).
"""

from typing import cast

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.backbone import Backbone
from model.network.roi_heads import RoIHeads
from model.network.rpn import RPN, Proposals
from model.structures import Batch, Detections

NAMES_OF_PROPOSALS = ("object",)  # all proposals have class 1
LOSSES: dict[str, tuple[str, ...]] = {  # model.task → names of losses
    "mask": ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask"),
    "box": ("objectness", "rpn_box_reg", "classifier", "box_reg"),
    "proposals": ("objectness", "rpn_box_reg"),
}


class MaskRCNN(nn.Module):
    """Network for `model.task` with `num_classes` classes, background not counted."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.task, self.conventions = config.task, config.conventions
        self.backbone = Backbone(config)
        self.rpn = RPN(config)
        self.roi_heads = RoIHeads(config, num_classes) if config.task != "proposals" else None
        self.is_bgr = config.pixel_order == "bgr"
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std).view(1, 3, 1, 1), persistent=False)

    def to_device(self, device: torch.device) -> "MaskRCNN":
        """Move to a device, with weights in the memory format of the activations; see `normalize`."""
        return self.to(device).to(memory_format=torch.channels_last)

    def forward(self, batch: Batch, score_threshold: float | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name (`LOSSES` of the task) in training, `Detections` in evaluation.

        Args:
            score_threshold: detections score above it; by default above model.score_threshold. Proposals have none.

        Raises:
            ValueError: if the model is in training mode and the batch has no targets.
        """
        if self.training and batch.targets is None:
            raise ValueError("training needs a batch with targets, got targets=None; call model.eval() to detect")
        features = self.backbone(self.normalize(batch))
        proposals, rpn_losses = self.rpn(features, batch)
        if self.roi_heads is None:
            return rpn_losses if self.training else as_detections(proposals)
        detections, roi_losses = self.roi_heads(features, proposals, batch, score_threshold)
        return detections if detections is not None else rpn_losses | roi_losses

    def normalize(self, batch: Batch) -> Tensor:
        """Normalise images [N, 3, H, W] uint8 RGB to float32 by `model.pixel_*`; padding becomes 0.

        Convolutions follow the memory format of the images. Channels-last is fastest on GPUs and on CPUs, except for
        the weight gradients of 3×3 kernels with many channels on few cells.
        """
        pixels = batch.images.flip(1) if self.is_bgr else batch.images
        images = pixels.to(torch.float32, memory_format=torch.channels_last)
        images = images.sub_(cast(Tensor, self.pixel_mean)).div_(cast(Tensor, self.pixel_std))
        rows = torch.arange(images.shape[2], device=images.device) < batch.image_sizes[:, :1]  # [N, H]
        columns = torch.arange(images.shape[3], device=images.device) < batch.image_sizes[:, 1:]  # [N, W]
        return images.mul_(rows[:, None, :, None] & columns[:, None, None, :])


def as_detections(proposals: Proposals) -> Detections:
    """Convert proposals to detections of class 1 without masks."""
    labels = torch.ones_like(proposals.scores, dtype=torch.int64)
    return Detections(proposals.boxes, proposals.scores, labels, proposals.num_proposals, None)
