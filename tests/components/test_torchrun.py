"""Training and evaluation in several processes: the same figures as in one, and ends that leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from components import download, prepare, train
from components.config import Config
from components.params import load_config, save_config
from model import distributed
from model.data.index import CocoIndex
from model.data.loader import GroupedBatchSampler, ShardedBatches
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMOOTH = Path(__file__).with_name("smooth.yaml")
STEPS = 6
EVER = "train.max_iters=100000"  # until a signal ends it
# For steps that need not be smooth, as they are compared with the same steps of as many processes.
FEW = ("model.rpn_batch_size=64", "model.rpn_post_nms_top_n_train=200", "model.roi_batch_size=64")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 16 + 5 generated images, and room for runs."""
    root = tmp_path_factory.mktemp("torchrun")
    config = small_config(root, "unused")
    download.run(config)
    prepare.run(config)
    return root


def small_config(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"train.output_dir={root}/{name}")
    small = ("model.box_pool_size=4", "model.mask_pool_size=7", "model.mask_head_convs=1")
    short = (f"train.max_iters={STEPS}", f"train.lr_steps=[{STEPS - 1}]")
    return load_config(SMOOTH, [*folders, *small, *short, *overrides])


def saved_params(root: Path, config: Config) -> str:
    """The parameter file of a run."""
    params = root / f"{config.train.output_dir.name}.yaml"
    save_config(config, params)
    return str(params)


def image_of(config: Config, step: int, rank: int) -> Path:
    """The first image in the last micro-batch of a step that one of two ranks gets."""
    train, index = config.train, CocoIndex.open(config.data.prepared_dir, "train")
    sampler = GroupedBatchSampler(index, config.data, batch_size=train.micro_batch_size, seed=train.seed)
    *_, batch = islice(ShardedBatches(sampler, rank, 2), step * train.accumulation_steps)
    return index.image_path(batch[0][0])


@contextmanager
def training(root: Path, config: Config) -> Iterator[subprocess.Popen]:
    """The command that trains in train.processes processes by torchrun; whatever is still there at the
    end is killed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "components.train", "--skip-test", "--params", saved_params(root, config)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for pid in [*children(process.pid), *workers(process), process.pid]:
            kill(pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    """The processes that a process has started, in order."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that the torchrun of a command started, in order of rank."""
    return [worker for torchrun in children(process.pid) for worker in children(torchrun)]


def kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def losses(config: Config) -> list[dict[str, float]]:
    """The journal's losses, step by step; what evaluation wrote there is left out."""
    path = config.train.output_dir / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line["metrics"] for line in lines if "loss/total" in line["metrics"]]
    return [{name: value for name, value in step.items() if name.startswith("loss/")} for step in steps]


def wait_for_steps(config: Config, number: int, ended: Callable[[], str | None]) -> None:
    """Wait until a run's journal has that many steps; `ended` gives the output of a process that has
    ended, else None.
    """
    while len(losses(config)) < number:
        assert (output := ended()) is None, output
        time.sleep(0.02)


def output_of_ended(process: subprocess.Popen) -> str | None:
    return None if process.poll() is None else process.communicate()[0]


@pytest.fixture(scope="module")
def alone(shapes: Path) -> Config:
    config = small_config(shapes, "alone")
    train.run(config, skip_test=True)
    return config


def assert_data_that_fail_cost_no_step(
    config: Config,
    command: tuple[str, ...],
    start_ranks: Callable[..., Any],
    without: Callable[[Path], AbstractContextManager[None]],
) -> None:
    """Training in two ranks, of which one has no data for its third step, ends after the second, and says so once."""
    path = image_of(config, step=3, rank=1)
    with without(path):
        ranks = start_ranks(2, *command)
        assert ranks.wait() == [2, 2], ranks.output()
    output = "".join(ranks.output(rank) for rank in range(2))
    assert output.count(f"error: {path}: is gone since `maskrcnn prepare`") == output.count(str(path)) == 1
    assert "ended by an error: saved step 2; run the same command" in ranks.output()
    assert "Traceback" not in output
    assert len(losses(config)) == 2


