"""Batches made by worker processes that cannot make a stage hang, however they fail.

A worker catches every error and sends its text in place of the batch. Nothing else is awaited for longer than
`data.timeout_s`: then a thread kills the workers, which ends whatever this process waits for. Workers ignore the
signals of batch systems and terminals, and so are always killed; on Linux they also die with this process, and leave
no file behind.
"""

import ctypes
import errno
import multiprocessing
import os
import queue
import resource
import secrets
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, util
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from model.config import DataConfig
from model.data.handover import Packed
from model.data.index import CocoIndex
from model.errors import UserError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1  # Linux's prctl: a signal for this process when its parent dies
_WAYS_OUT = {
    errno.EMFILE: "raise the limit of open files (`ulimit -n`, now {open_files})",
    errno.ENFILE: "close other programs, since the machine has no more open files",
    errno.ENOSPC: "make room in /dev/shm and the folder for temporary files (docker run --shm-size=1g, cluster.shm)",
    errno.ENOMEM: "give it more memory (cluster.memory)",
    errno.EAGAIN: "raise the limit of processes (`ulimit -u`, or the container's)",
}


class LoaderError(UserError):
    """The workers cannot deliver a batch."""


@dataclass(frozen=True)
class _Failure:
    """The reason that a worker sends in place of a batch."""

    reason: str


class Loader(Generic[T]):
    """Batches of samples, in the order of their keys; iterators must be closed to end the workers at once."""

    def __init__(
        self,
        index: CocoIndex,
        samples: Dataset[Any],
        collate: Callable[[Sequence[Any]], T],
        keys: Iterable[Sequence[Any]],
        data: DataConfig,
    ) -> None:
        """Prepare the loader; workers start with an iterator.

        Args:
            index: where the samples come from.
            samples: samples by key: an image's number, or a tuple that starts with it.
            collate: makes a batch of samples.
            keys: the keys of each batch.
            data: number of workers, and how long one may take.
        """
        self._index, self._timeout_s, self._keys = index, data.timeout_s, _Keys(keys)
        self.torch_loader = _TorchLoader(  # torch gives each worker one thread; Pillow and simplejpeg start none
            _Batches(index, samples, collate, in_workers=data.workers > 0),
            batch_size=None,
            sampler=self._keys,
            collate_fn=_unchanged,
            num_workers=data.workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=start_method(data.workers),
            worker_init_fn=_begin_worker,
        )

    def __len__(self) -> int:
        return len(self.torch_loader)

    def __iter__(self) -> Generator[T, None, None]:
        if self.torch_loader.num_workers == 0:
            yield from self.torch_loader
            return
        team = _Team(self.torch_loader, self._timeout_s, lambda: _paths(self._index, drawn[0]))
        drawn = self._keys.drawn
        try:
            while (batch := team.next()) is not None:
                drawn.popleft()
                yield batch
        finally:
            team.end()


class _TorchLoader(DataLoader[Any]):
    """torch's loader, which does not warn of more workers than cores: many of them wait for the disk.

    The log says how long steps wait for data, so that data.workers can be set by measurement.
    """

    def check_worker_number_rationality(self) -> None:
        """Accept any number of workers."""


class _Keys(Sampler[Any]):
    """The keys of each batch; `drawn` has those that the last iterator took and that have not been popped."""

    def __init__(self, keys: Iterable[Sequence[Any]]) -> None:
        self._keys = keys
        self.drawn: deque[Sequence[Any]] = deque()

    def __len__(self) -> int:
        return len(self._keys)  # type: ignore[arg-type]  # where it has a length

    def __iter__(self) -> Iterator[Sequence[Any]]:
        drawn: deque[Sequence[Any]] = deque()
        self.drawn = drawn
        for keys in self._keys:
            drawn.append(keys)
            yield keys


def _paths(index: CocoIndex, keys: Sequence[Any]) -> str:
    """Paths of a batch's images."""
    return ", ".join(str(index.image_path(key[0] if isinstance(key, tuple) else key)) for key in keys)


class _Batches(Dataset[Any]):
    """Batches by their keys; in a worker, packed, or the reason why there is none."""

    def __init__(
        self,
        index: CocoIndex,
        samples: Dataset[Any],
        collate: Callable[[Sequence[Any]], Any],
        *,
        in_workers: bool,
    ) -> None:
        self.collate = collate
        self._index, self._samples, self._in_workers = index, samples, in_workers

    def __getitem__(self, keys: Sequence[Any]) -> Any:
        if not self._in_workers:
            return self.collate([self._samples[key] for key in keys])
        try:
            return Packed(self.collate([self._samples[key] for key in keys]))
        except UserError as error:
            return _Failure(str(error))
        except OSError as error:  # files were opened and read before; what fails is the hand-over
            return _Failure(f"data.workers: a worker cannot hand over a batch ({error}); {_way_out(error)}")
        except BaseException as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            return _Failure(f"data.workers: a worker failed on {_paths(self._index, keys)}: {text}")


