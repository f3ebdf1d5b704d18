"""Hand-over of batches from a worker process: all tensors of a batch lie in one anonymous file in memory.

torch's own way takes a file in /dev/shm, which has 64 MiB in a Docker container, and an open file for each tensor; what
it cannot hand over it drops, and the reader waits for it. Anonymous files need no /dev/shm, a batch needs one of them,
and all that can fail fails in `Packed`, whose caller can report it.
"""

import io
import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; enough for any dtype and vector instruction


class Packed:
    """A picklable value on its way to another process, which can unpack it once."""

    def __init__(self, value: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
        self._pickled = stream.getvalue()
        contents = [buffer.raw() for buffer in buffers]
        self._lengths = [content.nbytes for content in contents]
        self._file = _write(contents) if contents else None

    def unpack(self) -> Any:
        """Return the value; its tensors lie in memory that is shared with nobody any more."""
        buffers: list[memoryview] = []
        if self._file is not None:
            descriptor = self._file.detach()
            try:
                memory = memoryview(mmap.mmap(descriptor, _starts(self._lengths)[-1]))
            finally:
                os.close(descriptor)
            starts = _starts(self._lengths)
            buffers = [memory[start : start + length] for start, length in zip(starts, self._lengths, strict=False)]
        return pickle.loads(self._pickled, buffers=buffers)

    def pin_memory(self) -> Any:
        """Return the value, or each part of a tuple, in page-locked memory; called by torch's data loader.

        An error is returned, since torch would pass on only the text of its traceback.
        """
        try:
            value = self.unpack()
            return tuple(part.pin_memory() for part in value) if isinstance(value, tuple) else value.pin_memory()
        except Exception as error:
            return error


class _Pickler(pickle.Pickler):
    """Pickler that leaves the memory of tensors to its buffer_callback."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, Tensor) or not value.numel():
            return NotImplemented
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
        layout = value.storage_offset(), value.shape, value.stride()
        return _tensor, (pickle.PickleBuffer(memory.data), value.dtype, layout)


def _tensor(buffer: memoryview, dtype: torch.dtype, layout: tuple[Any, ...]) -> Tensor:
    storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, *layout)


def _write(contents: Sequence[memoryview]) -> Any:
    """Write an anonymous file; return a handle that another process can detach once."""
    starts = _starts([content.nbytes for content in contents])
    descriptor = _anonymous_file()
    try:
        os.truncate(descriptor, starts[-1])
        for start, content in zip(starts, contents, strict=False):
            while content:  # the system writes at most 2 GiB at a time
                written = os.pwrite(descriptor, content, start)
                start, content = start + written, content[written:]
        return DupFd(descriptor)
    finally:
        os.close(descriptor)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Start of each content in the file, and the file's length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + -(-length // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _anonymous_file() -> int:
    if sys.platform == "linux":
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
