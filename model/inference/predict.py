"""Prediction as a generator: detections batch by batch."""

from collections.abc import Iterable, Iterator
from itertools import tee

import torch

from model.data.prefetch import prefetch
from model.engine.precision import autocast, set_float32_products, without_kernel_search
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections


def predict(
    model: MaskRCNN,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: str = "float32",
    score_threshold: float | None = None,
) -> Iterator[tuple[Batch, Detections]]:
    """Yield each batch, unchanged, with its detections; the model is in evaluation mode meanwhile.

    Args:
        dtype: train.dtype.
        score_threshold: see MaskRCNN.forward.
    """
    set_float32_products(device, dtype)
    was_training = model.training
    model.eval()
    try:
        batches, sources = tee(batches)
        for batch, on_device in zip(batches, prefetch(sources, device), strict=True):
            with torch.inference_mode(), without_kernel_search(), autocast(device, dtype):
                detections = model(on_device, score_threshold)
            assert isinstance(detections, Detections)
            yield batch, detections
    finally:
        model.train(was_training)
