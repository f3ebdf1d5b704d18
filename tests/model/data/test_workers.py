"""Workers that fail: each failure is an error within seconds, and no worker is left."""

import gc
import multiprocessing
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from multiprocessing.popen_fork import Popen
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.loader import eval_loader, train_loader
from model.data.views import views_loader
from model.data.workers import LoaderError
from model.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where workers are forked")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CocoIndex:
    """Six images, each with an object; only the second is tall."""
    folder = tmp_path_factory.mktemp("workers")
    instance = Instance(1, (0, 0, 9, 9), [np.float32([(0, 0), (9, 0), (9, 9)])], is_crowd=False, was_clipped=False)
    images = []
    for i in range(6):
        size = (96, 64) if i == 1 else (64, 96)
        Image.new("RGB", size[::-1], (i, 90, 120)).save(folder / f"{i}.png")
        images.append(IndexedImage(ImageRecord(i, f"{i}.png", *size), False, [instance]))
    location = images_location(folder, Path(), folder)
    write_index(folder / "train", images, categories={1: "a"}, data_hash="", origin=location)
    return CocoIndex.open(folder, "train")


@pytest.fixture(scope="module")
def data() -> DataConfig:
    sizes = {"max_size_px": 96, "eval_min_size_px": 64, "eval_max_size_px": 96}
    return DataConfig(min_sizes_px=(64,), buckets=((64, 96), (96, 64)), workers=2, **sizes)


def loader_whose_workers(index: CocoIndex, data: DataConfig, act: Callable[[], object]) -> Any:
    """A training loader; its workers do something at each batch."""
    loader = train_loader(index, data, batch_size=2, seed=0)
    batches: Any = loader.torch_loader.dataset
    collate = batches.collate

    def act_and_collate(samples: Any) -> Any:
        act()
        return collate(samples)

    batches.collate = act_and_collate
    return loader


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_more_workers_than_cores_are_no_warning(index: CocoIndex, data: DataConfig, recwarn: pytest.WarningsRecorder):
    many = data.model_copy(update={"workers": len(os.sched_getaffinity(0)) + 1})
    with closing(iter(eval_loader(index, many, batch_size=6))) as batches:
        assert len(next(batches)) == 5
    assert not [warning for warning in recwarn if "DataLoader" in str(warning.message)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_that_is_gone_damaged_or_changed_is_named_by_every_loader(
    index: CocoIndex, data: DataConfig, number: int, without: Callable[[Path], AbstractContextManager[None]]
):
    data = data.model_copy(update={"workers": number})
    path, other = index.image_path(0), index.image_path(1)
    assert index.size(0) != index.size(1)
    loaders = [
        train_loader(index, data, batch_size=1, seed=0),
        eval_loader(index, data, batch_size=1),
        views_loader(index, data, [1.0], batch_size=1),
    ]
    for content, words in ((None, "is gone since `maskrcnn prepare`"), (b"", "cannot be read any more"), (other, "× ")):
        with without(path):
            if content is not None:
                path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            for loader in loaders if content is None else loaders[1:2]:
                with pytest.raises(UserError) as caught, closing(iter(loader)) as batches:
                    for _ in batches:
                        pass
                assert str(caught.value).startswith(f"{path}: "), "no traceback"
                assert words in str(caught.value)
                assert not workers()


class UnpicklableError(Exception):
    """It has arguments that its constructor does not take, and a lambda."""

    def __init__(self) -> None:
        super().__init__("deep in the work", lambda: None)


def fail() -> None:
    raise UnpicklableError


def use_up_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def die_amid_a_message(size: int = 1000) -> None:
    frame = sys._getframe()
    while "data_queue" not in frame.f_locals:  # torch's loop of a worker has it
        assert frame.f_back is not None
        frame = frame.f_back
    os.write(frame.f_locals["data_queue"]._writer.fileno(), struct.pack("!i", size) + b"the first bytes")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (fail, r"failed on .*\.png, .*\.png: UnpicklableError: .*deep in the work"),
        (use_up_open_files, r"Too many open files.*`ulimit -n`, now \d+\), or lower data\.workers"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed, as the system does for lack of memory"),
        (
            lambda: os.kill(os.getpid(), signal.SIGSTOP),
            r"no batch came within 1 s: a worker hangs on /.*\.png, /.*\.png, or.*raise data\.timeout_s",
        ),
        (die_amid_a_message, r"was killed, as the system does for lack of memory"),
    ],
    ids=["an error that cannot be pickled", "no open files", "killed", "hanging", "killed amid a message"],
)
def test_a_worker_that_fails_is_an_error_in_seconds(
    index: CocoIndex, data: DataConfig, act: Callable[[], object], words: str
):
    data = data.model_copy(update={"timeout_s": 1.0} if "within" in words else {})
    began = time.monotonic()
    with (
        pytest.raises(LoaderError, match=words),
        closing(iter(loader_whose_workers(index, data, act))) as batches,
    ):
        next(batches)
    assert time.monotonic() - began < 30
    assert not workers()


