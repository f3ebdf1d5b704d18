"""Stand-ins for torch.cuda's streams and graphs, so that what is built on them runs where there is no GPU.

Everything happens at once and in order, so streams and events have nothing to do. A graph is what it is on a GPU, down
to what fails: what is launched while it is captured is noted and has no effect on memory that was there before;
replaying it does the noted again, on the same memory. What Python does meanwhile (gradients that are set, counters that
count) stays done. A capture in which something fails raises twice, as torch's does: from where it failed, and from the
end of the capture.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
PREVIOUS_ERROR = "CUDA error: operation failed due to a previous error during capture"


class Event:
    """Has always happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Stream:
    """Runs everything at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self) -> Event:
        return Event()


class Pool:
    """Memory that graphs share, and how many of them are alive: torch refuses one whose last graph is gone."""

    def __init__(self) -> None:
        self.graphs: set[int] = set()
        self.was_used = False


class CUDAGraph:
    """What was launched during a capture."""

    def __init__(self) -> None:
        self.launches: list[tuple[Callable, tuple, dict[str, Any], list[Tensor]]] = []
        self.pool: Pool | None = None

    def __del__(self) -> None:
        if self.pool is not None:
            self.pool.graphs.discard(id(self))

    @torch.no_grad()
    def replay(self) -> None:
        """Do again what was launched, into the same memory."""
        for func, args, kwargs, outputs in self.launches:
            theirs = {_address(tensor) for tensor in _tensors((args, kwargs))}
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if _address(old) not in theirs:  # neither a view nor changed in place
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """torch.cuda.graph: captures what is launched within it."""

    refused: str | None = None  # an operator that fails while a graph is captured
    graphs: "weakref.WeakSet[CUDAGraph]"  # those that are alive

    def __init__(self, cuda_graph: CUDAGraph, *, pool: Pool, stream: Stream, capture_error_mode: str) -> None:
        super().__init__()
        assert isinstance(stream, Stream)
        assert capture_error_mode == "thread_local"
        self._graph, self._pool = cuda_graph, pool
        self._new: set[int] = set()  # addresses of memory that the graph brought forth
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}  # by address: what it held

    def __enter__(self) -> "Capture":
        assert not self._pool.was_used or self._pool.graphs, "use_count > 0 INTERNAL ASSERT FAILED"
        self._pool.was_used = True
        self._pool.graphs.add(id(self._graph))
        self._graph.pool = self._pool
        self.graphs.add(self._graph)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for storage, held in self._before.values():
            storage.copy_(held)
        if exc[1] is not None:
            raise RuntimeError(PREVIOUS_ERROR)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.refused is not None and self.refused in func.name():
            raise RuntimeError(NOT_PERMITTED)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(value)
        output = func(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        outputs = _tensors(output)
        self._new |= {_address(tensor) for tensor in outputs} - given
        self._graph.launches.append((func, args, kwargs, outputs))
        return output

    def _keep(self, value: Any) -> None:
        for tensor in _tensors(value):
            address = _address(tensor)
            if address and address not in self._new and address not in self._before:
                storage = tensor.untyped_storage()
                self._before[address] = storage, storage.clone()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def stand_ins() -> Iterator[type[Capture]]:
    """torch.cuda has the stand-ins for as long as the context lasts; `refused` of what is given makes captures fail."""
    default = Stream(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", _on)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: default)
        patch.setattr(torch.Tensor, "record_stream", _record_stream)  # torch's wants a stream of its own
        patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        patch.setattr(torch.cuda, "graph", Capture)
        patch.setattr(torch.cuda, "graph_pool_handle", Pool)
        patch.setattr(Capture, "refused", None)
        patch.setattr(Capture, "graphs", weakref.WeakSet(), raising=False)
        yield Capture


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    assert isinstance(stream, Stream)
    yield


def _record_stream(tensor: Tensor, stream: Stream) -> None:
    """Memory is never used again too early."""
    assert isinstance(stream, Stream)
