"""RoI heads: from proposals to classes, boxes and masks.

Shapes: N images, P proposals, G ground truths, S sampled RoIs (512), K mask RoIs (the first of the sampled: 128), C classes
without background, D detections, M the mask's side (28). Boxes are (x1, y1, x2, y2) in input pixels; labels 1 … C, 0 is background.
Source: Mask R-CNN (arXiv:1703.06870); heads of the FPN variant.
"""

import itertools
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_ops
from model.backbone import conv_layer, norm_layer
from model.config import ModelConfig
from model.matching import per_image_mean, sample_matches
from model.rpn import SMOOTH_L1_BETA, Proposals
from model.structures import Batch, Detections, Targets
from model.suppression import Candidates, keep_best

ROI_STREAM = 2
MIN_BOX_SIDE_PX = 1e-2


@dataclass(frozen=True)
class SampledRois:
    """What the heads learn from; positives first."""

    boxes: Tensor  # [N, S, 4] float32
    labels: Tensor  # [N, S] int64, 0 for background
    gt_rows: Tensor  # [N, S] int64: the ground truth of a positive, else 0
    weights: Tensor  # [N, S] float32: 0 for padding
    num_mask_rois: int  # K: no positive lies past this row


class BoxHead(nn.Module):
    """Two fully connected layers: [R, channels, 7, 7] → [R, box_head_channels]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc6 = nn.Linear(config.fpn_channels * config.box_pool_size**2, config.box_head_channels)
        self.fc7 = nn.Linear(config.box_head_channels, config.box_head_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.fc7(F.relu_(self.fc6(x.flatten(1)))))


class BoxPredictor(nn.Module):
    """Class logits [R, 1 + C] and box deltas of every class [R, 1 + C, 4], or, class-agnostic, of all classes together [R, 1, 4]."""

    def __init__(self, channels: int, num_classes: int, *, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, 1 + num_classes)
        self.bbox_pred = nn.Linear(channels, 4 if class_agnostic else (1 + num_classes) * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).unflatten(1, (-1, 4)).float()


class MaskPredictor(nn.Module):
    """Upsample twofold, then one logit a pixel for the class asked for; logits of other classes are never computed."""

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        self.mask_fcn_logits = nn.Conv2d(channels, 1 + num_classes, 1)
        for module in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[R, channels, 14, 14], [R] int64 → [R, 28, 28] logits.

        Without overlap a transposed convolution is a matrix product of each cell, and as such faster forward and backward; and the
        four new cells need not stand in their places until they are logits.
        """
        height, width = x.shape[-2:]
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # [R, 14², channels], a view of channels-last memory
        weight = self.conv5_mask.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [4·channels, channels]: dy, dx, channel
        bias = cast(Tensor, self.conv5_mask.bias).repeat(4)
        x = F.relu_(F.linear(cells, weight, bias)).unflatten(2, (4, -1)).flatten(1, 2)  # [R, 28², channels]
        kernels = F.embedding(labels, self.mask_fcn_logits.weight.flatten(1)).to(x.dtype)  # [R, channels]
        class_bias = F.embedding(labels, cast(Tensor, self.mask_fcn_logits.bias)[:, None])  # [R, 1]
        logits = torch.matmul(x, kernels[..., None]).squeeze(2) + class_bias  # [R, 28²]: y, x, dy, dx
        logits = logits.float().unflatten(1, (height, width, 2, 2))
        return logits.transpose(2, 3).flatten(3).flatten(1, 2)


