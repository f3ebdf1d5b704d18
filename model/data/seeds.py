"""Seeds of samples, and what follows from them alone: the same in every process and on every machine."""

import numpy as np
from numpy.typing import NDArray


def sample_seeds(
    seed: int, epoch: int, images: NDArray[np.int64], repetition: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """A seed for each image of an epoch: [n] int64 ≥ 0.

    Args:
        repetition: number of each among the repetitions of its image [n], from 0; None: all 0.
    """
    state = _splitmix(np.full(len(images), seed, dtype=np.uint64))
    for value in (np.uint64(epoch), images.astype(np.uint64)):
        state = _splitmix(state ^ value)
    if repetition is not None and repetition.any():
        state = np.where(repetition > 0, _splitmix(state ^ repetition.astype(np.uint64)), state)
    return (state >> np.uint64(1)).astype(np.int64)


def quarter_turns(seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Quarter turns that samples of these seeds get with data.augment.quarter_turns: [n], 0 to 3."""
    return (_splitmix(seeds.astype(np.uint64)) >> np.uint64(62)).astype(np.int64)


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply one step of SplitMix64 (Steele et al., 2014), a bijection that scatters close values over all 64 bits."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
