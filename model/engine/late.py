"""Values that the host reads while the device has gone on to later work, without waiting for that."""

import torch
from torch import Tensor


class LateValue:
    """A scalar whose copy to the host is begun at once; reading it waits for that copy alone.

    `Tensor.item` waits for all that its stream was given until then. Of a value that is a step old, too, it would have
    the host wait for the present step, and the device then for the host.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copied: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = value.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.current_stream(value.device).record_event()

    def item(self) -> float:
        """Return the value."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()
