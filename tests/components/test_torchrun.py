"""Training and evaluation in several processes: the same figures as in one, and ends that leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from components import download, prepare, train
from components.config import Config
from components.params import load_config, save_config
from model import distributed
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMOOTH = Path(__file__).with_name("smooth.yaml")
STEPS = 20


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
    return load_config(SMOOTH, [*folders, *overrides])


@contextmanager
def torchrun(
    root: Path, config: Config, processes: int, stage: str = "train", *words: str
) -> Iterator[subprocess.Popen]:
    """A stage under torchrun; whatever is still there at the end is killed."""
    params = root / f"{config.train.output_dir.name}.yaml"
    save_config(config, params)
    options = ["--standalone", f"--nproc-per-node={processes}", "-m", f"components.{stage}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--params", str(params), *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in [*workers(process), process.pid]:
            kill(pid, signal.SIGKILL)
        process.communicate()


def completed(root: Path, config: Config, processes: int, stage: str = "train", *words: str) -> str:
    """What a stage that must succeed says."""
    with torchrun(root, config, processes, stage, *words) as process:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    return output


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, in order of rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def losses(config: Config) -> list[dict[str, float]]:
    """The journal's losses, step by step; what evaluation wrote there is left out."""
    path = config.train.output_dir / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line["metrics"] for line in lines if "loss/total" in line["metrics"]]
    return [{name: value for name, value in step.items() if name.startswith("loss/")} for step in steps]


def wait_for_steps(config: Config, number: int, process: subprocess.Popen) -> None:
    while len(losses(config)) < number:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(shapes: Path) -> Config:
    config = small_config(shapes, "alone")
    train.run(config, skip_test=True)
    return config


@pytest.fixture(scope="module")
def together(shapes: Path) -> Config:
    """The same by two processes."""
    config = small_config(shapes, "together")
    completed(shapes, config, 2, "train", "--skip-test")
    return config


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_two_processes_learn_as_one_with_their_joint_batch(
    accumulation_steps: int, shapes: Path, alone: Config, together: Config
) -> None:
    if accumulation_steps > 1:
        together = small_config(shapes, "accumulating", f"train.accumulation_steps={accumulation_steps}")
        completed(shapes, together, 2, "train", "--skip-test")
    expected, got = losses(alone), losses(together)
    assert len(got) == STEPS
    assert max(abs(a[name] - b[name]) for a, b in zip(expected, got, strict=True) for name in a) < 1e-5
    assert expected[-1]["loss/total"] < expected[0]["loss/total"] - 1e-2, "the weights moved a thousand times as far"


def test_evaluation_does_not_depend_on_the_number_of_processes(
    shapes: Path, alone: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # a process's results depend in their last bits on its threads
    written = {}
    for processes in (1, 2, 3):
        completed(shapes, alone, processes, "evaluate")
        folder = alone.train.output_dir
        names = ("evaluation.json", "inference/bbox.json", "inference/segm.json")
        written[processes] = [(folder / name).read_bytes() for name in names]
    assert json.loads(written[1][1]), "there are results to compare"
    assert written[2] == written[1]
    assert written[3] == written[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on_exactly(
    processes: int, shapes: Path, alone: Config, together: Config
) -> None:
    config = small_config(shapes, f"preempted_{processes}", f"train.processes={processes}", "data.workers=1")
    params = shapes / f"preempted_{processes}.yaml"
    save_config(config, params)
    command = [sys.executable, "-m", "components.train", "--skip-test", "--params", str(params)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    wait_for_steps(config, 3, process)
    os.killpg(process.pid, signal.SIGTERM)  # as batch systems do it: to the loader's workers, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "saved step" in output
    saved = last_checkpoint(config.train.output_dir)
    assert saved is not None
    assert 3 <= read_checkpoint(saved)["step"] < STEPS, "in the middle of an epoch, long before the checkpoint period"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "continuing from" in done.stdout, done.stderr
    assert losses(config) == losses(alone if processes == 1 else together), "bit for bit"


def test_a_killed_process_ends_the_others_and_is_named(shapes: Path) -> None:
    config = small_config(shapes, "killed", "train.max_iters=100000")
    with torchrun(shapes, config, 2, "train", "--skip-test") as process:
        wait_for_steps(config, 2, process)
        of_rank = workers(process)
        os.kill(of_rank[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=config.train.timeout_s)
        assert process.returncode == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in of_rank)
    assert "Signal 9 (SIGKILL)" in output
    assert f"(pid: {of_rank[1]})" in output.replace(f"PID {of_rank[1]}", f"(pid: {of_rank[1]})")


@pytest.mark.slow
def test_a_process_that_hangs_ends_all_after_the_time_out(shapes: Path) -> None:
    config = small_config(shapes, "hanging", "train.max_iters=100000", "train.timeout_s=5")
    with torchrun(shapes, config, 2, "train", "--skip-test") as process:
        wait_for_steps(config, 2, process)
        stopped = workers(process)[1]
        os.kill(stopped, signal.SIGSTOP)
        output, _ = process.communicate(timeout=120)  # torchrun waits 30 s for the stopped one to end
        assert process.returncode == 1
        assert not Path(f"/proc/{stopped}").exists()
    assert "Timed out waiting 5000ms" in output


def test_a_batch_that_the_processes_cannot_share_is_refused(shapes: Path) -> None:
    config = small_config(shapes, "uneven", "train.batch_size=3")
    with torchrun(shapes, config, 2, "train") as process:
        output, _ = process.communicate(timeout=120)
    assert (
        "train.batch_size: 3 images in 1 micro-batches must be a multiple of the number of processes, got 2" in output
    )
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
        "train.max_iters=4",
        "train.lr_steps=[3]",
        "train.checkpoint_period=2",
    )
    whole = small_config(shapes, "half", *options)
    train.run(whole, skip_test=True)
    torch.manual_seed(5)
    parts = small_config(shapes, "halves", *options)
    train.run(small_config(shapes, "halves", *options, "train.max_iters=2"), skip_test=True)
    train.run(parts, skip_test=True)
    assert losses(parts) == losses(whole)
    ours, theirs = (read_checkpoint(c.train.output_dir / "checkpoints" / "step_0000004.pt") for c in (parts, whole))
    assert ours["scaler"] == theirs["scaler"]
    assert ours["scaler"]["_growth_tracker"] > 0 or ours["scaler"]["scale"] < 2.0**16
