"""Split of one data set into train and val: by a fraction and a seed, the same on every machine.

A key goes where its hash says, so that the order of keys does not matter, and a few new images move few others.
"""

import hashlib
from collections.abc import Collection

from model.errors import UserError


def val_part(keys: Collection[str], fraction: float, seed: int, *, where: str) -> frozenset[str]:
    """Choose the keys that are val; the others are train. Each part gets at least one.

    Args:
        keys: names or ids of the images, each once.
        fraction: share of val, above 0 and below 1.
        seed: another one gives another split.
        where: the source, for the error.

    Raises:
        UserError: if there are fewer than two keys.
    """
    if len(keys) < 2:
        raise UserError(f"{where}: must have at least two images to be split into train and val, got {len(keys)}")
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    return frozenset(ranked[: min(max(round(fraction * len(ranked)), 1), len(ranked) - 1)])
