"""Region proposal network: from feature maps to proposals.

Shapes: N images, L levels, A anchors of one image over all levels, A / k cells of the feature maps with k anchors each,
C channels, G ground-truth boxes, padded, S sampled anchors, P proposals.
Boxes are (x1, y1, x2, y2) in input pixels. Source: Faster R-CNN (arXiv:1506.01497); one head for all levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_ops
from model.config import ModelConfig
from model.network.anchors import Grid, anchors_per_cell, make_grid
from model.network.backbone import feature_channels
from model.network.layers import ConvLayer
from model.network.sampling import per_image_mean, sample_matches
from model.structures import Batch, Targets

SMOOTH_L1_BETA = 1.0 / 9.0
ANCHOR_STREAM = 1


@dataclass(frozen=True)
class Proposals:
    """Candidate boxes, best first; rows from num_proposals[n] on are padding."""

    boxes: Tensor  # [N, P, 4] float32
    scores: Tensor  # [N, P] float32, 0 to 1: probability of an object; 0 for padding
    num_proposals: Tensor  # [N] int64


class RPNHead(nn.Module):
    """3×3 convolutions shared by all levels, then objectness and box deltas for each anchor of a cell."""

    def __init__(self, channels: int, anchors_per_cell: int, convs: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(ConvLayer(channels, channels, 3, None, relu=True) for _ in range(convs)))
        self.cls_logits = nn.Conv2d(channels, anchors_per_cell, 1)
        self.bbox_pred = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Objectness logits [N, A], box deltas [N, A, 4], both ordered (level, y, x, anchor), and anchors per level."""
        logits, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            # Channels-last memory is already (y, x, anchor): no copy but the one that joins the levels.
            logits.append(self.cls_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).flatten(1))
        level_sizes = [level.shape[1] for level in logits]
        return torch.cat(logits, 1).float(), torch.cat(deltas, 1).unflatten(1, (-1, 4)).float(), level_sizes

    def at_anchors(self, features: Sequence[Tensor], idxs: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the output of `forward` for some anchors, at their cells only.

        The gradient of a loss over 256 anchors is zero at all other cells, and the gradients of 3×3 convolutions
        cost twice their forward pass, so it pays to gather the few inputs that matter.

        Args:
            idxs: [N, S] int64, indices of anchors.
            neighbors: [A / k, 9] from `cell_neighbors`.

        Returns:
            Objectness logits [N, S] and box deltas [N, S, 4], float32.
        """
        cells, anchor = idxs // self.cls_logits.out_channels, idxs % self.cls_logits.out_channels
        hidden = self._hidden_at(features, cells, neighbors, len(self.conv) - 1)
        logits = F.linear(hidden, self.cls_logits.weight.flatten(1), self.cls_logits.bias).float()
        deltas = F.linear(hidden, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias).float()
        own_deltas = anchor[..., None, None].expand(-1, -1, 1, 4)
        return logits.gather(2, anchor[..., None]).squeeze(2), deltas.unflatten(2, (-1, 4)).gather(
            2, own_deltas
        ).squeeze(2)

    def _hidden_at(self, features: Sequence[Tensor], cells: Tensor, neighbors: Tensor, layer: int) -> Tensor:
        """Output [N, S, C] of a convolution at cells [N, S]; it needs that of the one before at 9 cells for each."""
        around = neighbors[cells]  # [N, S, 9]
        if layer:
            inputs = self._hidden_at(features, around.clamp(min=0).flatten(1), neighbors, layer - 1)
            inputs = inputs.unflatten(1, around.shape[1:]).masked_fill(around[..., None] < 0, 0.0).flatten(2)
        else:
            inputs = gather_patches(features, around)
        conv = cast(nn.Conv2d, self.conv.get_submodule(f"{layer}.0"))
        kernel = conv.weight.permute(0, 2, 3, 1).flatten(1)  # [C, 9·C], in the order of the patches
        return F.relu_(F.linear(inputs, kernel, conv.bias))


def gather_patches(features: Sequence[Tensor], neighbors: Tensor) -> Tensor:
    """Gather the inputs of a 3×3 convolution at S cells.

    `index_select` is used because its gradient obeys `torch.use_deterministic_algorithms` on every device.

    Args:
        features: L levels [N, C, H_l, W_l].
        neighbors: [N, S, 9], rows of `cell_neighbors`.

    Returns:
        [N, S, 9·C].
    """
    table = torch.cat([feature.permute(0, 2, 3, 1).flatten(1, 2) for feature in features], 1)  # [N, cells, C]
    first = torch.arange(len(table), device=table.device)[:, None, None] * table.shape[1]
    rows = (neighbors.clamp(min=0) + first).flatten()
    patches = table.flatten(0, 1).index_select(0, rows).view(*neighbors.shape, table.shape[2])
    return patches.masked_fill(neighbors[..., None] < 0, 0.0).flatten(2)


class RPN(nn.Module):
    """Region proposal network: proposals and, in training, two losses."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(feature_channels(config), anchors_per_cell(config), config.rpn_convs)
        self._grids: dict[tuple[torch.device, tuple[int, int]], Grid] = {}

    def forward(self, features: Sequence[Tensor], batch: Batch) -> tuple[Proposals, dict[str, Tensor]]:
        with torch.no_grad():  # proposals carry no gradient; the losses recompute what they need
            logits, deltas, level_sizes = self.head(features)
        grid = self.grid(features, batch)
        proposals = self.propose(logits, deltas, grid.anchors, batch, level_sizes)
        if batch.targets is None or not self.training:
            return proposals, {}
        return proposals, self.losses(features, grid, batch.targets, batch.seeds)

    def grid(self, features: Sequence[Tensor], batch: Batch) -> Grid:
        """Return the grid, made once per bucket and device."""
        height, width = batch.images.shape[-2:]
        key = (features[0].device, (height, width))
        if key not in self._grids:
            sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
            self._grids[key] = make_grid(self.config, sizes, (height, width), features[0].device)
        return self._grids[key]

    @torch.no_grad()
    def propose(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch, level_sizes: Sequence[int]
    ) -> Proposals:
        """Select the best boxes of each level, apply NMS per level, then keep the best of all levels."""
        config = self.config
        mode = "train" if self.training else "test"
        pre_nms, post_nms = getattr(config, f"rpn_pre_nms_top_n_{mode}"), getattr(config, f"rpn_post_nms_top_n_{mode}")
        boxes, scores = cuda_ops.select_proposals(
            logits,
            deltas,
            anchors,
            batch.image_sizes,
            level_sizes,
            pre_nms_top_n=pre_nms,
            min_size=config.min_proposal_side_px,
        )  # [N, L, K, 4], [N, L, K]
        images, levels, top_k = scores.shape
        kept = min(top_k, post_nms)
        idxs, counts = cuda_ops.batched_nms(boxes.flatten(0, 1), scores.flatten(0, 1), config.rpn_nms_iou, kept)
        idxs = idxs.view(images, levels, kept)
        is_kept = torch.arange(kept, device=idxs.device) < counts.view(images, levels, 1)
        scores = scores.gather(2, idxs).masked_fill_(~is_kept, -torch.inf).flatten(1)  # [N, L·kept]
        boxes = boxes.gather(2, idxs[..., None].expand(-1, -1, -1, 4)).flatten(1, 2)
        scores, best = scores.topk(min(post_nms, scores.shape[1]), dim=1)  # [N, P]
        is_real = scores > -torch.inf
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4)) * is_real[..., None]
        return Proposals(boxes, scores.masked_fill(~is_real, 0.0), is_real.sum(1))

    def losses(self, features: Sequence[Tensor], grid: Grid, targets: Targets, seeds: Tensor) -> dict[str, Tensor]:
        """Binary cross entropy of objectness over the sampled anchors; smooth L1 of boxes over the positive ones."""
        config = self.config
        matched = cuda_ops.match_boxes(
            grid.anchors, targets.gt_boxes, targets.num_gt, config.rpn_fg_iou, config.rpn_bg_iou, low_quality=True
        )  # [N, A]
        samples = sample_matches(
            matched,
            seeds,
            batch_size=config.rpn_batch_size,
            positive_fraction=config.rpn_positive_fraction,
            stream=ANCHOR_STREAM,
        )
        logits, deltas = self.head.at_anchors(features, samples.idxs, grid.neighbors)  # [N, S], [N, S, 4]
        gt_rows = matched.gather(1, samples.idxs).clamp(min=0)[..., None].expand(-1, -1, 4)
        gt_deltas = cuda_ops.encode_boxes(targets.gt_boxes.gather(1, gt_rows), grid.anchors[samples.idxs])
        box_losses = F.smooth_l1_loss(deltas, gt_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(2)
        objectness = F.binary_cross_entropy_with_logits(logits, samples.is_positive.float(), reduction="none")
        return {
            "objectness": per_image_mean(objectness, samples.weights),
            # The mean is over all samples, so that the weight of a positive does not depend on their number.
            "rpn_box_reg": per_image_mean(box_losses * samples.is_positive, samples.weights),
        }
