"""Comparison of an exported program with its network, detection by detection.

Shapes: N images, D rows, R and S detections of one image in either.
A program may round differently, so that two detections with nearly equal scores change places, or one at the edge of
what is kept is missing. Detections are therefore paired by class and place, not by row.
"""

import torch
from torch import Tensor

from model.inference.formats import Outputs

EDGE = 1e-4  # a score so near the lowest that is kept may be kept by one and not by the other


def differences(wanted: Outputs, got: Outputs, min_score: float) -> tuple[dict[str, float], int]:
    """Largest differences between the network's outputs for a batch and the program's.

    Args:
        wanted: outputs of the network, see `Detector`.
        got: outputs of the program.
        min_score: score above which the network keeps detections, model.score_threshold.

    Returns:
        `unpaired`: the number of detections that only one of the two has, without those at the edge; and for boxes
        (px), scores and mask_probs the largest difference over the pairs, 0 if there is none, inf if it is no number.
        The number of pairs.
    """
    largest = {"unpaired": 0.0} | {name: 0.0 for name in ("boxes", "scores", "mask_probs") if name in wanted}
    num_pairs = 0
    for n in range(len(wanted["boxes"])):
        one, two = _of_image(wanted, n), _of_image(got, n)
        rows, partners = _pairs(one, two)
        num_pairs += len(rows)
        edge = max(min_score, float(one["scores"][-1]) if len(one["scores"]) == wanted["scores"].shape[1] else 0.0)
        for scores, paired in ((one["scores"], rows), (two["scores"], partners)):
            is_alone = torch.ones_like(scores, dtype=torch.bool).index_fill_(0, paired, False)
            largest["unpaired"] += float((is_alone & ~(scores <= edge + EDGE)).sum())
        for name in largest.keys() & one.keys():
            if len(rows):
                far = (one[name][rows] - two[name][partners]).abs().max().nan_to_num(nan=torch.inf)
                largest[name] = max(largest[name], float(far))
    return largest, num_pairs


def beyond(found: dict[str, float], tolerance: float) -> dict[str, float]:
    """Select the differences above the tolerance."""
    return {name: value for name, value in found.items() if not value <= tolerance}


def _of_image(outputs: Outputs, n: int) -> Outputs:
    """The detections of image n, in float32 on the CPU."""
    count = int(outputs["num_detections"][n])
    return {name: tensor[n, :count].float().cpu() for name, tensor in outputs.items() if name != "num_detections"}


def _pairs(one: Outputs, two: Outputs) -> tuple[Tensor, Tensor]:
    """Rows of detections of one class whose boxes are nearest to each other."""
    if not len(one["boxes"]) or not len(two["boxes"]):
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    distance = (one["boxes"][:, None] - two["boxes"]).abs().amax(2)  # [R, S]
    distance = distance.masked_fill(one["labels"][:, None] != two["labels"], torch.inf)
    partners = distance.argmin(1)
    rows = torch.arange(len(partners))
    is_mutual = (distance.argmin(0)[partners] == rows) & (distance[rows, partners] < torch.inf)
    return rows[is_mutual], partners[is_mutual]
