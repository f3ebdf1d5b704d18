"""Repeat-factor sampling: images of rare classes occur several times in an epoch.

Source: LVIS (arXiv:1908.03195), appendix B.1: class c, on a fraction f(c) of the images, has the repeat factor
r(c) = max(1, sqrt(t / f(c))), and an image the largest one of its classes. Fractions of a repeat are rounded up or down
at random in each epoch, as in Detectron2, so that they hold on average.
"""

import numpy as np
from numpy.typing import NDArray

from model.config import DataConfig
from model.data.index import CocoIndex

_STREAM = 1  # random numbers of an epoch besides those of its order


def training_images(index: CocoIndex, data: DataConfig) -> NDArray[np.int64]:
    """Indices of the images to train on: those with an instance and, with data.keep_empty_images, the empty ones."""
    return np.flatnonzero(index.has_instances | index.is_empty if data.keep_empty_images else index.has_instances)


def repeat_factors(index: CocoIndex, data: DataConfig) -> NDArray[np.float64]:
    """Mean number of times that an epoch has each training image: [n]; all 1 without data.repeat_threshold.

    Crowds do not count, since training leaves them out.
    """
    images = training_images(index, data)
    factors = np.ones(len(images))
    if not data.repeat_threshold:
        return factors
    image_of_instance, labels = index.ordinary_labels()
    pairs = np.unique(np.stack([np.searchsorted(images, image_of_instance), labels]), axis=1)  # [2, p], each once
    _, which, counts = np.unique(pairs[1], return_inverse=True, return_counts=True)
    of_class = np.maximum(np.sqrt(data.repeat_threshold * len(images) / counts), 1.0)
    np.maximum.at(factors, pairs[0], of_class[which])
    return factors


def draw_repeats(factors: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Number of times that an epoch has each image [n]: the factor, rounded up with the probability of its fraction."""
    whole = np.floor(factors)
    shares = np.random.default_rng((seed, epoch, _STREAM)).random(len(factors))
    return (whole + (shares < factors - whole)).astype(np.int64)
