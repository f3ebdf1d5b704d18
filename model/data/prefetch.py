"""Prefetch of batches to the device: the next batch is copied while the current one is computed."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model.structures import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches on the device, in order; image ids stay on the host.

    On CUDA each copy runs on a separate stream and starts before the preceding batch is yielded, so the device computes
    and copies at once and the host waits for neither, provided the batches are in pinned memory, as from the data
    loader. On other devices a batch is moved when it is asked for; a batch already on the device is passed through.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch if batch.images.device == device else batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        current, ahead = ahead, _start_copy(batch, device, stream)
        if current is not None:
            yield _hand_over(*current)
    if ahead is not None:
        yield _hand_over(*ahead)


def _start_copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """Start the copy; return it and the event of its completion."""
    with torch.cuda.stream(stream):
        copy = batch.to(device, non_blocking=True)
        return copy, stream.record_event()


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the current stream use a batch once it is copied, and free its memory only after that stream is done."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:  # not the image ids
            tensor.record_stream(current)
        return tensor

    return batch.map(keep)