SYNCHRONISED = ("model.norm=sync_batch_norm", "model.head_norm=sync_batch_norm", "train.ema_decay=0.5")


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_two_processes_learn_as_one_with_their_joint_batch_also_if_one_had_no_data_for_a_step(
    accumulation_steps: int,
    shapes: Path,
    alone: Config,
    start_ranks: Callable[..., Any],
    without: Callable[[Path], AbstractContextManager[None]],
) -> None:
    """So do synchronised batch norms, in a step of one micro-batch: statistics of two are not those of both."""
    name = f"together_{accumulation_steps}"
    together = small_config(shapes, name, f"train.accumulation_steps={accumulation_steps}")
    if accumulation_steps == 1:
        together, alone = (small_config(shapes, f"{name}_{n}", *SYNCHRONISED) for n in (2, 1))
        train.run(alone, skip_test=True)
    command = ("train", "--skip-test", "--params", saved_params(shapes, together))
    if accumulation_steps == 2:
        assert_data_that_fail_cost_no_step(together, command, start_ranks, without)
    ranks = start_ranks(2, *command)
    assert ranks.wait() == [0, 0], ranks.output()
    expected, got = losses(alone), losses(together)
    assert len(got) == STEPS
    assert max(abs(a[name] - b[name]) for a, b in zip(expected, got, strict=True) for name in a) < 1e-5
    assert expected[-1]["loss/total"] < expected[0]["loss/total"] - 1e-2, "the weights moved a thousand times as far"
    one, other = (read_checkpoint(last_checkpoint(config.train.output_dir)) for config in (alone, together))
    for part in ("model", "average") if accumulation_steps == 1 else ("model",):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_lose_patience_at_the_same_step(shapes: Path, start_ranks: Callable[..., Any]) -> None:
    """At this rate no evaluation finds a better AP than the first."""
    words = (
        "train.base_lr=1e-9",
        "evaluate.every_epoch=true",
        "train.patience=1",
        "train.checkpoint_period=1000",
        EVER,
        *FEW,
    )
    config = small_config(shapes, "impatient", *words)
    ranks = start_ranks(2, "train", "--skip-test", "--params", saved_params(shapes, config))
    assert ranks.wait() == [0, 0], ranks.output()
    checkpoint = last_checkpoint(config.train.output_dir)
    assert checkpoint is not None
    assert read_checkpoint(checkpoint)["step"] == 2 * 16 // config.train.batch_size
    assert read_checkpoint(checkpoint)["is_complete"]


def test_evaluation_does_not_depend_on_the_number_of_processes(
    shapes: Path, alone: Config, start_ranks: Callable[..., Any]
) -> None:
    written = {}
    for processes in (1, 2, 3):
        # A process's results depend in their last bits on its threads.
        ranks = start_ranks(processes, "evaluate", "--params", saved_params(shapes, alone), threads=1)
        assert ranks.wait() == [0] * processes, ranks.output()
        folder = alone.train.output_dir
        names = ("evaluation.json", "inference/bbox.json", "inference/segm.json")
        written[processes] = [(folder / name).read_bytes() for name in names]
    assert json.loads(written[1][1]), "there are results to compare"
    assert written[2] == written[1]
    assert written[3] == written[1]


def test_sigterm_saves_and_training_goes_on_exactly(shapes: Path, start_ranks: Callable[..., Any]) -> None:
    config = small_config(shapes, "preempted", "data.workers=1", EVER, *FEW)
    ranks = start_ranks(1, "train", "--skip-test", "--params", saved_params(shapes, config))
    (process,) = ranks.processes
    wait_for_steps(config, 2, lambda: None if process.is_alive() else ranks.output())
    for pid in [*children(process.pid), process.pid]:  # as batch systems do it: to the loader's workers, too
        kill(pid, signal.SIGTERM)
    assert ranks.wait() == [143], ranks.output()
    assert "saved step" in ranks.output()
    saved = last_checkpoint(config.train.output_dir)
    assert saved is not None
    step = read_checkpoint(saved)["step"]
    assert step >= 2
    assert len(losses(config)) == step
    for name in ("preempted", "unbroken"):
        train.run(small_config(shapes, name, f"train.max_iters={step + 2}", *FEW), skip_test=True)
    assert losses(config) == losses(small_config(shapes, "unbroken")), "bit for bit"