class RoIHeads(nn.Module):
    """Losses of sampled proposals, or detections."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        grouped = norm_layer("group_norm") if config.norm == "group_norm" else None
        self.box_head = BoxHead(config)
        self.box_predictor = BoxPredictor(
            config.box_head_channels, num_classes, class_agnostic=config.class_agnostic_boxes
        )
        widths = [config.fpn_channels] + [config.mask_head_channels] * config.mask_head_convs
        self.mask_head = nn.Sequential(
            *(conv_layer(i, o, 3, grouped, relu=True) for i, o in itertools.pairwise(widths))
        )
        for module in self.mask_head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.mask_predictor = MaskPredictor(widths[-1], config.mask_head_channels, num_classes)

    def forward(
        self, features: list[Tensor], proposals: Proposals, batch: Batch
    ) -> tuple[Detections | None, dict[str, Tensor]]:
        pyramid = features[:4]  # P6 serves the RPN alone
        if self.training:
            assert batch.targets is not None
            rois = self.sample(proposals, batch.targets, batch.seeds)
            losses = self.box_losses(pyramid, rois, batch)
            return None, losses | {"mask": self.mask_loss(pyramid, rois, batch)}
        boxes, scores, labels, num_detections = self.detect(pyramid, proposals, batch)
        mask_probs = self.mask_logits(pyramid, boxes, labels, batch).sigmoid()
        return Detections(boxes, scores, labels, num_detections, mask_probs), {}

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> SampledRois:
        """Proposals and ground truths themselves, matched and thinned to S an image."""
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
        """K: the share of positives on an accelerator, where asking would wait; on the CPU, which knows, the most there are."""
        if is_positive.device.type == "cpu":
            return max(1, int(is_positive.sum(1).max()))
        return min(int(self.config.roi_batch_size * self.config.roi_positive_fraction), is_positive.shape[1])

    def box_logits(self, pyramid: list[Tensor], boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class logits [N, R, 1 + C] and deltas [N, R, 1 + C, 4] (or [N, R, 1, 4], class-agnostic) of boxes [N, R, 4]."""
        pooled = self._pool(pyramid, boxes, batch, self.config.box_pool_size)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits.unflatten(0, boxes.shape[:2]), deltas.unflatten(0, boxes.shape[:2])

    def mask_logits(self, pyramid: list[Tensor], boxes: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """[N, R, M, M] logits of the masks of boxes [N, R, 4] for labels [N, R]."""
        pooled = self._pool(pyramid, boxes, batch, self.config.mask_pool_size)
        logits = self.mask_predictor(self.mask_head(pooled), labels.flatten())
        return logits.unflatten(0, boxes.shape[:2])

    def box_losses(self, pyramid: list[Tensor], rois: SampledRois, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy over the sampled RoIs, smooth L1 over the positive ones, in their class's deltas."""
        assert batch.targets is not None
        logits, deltas = self.box_logits(pyramid, rois.boxes, batch)
        class_losses = F.cross_entropy(logits.flatten(0, 1), rois.labels.flatten(), reduction="none")
        gt_boxes = batch.targets.gt_boxes.gather(1, rois.gt_rows[..., None].expand(-1, -1, 4))
        gt_deltas = cuda_ops.encode_boxes(gt_boxes, rois.boxes, self.config.box_reg_weights)
        own_class = rois.labels.clamp(max=deltas.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
        own_deltas = deltas.gather(2, own_class).squeeze(2)  # [N, S, 4]
        box_losses = F.smooth_l1_loss(own_deltas, gt_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(2)
        return {
            "classifier": per_image_mean(class_losses.view_as(rois.labels), rois.weights),
            "box_reg": per_image_mean(box_losses * (rois.labels > 0), rois.weights),
        }

    def mask_loss(self, pyramid: list[Tensor], rois: SampledRois, batch: Batch) -> Tensor:
        """Binary cross entropy of the pixels of the positive RoIs' own class."""
        assert batch.targets is not None
        share = rois.num_mask_rois
        boxes, labels, gt_rows = rois.boxes[:, :share], rois.labels[:, :share], rois.gt_rows[:, :share]
        logits = self.mask_logits(pyramid, boxes, labels, batch)  # [N, K, M, M]
        gt_masks = cuda_ops.rasterize_polygons(boxes, gt_rows, batch.targets.polygons, logits.shape[-1])
        losses = F.binary_cross_entropy_with_logits(logits, gt_masks, reduction="none").mean((2, 3))  # [N, K]
        return per_image_mean(losses, (labels > 0).float())

    def detect(
        self, pyramid: list[Tensor], proposals: Proposals, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [N, D, 4], scores [N, D], labels [N, D] and their number [N].

        Unlike training, this asks the host twice how many candidates there are: results go to the host anyway, and shapes
        that fit cost less than shapes that hold the worst case.
        """
        candidates = self.candidates(pyramid, proposals, batch)
        return keep_best(candidates, self.config.nms_iou, self.config.detections_per_image)

    def candidates(self, pyramid: list[Tensor], proposals: Proposals, batch: Batch) -> Candidates:
        """Every class of every proposal that scores above model.score_threshold, best first."""
        config = self.config
        logits, deltas = self.box_logits(pyramid, proposals.boxes, batch)
        scores = logits.softmax(2)[..., 1:]  # [N, P, C]
        is_real = torch.arange(scores.shape[1], device=scores.device) < proposals.num_proposals[:, None]
        classes = scores.shape[2]
        scores = scores.masked_fill(~(is_real[..., None] & (scores > config.score_threshold)), -torch.inf).flatten(1)
        most = int((scores > -torch.inf).sum(1).max())
        scores, places = scores.sort(dim=1, descending=True, stable=True)
        scores, places = scores[:, :most], places[:, :most]  # [N, Q] of (proposal, class) pairs
        rows, labels = places // classes, places % classes + 1
        own_deltas = rows if config.class_agnostic_boxes else rows * (classes + 1) + labels
        boxes = cuda_ops.decode_boxes(
            deltas.flatten(1, 2).gather(1, own_deltas[..., None].expand(-1, -1, 4)),
            proposals.boxes.gather(1, rows[..., None].expand(-1, -1, 4)),
            config.box_reg_weights,
        )
        boxes = clip_boxes(boxes, batch.image_sizes)
        scores = scores.masked_fill(((boxes[..., 2:] - boxes[..., :2]) < MIN_BOX_SIDE_PX).any(2), -torch.inf)
        return Candidates(boxes, scores, labels)

    def _pool(self, pyramid: list[Tensor], boxes: Tensor, batch: Batch, size: int) -> Tensor:
        """[N·R, channels, size, size]."""
        height, width = batch.images.shape[-2:]
        return cuda_ops.multilevel_roi_align(
            pyramid,
            boxes,
            image_size=(height, width),
            output_size=size,
            sampling_ratio=self.config.pool_sampling_ratio,
        ).flatten(0, 1)


def clip_boxes(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes [N, R, 4] cut to their images, sizes [N, 2] (height, width)."""
    limits = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # [N, 1, 4]: width, height, width, height
    return boxes.clamp(min=0).minimum(limits)
