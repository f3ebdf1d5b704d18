"""Forty faults in a row over training and evaluation: nothing hangs, no checkpoint is lost, a command goes on."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from components import download, prepare, train
from components.config import Config
from components.params import load_config, save_config
from model.data.index import CocoIndex
from model.engine.pointers import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
FAULTS = 40
LIMIT_S = 60.0
IN_TRAINING = (
    *("killed", "SIGTERM", "SIGINT", "worker killed", "worker stopped", "image gone", "image cut off", "disk hangs"),
    *("no open files", "no open files for workers", "disk full", "disk read-only", "small /dev/shm"),
)
IN_EVALUATION = (
    *("killed", "SIGTERM", "worker killed", "image gone", "disk hangs", "no open files", "disk full", "disk read-only"),
)
# What a stage may end with: its work done, an error with a message, or the signal.
STATUSES = {0, 2, 130, 143, -signal.SIGKILL, -signal.SIGTERM}
Leased = Callable[[Path], AbstractContextManager[None]]


class Disk:
    """A small disk, for the runs, that can be full or read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=400m", "tmpfs")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.folder)], check=True, capture_output=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        ballast = self.folder / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 14))
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """A disk with open files does not become read-only: its folders are closed to all instead."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=False, capture_output=True)
        try:
            yield
        finally:
            self._mount("-o", "remount,rw")

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("needs Linux and its superuser, to mount a small disk")
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


@contextmanager
def replaced(path: Path, kind: str) -> Iterator[None]:
    aside = path.with_name(f"{path.name}.aside")
    content = path.read_bytes()
    path.rename(aside)
    if kind == "image cut off":
        path.write_bytes(content[: len(content) // 3])
    try:
        yield
    finally:
        aside.replace(path)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    with suppress(OSError):
        return [int(child) for child in path.read_text().split()]
    return []


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def starve(pid: int) -> None:
    """Leave a process no further open file."""
    with suppress(ProcessLookupError, FileNotFoundError):
        used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        free = next(number for number in range(len(used) + 1) if number not in used)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def losses(config: Config) -> list[dict[str, float]]:
    path = config.train.output_dir / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    steps = [json.loads(line) for line in lines]
    return [
        {"step": line["step"], "loss": line["metrics"]["loss/total"]}
        for line in steps
        if "loss/total" in line["metrics"]
    ]


def strike(
    kind: str, pid: int, config: Config, split: str, disk: Disk, dice: random.Random, leased: Leased
) -> ExitStack:
    """Let one fault happen; what was taken away comes back when the stack is closed."""
    stack = ExitStack()
    signals = {"killed": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
    if kind in signals:
        send(pid, signals[kind])
    elif kind.startswith("worker "):
        for worker in children(pid)[:1]:
            send(worker, signal.SIGSTOP if kind == "worker stopped" else signal.SIGKILL)
    elif kind.startswith("image") or kind == "disk hangs":
        index = CocoIndex.open(config.data.prepared_dir, split)
        path = index.image_path(dice.randrange(len(index)))
        stack.enter_context(leased(path) if kind == "disk hangs" else replaced(path, kind))
    elif kind == "no open files":
        starve(pid)
    elif kind == "no open files for workers":
        for worker in children(pid):
            starve(worker)
    else:
        stack.enter_context(disk.full() if kind == "disk full" else disk.read_only())
    return stack


def train_with_small_shm(params: Path) -> tuple[int, str]:
    """Train in a mount namespace of its own, in which /dev/shm has 64 KiB; SIGTERM after some steps."""
    training = f"{sys.executable} -m components.train --skip-test --params {params}"
    shell = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec timeout --signal TERM 30 {training}"
    words = ["unshare", "-m", "sh", "-c", shell]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=30 + LIMIT_S, check=False)
    return 143 if done.returncode == 124 else done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_forty_faults_in_a_row_hang_nothing_and_lose_no_checkpoint(
    tmp_path: Path, disk: Disk, leased: Leased, start_ranks: Callable[..., Any]
) -> None:
    folders = (f"data.raw_dir={tmp_path}/raw", f"data.prepared_dir={tmp_path}/prepared")
    words = (
        "train.checkpoint_period=3",
        "train.lr_steps=[]",
        "data.workers=2",
        "data.timeout_s=3",
        "train.keep_last=1",
    )
    config = load_config(TINY, [*folders, *words, f"train.output_dir={disk.folder}/run", "train.max_iters=100000"])
    download.run(config)
    prepare.run(config)
    params = tmp_path / "params.yaml"
    save_config(config, params)
    dice, longest_s = random.Random(0), 0.0
    kinds = [("train", kind) for kind in IN_TRAINING] * 2 + [("evaluate", kind) for kind in IN_EVALUATION] * 2
    dice.shuffle(kinds)
    kinds = [("train", "killed"), *kinds][:FAULTS]
    for number, (stage, kind) in enumerate(kinds):
        before, steps = last_checkpoint(config.train.output_dir), len(losses(config))
        if before is None:
            stage = "train"
        if kind == "small /dev/shm":
            status, output = train_with_small_shm(params)
            took_s = 0.0
        else:
            ranks = start_ranks(1, stage, *(["--skip-test"] if stage == "train" else []), "--params", str(params))
            (process,) = ranks.processes
            began = time.monotonic()
            while stage == "train" and len(losses(config)) <= steps and process.is_alive():
                assert time.monotonic() - began < LIMIT_S, ranks.output()
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 1.5))
            began = time.monotonic()
            with strike(kind, process.pid, config, "train" if stage == "train" else "val", disk, dice, leased):
                process.join(LIMIT_S)
                took_s = time.monotonic() - began
                workers = children(process.pid)
            if stage == "train" and process.is_alive():  # the fault came too late, or too early, to be noticed
                send(process.pid, signal.SIGTERM)
                process.join(LIMIT_S)
            assert not process.is_alive(), f"{stage}, {kind}: hangs\n{ranks.output()}"
            assert not any(Path(f"/proc/{pid}/mem").exists() for pid in workers)
            status, output = process.exitcode, ranks.output()
        now = last_checkpoint(config.train.output_dir)
        said = [line for line in output.splitlines() if line.startswith(("error", "ended", "interrupted"))]
        print(f"{number + 1}. {stage}, {kind}: status {status} after {took_s:.1f} s, {now and now.stem}; {said[-1:]}")
        longest_s = max(longest_s, took_s)
        assert status in STATUSES, f"{stage}, {kind}: status {status}\n{output}"
        assert "Traceback" not in output, f"{stage}, {kind}\n{output}"
        assert before is None or (now is not None and before.name <= now.name), "a checkpoint was lost"
    ranks = start_ranks(1, "train", "--params", str(params), f"train.max_iters={len(losses(config)) + 2}")
    assert ranks.wait() == [0], ranks.output()
    got = losses(config)
    whole = load_config(params, [f"train.output_dir={tmp_path}/whole", f"train.max_iters={len(got)}"])
    train.run(whole, skip_test=True)
    assert got == losses(whole), "bit for bit"
    print(f"{len(got)} steps; the longest end took {longest_s:.1f} s")
