"""RoI heads: from proposals to classes, boxes and masks.

Shapes: N images, P proposals, G ground truths, S sampled RoIs (512), K mask RoIs (the first 128 of these), C classes
without background, D detections, M the mask's side (28; c4: 14).
Boxes are (x1, y1, x2, y2) in input pixels; labels are 1 … C, 0 is background.
Source: Mask R-CNN (arXiv:1703.06870).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_ops
from model.config import ModelConfig
from model.network.backbone import feature_channels
from model.network.box_head import BoxPredictor, make_box_head
from model.network.mask_head import MaskPredictor, make_mask_head
from model.network.resnet import make_stage, stage_channels
from model.network.rpn import SMOOTH_L1_BETA, Proposals
from model.network.sampling import per_image_mean, sample_matches
from model.network.suppression import Candidates, keep_best, rows_needed
from model.structures import Batch, Detections, Targets

ROI_STREAM = 2


@dataclass(frozen=True)
class SampledRois:
    """RoIs for the losses of the heads, positives first."""

    boxes: Tensor  # [N, S, 4] float32
    labels: Tensor  # [N, S] int64, 0 for background
    gt_rows: Tensor  # [N, S] int64: row of the ground truth of a positive, else 0
    weights: Tensor  # [N, S] float32: 0 for padding
    num_mask_rois: int  # K: all positives are among the first K rows


class RoIHeads(nn.Module):
    """Box and mask heads: losses of sampled proposals, or detections."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        channels = feature_channels(config)
        if config.features == "c4":  # the body's last stage, applied to each RoI and shared by box and mask head
            self.res5 = make_stage(config, 3)
            channels = stage_channels(config)[3]
        self.box_head, box_channels = make_box_head(config, channels)
        self.box_predictor = BoxPredictor(box_channels, num_classes, class_agnostic=config.class_agnostic_boxes)
        self.has_masks = config.task == "mask"
        if self.has_masks:
            self.mask_head, mask_channels = make_mask_head(config, channels)
            self.mask_predictor = MaskPredictor(mask_channels, config.mask_head_channels, num_classes)

    def forward(
        self, features: list[Tensor], proposals: Proposals, batch: Batch, score_threshold: float | None = None
    ) -> tuple[Detections | None, dict[str, Tensor]]:
        pyramid = features[:4]  # P6 serves the RPN alone
        if self.training:
            assert batch.targets is not None
            rois = self.sample(proposals, batch.targets, batch.seeds)
            box_features, mask_features = self.pool_rois(pyramid, rois, batch)
            losses = self.box_losses(box_features, rois, batch.targets)
            return None, losses | (self.mask_losses(mask_features, rois, batch.targets) if self.has_masks else {})
        boxes, scores, labels, num_detections = self.detect(pyramid, proposals, batch, score_threshold)
        mask_probs = None
        if self.has_masks:
            pooled = self.pool(pyramid, boxes, batch, self.config.mask_pool_size)
            mask_probs = self.mask_logits(pooled, labels).sigmoid()
        return Detections(boxes, scores, labels, num_detections, mask_probs), {}

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> SampledRois:
        """Match proposals and the ground truths themselves, and sample S per image."""
        config = self.config
        boxes = torch.cat([proposals.boxes, targets.gt_boxes], 1)  # [N, P + G, 4]
        num_rows = (proposals.num_proposals, targets.num_gt)
        is_real = torch.cat(
            [
                torch.arange(width, device=boxes.device) < count[:, None]
                for width, count in zip((proposals.boxes.shape[1], targets.gt_boxes.shape[1]), num_rows, strict=True)
            ],
            dim=1,
        )
        matched = cuda_ops.match_boxes(boxes, targets.gt_boxes, targets.num_gt, config.roi_fg_iou, config.roi_bg_iou)
        samples = sample_matches(
            matched.masked_fill_(~is_real, cuda_ops.IGNORE),
            seeds,
            batch_size=config.roi_batch_size,
            positive_fraction=config.roi_positive_fraction,
            stream=ROI_STREAM,
        )
        gt_rows = matched.gather(1, samples.idxs).clamp(min=0)
        labels = targets.gt_labels.gather(1, gt_rows) * samples.is_positive
        boxes = boxes.gather(1, samples.idxs[..., None].expand(-1, -1, 4))
        return SampledRois(boxes, labels, gt_rows, samples.weights, self._num_mask_rois(samples.is_positive))

    def _num_mask_rois(self, is_positive: Tensor) -> int:
        """Number K of mask RoIs: the limit of positives on a GPU, to avoid a wait; their actual maximum on the CPU."""
        if is_positive.device.type == "cpu":
            return max(1, int(is_positive.sum(1).max()))
        return min(int(self.config.roi_batch_size * self.config.roi_positive_fraction), is_positive.shape[1])

    def box_logits(self, pooled: Tensor, is_real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class logits [N, R, 1 + C] and deltas [N, R, 1 + C, 4] of RoIs with features [N, R, channels, O, O].

        Deltas are [N, R, 1, 4] if class-agnostic. RoIs without `is_real` [N, R] do not count in batch norms.
        """
        is_real = None if is_real is None else is_real.flatten()
        logits, deltas = self.box_predictor(self.box_head(pooled.flatten(0, 1), is_real))
        return logits.unflatten(0, pooled.shape[:2]), deltas.unflatten(0, pooled.shape[:2])

    def mask_logits(self, pooled: Tensor, labels: Tensor, is_real: Tensor | None = None) -> Tensor:
        """Mask logits [N, R, M, M] for labels [N, R] of RoIs with features [N, R, channels, O, O].

        RoIs without `is_real` [N, R] do not count in batch norms.
        """
        is_real = None if is_real is None else is_real.flatten()
        logits = self.mask_predictor(self.mask_head(pooled.flatten(0, 1), is_real), labels.flatten())
        return logits.unflatten(0, labels.shape)

    def box_losses(self, pooled: Tensor, rois: SampledRois, targets: Targets) -> dict[str, Tensor]:
        """Cross entropy over the sampled RoIs; smooth L1 over the positive ones, on the deltas of their class."""
        logits, deltas = self.box_logits(pooled, rois.weights > 0)
        class_losses = F.cross_entropy(logits.flatten(0, 1), rois.labels.flatten(), reduction="none")
        gt_boxes = targets.gt_boxes.gather(1, rois.gt_rows[..., None].expand(-1, -1, 4))
        gt_deltas = cuda_ops.encode_boxes(gt_boxes, rois.boxes, self.config.box_reg_weights)
        own_class = rois.labels.clamp(max=deltas.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
        own_deltas = deltas.gather(2, own_class).squeeze(2)  # [N, S, 4]
        box_losses = F.smooth_l1_loss(own_deltas, gt_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(2)
        return {
            "classifier": per_image_mean(class_losses.view_as(rois.labels), rois.weights),
            "box_reg": per_image_mean(box_losses * (rois.labels > 0), rois.weights),
        }

    def mask_losses(self, pooled: Tensor, rois: SampledRois, targets: Targets) -> dict[str, Tensor]:
        """Binary cross entropy per pixel of positive RoIs, for their own class; features are [N, K, channels, O, O]."""
        share = rois.num_mask_rois
        boxes, labels, gt_rows = rois.boxes[:, :share], rois.labels[:, :share], rois.gt_rows[:, :share]
        is_positive = labels > 0  # K depends on the device, the positives do not
        logits = self.mask_logits(pooled, labels, is_positive)  # [N, K, M, M]
        gt_masks = cuda_ops.rasterize_polygons(boxes, gt_rows, targets.polygons, logits.shape[-1])
        losses = F.binary_cross_entropy_with_logits(logits, gt_masks, reduction="none").mean((2, 3))  # [N, K]
        return {"mask": per_image_mean(losses, is_positive.float())}

    def pool_rois(self, pyramid: list[Tensor], rois: SampledRois, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pool the features of box head [N, S, …] and mask head [N, K, …] at once, so that gradients share one pyramid.

        With c4 the mask head uses the features of the box head.
        """
        config, share = self.config, rois.num_mask_rois
        if config.features == "c4" or not self.has_masks:
            box_features = self.pool(pyramid, rois.boxes, batch, config.box_pool_size, rois.weights > 0)
            return box_features, box_features[:, :share]
        boxes, sizes = [rois.boxes, rois.boxes[:, :share]], [config.box_pool_size, config.mask_pool_size]
        box_features, mask_features = self.pool_heads(pyramid, boxes, batch, sizes)
        return box_features, mask_features

    def pool(
        self, pyramid: list[Tensor], boxes: Tensor, batch: Batch, size: int, is_real: Tensor | None = None
    ) -> Tensor:
        """Pool features [N, R, channels, O, O] of boxes [N, R, 4]: O = size, or half of it after res5.

        RoIs without `is_real` [N, R] do not count in the batch norms of res5.
        """
        (pooled,) = self.pool_heads(pyramid, [boxes], batch, [size])
        if self.config.features != "c4":
            return pooled
        is_real = None if is_real is None else is_real.flatten()
        features: Tensor = self.res5(pooled.flatten(0, 1), is_real).unflatten(0, pooled.shape[:2])
        return features

    def pool_heads(self, pyramid: list[Tensor], boxes: list[Tensor], batch: Batch, sizes: list[int]) -> list[Tensor]:
        """Pool features as `pool` does, without res5, for the boxes and size of each head."""
        height, width = batch.images.shape[-2:]
        return cuda_ops.multilevel_roi_align_heads(
            pyramid,
            boxes,
            image_size=(height, width),
            output_sizes=sizes,
            sampling_ratio=self.config.sampling_ratio,
            aligned=self.config.conventions == "detectron2",
        )

    def detect(
        self, pyramid: list[Tensor], proposals: Proposals, batch: Batch, score_threshold: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [N, D, 4], scores [N, D], labels [N, D] and their number [N].

        Unlike training, this waits for the device twice; see `rows_needed`.
        """
        candidates = self.candidates(pyramid, proposals, batch, score_threshold)
        return keep_best(candidates, self.config.nms_iou, self.config.detections_per_image)

    def candidates(
        self, pyramid: list[Tensor], proposals: Proposals, batch: Batch, score_threshold: float | None = None
    ) -> Candidates:
        """Every (proposal, class) pair that scores above a threshold, by default model.score_threshold; best first."""
        config = self.config
        threshold = config.score_threshold if score_threshold is None else score_threshold
        logits, deltas = self.box_logits(self.pool(pyramid, proposals.boxes, batch, config.box_pool_size))
        scores = logits.softmax(2)[..., 1:]  # [N, P, C]
        is_real = torch.arange(scores.shape[1], device=scores.device) < proposals.num_proposals[:, None]
        classes = scores.shape[2]
        scores = scores.masked_fill(~(is_real[..., None] & (scores > threshold)), -torch.inf).flatten(1)
        most = rows_needed((scores > -torch.inf).sum(1), scores.shape[1])
        scores, indices = scores.sort(dim=1, descending=True, stable=True)
        scores, indices = scores[:, :most], indices[:, :most]  # [N, Q] of (proposal, class) pairs
        rows, labels = indices // classes, indices % classes + 1
        own_deltas = rows if config.class_agnostic_boxes else rows * (classes + 1) + labels
        boxes = cuda_ops.decode_boxes(
            deltas.flatten(1, 2).gather(1, own_deltas[..., None].expand(-1, -1, 4)),
            proposals.boxes.gather(1, rows[..., None].expand(-1, -1, 4)),
            config.box_reg_weights,
        )
        boxes = clip_boxes(boxes, batch.image_sizes)
        is_small = ((boxes[..., 2:] - boxes[..., :2]) < config.min_detection_side_px).any(2)
        scores = scores.masked_fill(is_small, -torch.inf)
        return Candidates(boxes, scores, labels)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Clip boxes [N, R, 4] to their images, sizes [N, 2] (height, width)."""
    limits = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # [N, 1, 4]: width, height, width, height
    return boxes.clamp(min=0).minimum(limits)