def test_two_processes_save_once_at_sigterm_and_go_on_exactly_with_torchrun_which_names_one_that_is_killed(
    shapes: Path, start_ranks: Callable[..., Any]
) -> None:
    """What torchrun itself does at SIGTERM is tested with lighter processes, in test_launch.py."""
    config = small_config(shapes, "by_torchrun", "train.processes=2", "data.workers=1", EVER, *FEW)
    as_ranks = small_config(shapes, "by_torchrun", "data.workers=1", EVER, *FEW)  # which start no processes themselves
    ranks = start_ranks(2, "train", "--skip-test", "--params", saved_params(shapes, as_ranks))
    wait_for_steps(config, 2, lambda: None if ranks.processes[0].is_alive() else ranks.output())
    for pid in [pid for process in ranks.processes for pid in [*children(process.pid), process.pid]]:
        kill(pid, signal.SIGTERM)
    assert ranks.wait() == [143, 143], ranks.output()
    assert (ranks.output(0) + ranks.output(1)).count("saved step") == 1, "rank 0 alone prints"
    saved = last_checkpoint(config.train.output_dir)
    assert saved is not None
    step = read_checkpoint(saved)["step"]
    assert len(losses(config)) == step >= 2, "long before the checkpoint period"
    with training(shapes, config) as process:
        wait_for_steps(config, step + 1, lambda: output_of_ended(process))
        of_rank = workers(process)
        os.kill(of_rank[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=config.train.timeout_s)
        assert process.returncode == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in of_rank)
    assert output.count("continuing from") == 1
    assert "RuntimeWarning" not in output
    assert "Signal 9 (SIGKILL)" in output
    assert f"(pid: {of_rank[1]})" in output.replace(f"PID {of_rank[1]}", f"(pid: {of_rank[1]})")
    unbroken = small_config(shapes, "together_unbroken", f"train.max_iters={len(losses(config))}", *FEW)
    ranks = start_ranks(2, "train", "--skip-test", "--params", saved_params(shapes, unbroken))
    assert ranks.wait() == [0, 0], ranks.output()
    assert losses(config) == losses(unbroken), "bit for bit"


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_after_the_time_out(shapes: Path) -> None:
    config = small_config(shapes, "hanging", "train.processes=2", "train.timeout_s=5", EVER)
    with training(shapes, config) as process:
        wait_for_steps(config, 2, lambda: output_of_ended(process))
        stopped = workers(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)  # torchrun waits 30 s for the stopped one to end
        assert process.returncode == 1
        assert not Path(f"/proc/{stopped}").exists()
    assert "Timed out waiting 5000ms" in output


def test_a_batch_that_the_processes_cannot_share_is_refused(shapes: Path, start_ranks: Callable[..., Any]) -> None:
    config = small_config(shapes, "uneven", "train.batch_size=6", "train.accumulation_steps=2")
    ranks = start_ranks(2, "train", "--params", saved_params(shapes, config))
    assert ranks.wait() == [2, 2]
    must = "train.batch_size: 6 images in 2 micro-batches must be a multiple of the number of processes, got 2"
    assert must in ranks.output()
    assert not config.train.output_dir.exists()


def test_processes_that_share_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    with pytest.raises(Exception, match=r"train\.device: 64 processes need one GPU each, got cuda:0 for all"):
        distributed.pick_device("cuda:0")
    with pytest.raises(
        Exception, match=r"train\.device: 64 processes need one GPU each, got \d+; lower --nproc-per-node"
    ):
        distributed.pick_device("cuda")


def test_the_gpu_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.pick_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [1]
    with pytest.raises(
        Exception, match=r"train\.device: must be one of this machine's 2 GPUs, numbered from 0, got cuda:2"
    ):
        distributed.pick_device("cuda:2")


def test_float16_resumes_with_its_loss_scale(shapes: Path) -> None:
    options = (
        "train.dtype=float16",
        "train.batch_size=1",
        "train.lr_steps=[]",
        "train.checkpoint_period=1",
        "model.roi_batch_size=16",
    )
    whole = small_config(shapes, "half", *options, "train.max_iters=2")
    train.run(whole, skip_test=True)
    torch.manual_seed(5)
    parts = small_config(shapes, "halves", *options, "train.max_iters=2")
    train.run(small_config(shapes, "halves", *options, "train.max_iters=1"), skip_test=True)
    train.run(parts, skip_test=True)
    assert losses(parts) == losses(whole)
    ours, theirs = (read_checkpoint(c.train.output_dir / "checkpoints" / "step_0000002.pt") for c in (parts, whole))
    assert ours["scaler"] == theirs["scaler"]
    assert ours["scaler"]["_growth_tracker"] > 0 or ours["scaler"]["scale"] < 2.0**16
