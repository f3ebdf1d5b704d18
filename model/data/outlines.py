"""Instances of one image as a list of outlines each, and back to flat arrays.

An outline is a polygon [v, 2] float32 (x, y); an instance has several parts, or none if it has a box alone.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from model.data.index import CocoInstances, offsets
from model.data.transforms import Floats

Parts = list[Floats]  # outlines of one instance


def parts_of_each(instances: CocoInstances) -> list[Parts]:
    """The parts of each instance, as views."""
    spans = list(pairwise(instances.part_offsets.tolist()))
    parts = [instances.xy[start:stop] for start, stop in spans]
    return [parts[first:last] for first, last in pairwise(instances.instance_offsets.tolist())]


def pack_instances(
    boxes: Sequence[Floats], labels: NDArray[np.int64], is_crowd: NDArray[np.bool_], parts: Sequence[Parts]
) -> CocoInstances:
    """Instances of these boxes [4], labels [k], crowd flags [k] and parts."""
    every_part = [part for of_instance in parts for part in of_instance]
    return CocoInstances(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=labels,
        is_crowd=is_crowd,
        xy=np.concatenate([np.zeros((0, 2), dtype=np.float32), *every_part]),
        part_offsets=offsets([len(part) for part in every_part]),
        instance_offsets=offsets([len(of_instance) for of_instance in parts]),
    )
