"""Sampling of the anchors and RoIs that take part in the losses: random, but a function of the image's seed alone.

Shapes: N images, A candidates (anchors or RoIs), S = min(batch_size, A) samples. Without a generator or other state,
the choice for an image is the same in any batch, on any rank and after any resume.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ops import IGNORE


@dataclass(frozen=True)
class Samples:
    """Sampled candidates of each image: positives first, then negatives, then padding of weight 0."""

    idxs: Tensor  # [N, S] int64, indices of candidates
    is_positive: Tensor  # [N, S] bool
    weights: Tensor  # [N, S] float32: 1 for a sample, 0 for padding


def random_priority(seeds: Tensor, size: int, stream: int) -> Tensor:
    """Uniform numbers in [0, 1), a pure function of seed, position and stream.

    Args:
        seeds: [N] int64.
        size: numbers per image.
        stream: distinguishes the uses of one seed.

    Returns:
        [N, size] float32, multiples of 2^-24.

    Source: the finaliser of MurmurHash3 (32 bits), applied once to the two halves of each seed and once to each
    position.
    """
    low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    key = _mix32(_mix32(low + stream * 0x9E3779B1 & 0xFFFFFFFF) ^ high)  # [N]
    position = torch.arange(size, device=seeds.device) * 0x85EBCA77 & 0xFFFFFFFF  # [size]
    return (_mix32(position ^ key[:, None]) >> 8).float().mul_(2.0**-24)


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def sample_matches(
    matched_idxs: Tensor, seeds: Tensor, *, batch_size: int, positive_fraction: float, stream: int
) -> Samples:
    """Choose up to batch_size candidates per image, at most positive_fraction of them positive, the rest negative.

    Args:
        matched_idxs: [N, A] int64: a ground-truth row (positive), BACKGROUND (negative) or IGNORE (never chosen).
        seeds: [N] int64.

    Source: Fast R-CNN (arXiv:1504.08083), section 2.3.
    """
    candidates = matched_idxs.shape[1]
    size = min(batch_size, candidates)
    priority = random_priority(seeds, candidates, stream)  # [N, A]
    is_positive = matched_idxs >= 0
    # Positives beyond their share are dropped; the others outrank (2 to 3) every negative (0 to 1).
    share = min(int(batch_size * positive_fraction), candidates)
    chosen, chosen_idxs = torch.where(is_positive, priority, -1.0).topk(share, dim=1)  # [N, share]
    rank = torch.where(is_positive | (matched_idxs == IGNORE), -1.0, priority)
    kept = torch.where(chosen >= 0, chosen + 2.0, rank.gather(1, chosen_idxs))
    rank.scatter_(1, chosen_idxs, kept)
    rank, idxs = rank.topk(size, dim=1)  # [N, S], sorted
    return Samples(idxs, rank >= 1.5, (rank >= 0).float())


def per_image_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean over each image's samples, then over images: [N, S], [N, S] → scalar.

    Every image has equal weight, so a batch, its micro-batches and its shares over processes give the same gradient.
    torchvision pools samples over the batch instead, which is equal if images have equally many.
    """
    return ((losses * weights).sum(1) / weights.sum(1).clamp(min=1.0)).mean()