def test_a_worker_whose_files_close_before_it_has_a_status_is_named_as_killed(
    index: CocoIndex, data: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    poll = Popen.poll

    def poll_late(self: Popen, flag: int = os.WNOHANG) -> int | None:
        return self.returncode if flag == os.WNOHANG else poll(self, flag)  # as long as nobody waits for the end

    monkeypatch.setattr(Popen, "poll", poll_late)
    with (
        pytest.raises(LoaderError, match="was killed"),
        closing(iter(loader_whose_workers(index, data, die_amid_a_message))) as batches,
    ):
        next(batches)


@contextmanager
def open_files_left(spare: int) -> Iterator[None]:
    """This process can open so many files and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]  # no free number below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1 + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


def test_open_files_that_are_used_up_here_are_an_error(
    index: CocoIndex, data: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    loader = train_loader(index, data, batch_size=2, seed=0)
    with open_files_left(0), pytest.raises(LoaderError, match=r"2 workers cannot start .*Too many open files"):
        next(iter(loader))
    gc.collect()
    assert not unraisable, "an exception of torch's half-made iterator was printed"
    for spare in (0, 2):  # the connection to a worker takes two; then none is left for the batch
        with closing(iter(loader)) as batches:
            next(batches)
            ways_out = r"data\.workers: .*`ulimit -n`, now \d+\), or lower data\.workers"
            with open_files_left(spare), pytest.raises(LoaderError, match=ways_out):
                for _ in batches:
                    pass
    assert not workers()


def test_signals_to_all_processes_of_a_job_leave_workers_and_a_dead_workers_signal_disturbs_nothing(
    index: CocoIndex, data: DataConfig
):
    handler = signal.getsignal(signal.SIGCHLD)
    with closing(iter(train_loader(index, data, batch_size=2, seed=0))) as batches:
        for _ in range(data.workers):  # one of each, which then has begun
            next(batches)
        assert signal.getsignal(signal.SIGCHLD) == handler, "no error amid a checkpoint"
        for pid in workers():
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        for _ in range(5):
            next(batches)
    assert not workers()


def _fail_with_workers(index: CocoIndex, data: DataConfig, pids: Any, *, hangs: bool) -> None:
    batches = iter(train_loader(index, data, batch_size=2, seed=0))
    for _ in range(data.workers):  # one of each, which then has begun
        next(batches)
    own = workers()
    for pid in own if hangs else ():
        os.kill(pid, signal.SIGSTOP)
    pids.send(own)
    while hangs:
        time.sleep(1)
    raise SystemExit(3)  # `batches` is alive in the traceback


@pytest.mark.parametrize("hangs", [False, True], ids=["by an error", "by SIGKILL"])
def test_a_process_that_ends_without_closing_its_loader_leaves_no_worker_and_does_not_wait(
    index: CocoIndex, data: DataConfig, hangs: bool
):
    here, there = FORK.Pipe()
    process = FORK.Process(target=_fail_with_workers, args=(index, data, there), kwargs={"hangs": hangs})
    process.start()
    pids = here.recv()
    assert len(pids) == 2
    if hangs:
        process.kill()
    process.join(60)
    until = time.monotonic() + 20  # the system ends them after it has ended their parent
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "workers outlive their process"
    assert process.exitcode == (-signal.SIGKILL if hangs else 3)


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


class Accelerator:
    """Torch's description of a GPU, as far as its data loader asks for it."""

    type = "cuda"


@pytest.fixture
def pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's data loader reads in a thread, which pins memory, as with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", Accelerator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


def pinning_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_pin_memory_loop" in thread.name]


@pytest.mark.parametrize("dies", [False, True])
def test_the_end_does_not_wait_for_the_thread_that_pins_memory(
    index: CocoIndex, data: DataConfig, dies: bool, pinning: None, capfd: pytest.CaptureFixture[str]
) -> None:
    begun: list[None] = []  # of each worker

    def act() -> None:
        begun.append(None)
        if dies and len(begun) > 2:
            die_amid_a_message(100_000)  # of which torch's own message at the end would be a part

    began = time.monotonic()
    batches = iter(loader_whose_workers(index, data, act))
    next(batches)
    assert len(pinning_threads()) == 1
    if dies:
        with pytest.raises(LoaderError, match="was killed"):
            for _ in batches:
                pass
    batches.close()
    assert time.monotonic() - began < 30
    assert not pinning_threads()
    assert not workers()
    assert not capfd.readouterr().err


def _train_slowly(index: CocoIndex, data: DataConfig, pids: Any) -> None:
    batches = iter(loader_whose_workers(index, data, lambda: time.sleep(0.4)))
    next(batches)
    pids.send(workers())
    for _ in range(4):
        next(batches)
    os._exit(0)


def test_time_in_which_the_process_is_stopped_does_not_count(index: CocoIndex, data: DataConfig) -> None:
    here, there = FORK.Pipe()
    slow = data.model_copy(update={"timeout_s": 1.0, "workers": 1})
    process = FORK.Process(target=_train_slowly, args=(index, slow, there))
    process.start()
    assert process.pid is not None
    pids = [*here.recv(), process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    process.join(30)
    process.kill()
    assert process.exitcode == 0


def test_workers_have_no_files_that_an_end_could_leave_behind(index: CocoIndex, data: DataConfig) -> None:
    here, there = FORK.Pipe()
    process = FORK.Process(target=_name_listeners, args=(index, data, there))
    process.start()
    folder, names = here.recv()
    process.join(30)
    assert folder is None, "a folder of multiprocessing, which SIGTERM and SIGKILL would leave"
    assert len(names) == data.workers
    assert all(name.startswith("@maskrcnn-") for name in names)


def _name_listeners(index: CocoIndex, data: DataConfig, results: Any) -> None:
    multiprocessing.current_process()._config.pop("tempdir", None)  # that of this test session
    with closing(iter(train_loader(index, data, batch_size=2, seed=0))) as batches:
        for _ in range(4):
            next(batches)
        own = {f"maskrcnn-{pid}-" for pid in workers()}
        names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "@maskrcnn-" in line}
        listening = [name for name in names if any(name.startswith(f"@{prefix}") for prefix in own)]
        results.send((multiprocessing.current_process()._config.get("tempdir"), listening))
