"""Batches on the device one ahead: the next one is copied while the present one is computed with."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from model.structures import Batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device, in order, image ids still on the host.

    On CUDA each copy runs on a stream of its own and begins before the batch ahead of it is yielded, so the device computes and
    copies at once, and the host waits for neither. That holds for batches in pinned memory, as the data loader gives them.
    Elsewhere a batch is moved when it is asked for, and one that is there already is passed on as it is.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch if batch.images.device == device else batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        present, ahead = ahead, _start_copy(batch, device, stream)
        if present is not None:
            yield _hand_over(*present)
    if ahead is not None:
        yield _hand_over(*ahead)


def _start_copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """The copy, and the event of its end."""
    with torch.cuda.stream(stream):
        copy = batch.to(device, non_blocking=True)
        return copy, stream.record_event()


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the present stream use a batch once it is copied, and its memory be used again once that stream is through with it."""
    present = torch.cuda.current_stream(batch.images.device)
    present.wait_event(copied)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_cuda:  # image ids are not
            tensor.record_stream(present)
        return tensor

    return batch.map(keep)