class _Team:
    """The workers of one iteration, and the thread that kills them if a batch takes too long."""

    def __init__(self, loader: "DataLoader[Any]", timeout_s: float, awaited: Callable[[], str]) -> None:
        self._awaited = awaited
        self._timeout_s, self._is_late = timeout_s, False
        self._number, self._is_awaited = 0, False  # requests for a batch, and one is open; the thread reads both
        present, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
        self._workers: list[BaseProcess] = []
        # At exit it runs before multiprocessing sends SIGTERM to its processes, and waits for them.
        self._finalize = util.Finalize(self, _kill, (self._workers,), exitpriority=100)
        try:
            if sys.platform != "linux":
                util.get_temp_dir()  # workers use this one, so those that are killed leave none behind
            self._iterator: Any = iter(loader)
        except OSError as error:
            _kill(child for child in multiprocessing.active_children() if child not in present)
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if isinstance(unfinished := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                    unfinished._shutdown = True  # its __del__ would look for what was not made
            text = f"{loader.num_workers} workers cannot start ({error}); {_way_out(error)}"
            raise LoaderError(f"data.workers: {text}") from error
        self._workers += [child for child in multiprocessing.active_children() if child not in present]
        if threading.current_thread() is threading.main_thread() and handler is not None:  # None: one of a C library
            # torch's handler raises an error wherever this process is when a worker dies: in a checkpoint, too.
            signal.signal(signal.SIGCHLD, handler)
        self._is_over = threading.Event()
        self._close_writer()
        threading.Thread(target=self._watch, name="loader watch", daemon=True).start()

    def next(self) -> Any:
        """Return the next batch; None after the last one.

        Raises:
            LoaderError: if there is none, for whatever cause.
        """
        self._number += 1
        self._is_awaited = True
        try:
            batch = next(self._iterator, None)
            batch = batch.unpack() if isinstance(batch, Packed) else batch
            if isinstance(batch, Exception):
                raise batch
        except Exception as error:
            raise LoaderError(f"data.workers: {self._reason(error)}") from error
        self._is_awaited = False
        if isinstance(batch, _Failure):
            raise LoaderError(batch.reason)
        return batch

    def end(self) -> None:
        """Kill the workers, and let torch clean up."""
        self._is_over.set()
        self._finalize()
        for worker in self._workers:
            worker.join(1)
        self._iterator._workers_done_event = threading.Event()  # a dead worker may hold the lock of the shared one
        self._iterator._shutdown_workers()

    def _close_writer(self) -> None:
        """Close our end of the workers' queue: as long as a writer lives, the rest of a cut-off message is awaited.

        With a GPU torch reads in a thread, which in the end it wakes by a message, and then waits for. Here the end of
        the last worker wakes it.
        """
        results = self._iterator._worker_result_queue
        results._writer.close()
        get = results.get

        def get_or_wait(*args: Any, **options: Any) -> Any:
            try:
                return get(*args, **options)
            except (EOFError, OSError):  # no worker is left; who waits for a batch sees that, too
                self._is_over.wait(1)
                raise queue.Empty from None

        if hasattr(self._iterator, "_pin_memory_thread"):
            results.get, results.put = get_or_wait, lambda message: None

    def _watch(self) -> None:
        """Kill the workers if a batch takes too long, apart from time in which this process was stopped."""
        tick_s, waited_s, before = min(1.0, self._timeout_s / 10), 0.0, 0
        while not self._is_over.wait(tick_s):
            number = self._number
            waited_s = waited_s + tick_s if self._is_awaited and number == before else 0.0
            before = number
            if waited_s > self._timeout_s:
                self._is_late = True
                _kill(self._workers)
                return

    def _reason(self, error: Exception) -> str:
        if self._is_late:
            return (
                f"no batch came within {self._timeout_s:g} s: a worker hangs on {self._awaited()}, or their disk does "
                "not answer; if it is only slow, raise data.timeout_s (and train.timeout_s, to twice as much)"
            )
        ended = connection.wait([worker.sentinel for worker in self._workers], timeout=1)  # known soon
        for worker in self._workers:
            if worker.sentinel in ended:
                worker.join(1)  # the system closes its files before it has a status
            if worker.exitcode == -signal.SIGKILL:
                return (
                    f"worker {worker.pid} was killed, as the system does for lack of memory; give it more "
                    "(cluster.memory), or lower data.workers or the batch size"
                )
            if worker.exitcode is not None:
                return (
                    f"worker {worker.pid} ended with {_status(worker.exitcode)}; data.workers=0 works without workers"
                )
        reason = str(error) or "it closed the connection"
        return f"a batch cannot be taken over from a worker ({reason}); {_way_out(error)}"


def start_method(workers: int) -> str | None:
    """Start method of a loader's workers: fork on Linux, also in Python 3.14; None leaves the choice to Python.

    With forkserver, the default of 3.14, each worker imports torch anew, and SIGTERM to all processes of a job ends the
    server, which its workers take for the end of training.
    """
    default_method = multiprocessing.get_start_method(allow_none=True)
    return "fork" if workers > 0 and sys.platform == "linux" and default_method in (None, "forkserver") else None


def _begin_worker(worker: int) -> None:
    """Ignore SIGTERM and SIGINT, which batch systems and terminals send to all processes; end with the parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it died before
            os._exit(1)
        # The thread that hands over files listens at a name, which would be that of a file.
        connection.arbitrary_address = _name_without_file  # type: ignore[attr-defined]
    # The thread that hands over files reports no error of its own: who waits for the file sees it fail, and says so.
    sys.excepthook = lambda *_: None


def _name_without_file(family: str) -> str:
    return f"\0maskrcnn-{os.getpid()}-{secrets.token_hex(8)}"


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _unchanged(batch: T) -> T:
    return batch


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _way_out(error: Exception) -> str:
    """Ways out of an error in the exchange with workers."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # Python received no open file, since it may have no more; or a worker, which may have no more, gave up.
    is_of_files = "ancdata" in str(error) or isinstance(error, EOFError)
    number = errno.EMFILE if is_of_files else getattr(error, "errno", None)
    way_out = _WAYS_OUT.get(number or 0, "").format(open_files=open_files)
    return f"{way_out}{', or ' if way_out else ''}lower data.workers; data.workers=0 works without workers"
