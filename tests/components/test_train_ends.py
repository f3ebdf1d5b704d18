"""Ends of training at an evaluation or the last step: no step, score or signal is lost; the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch

from components import download, prepare, train
from components.config import Config
from components.evaluation import checkpoint as final_evaluation
from components.launch import handled
from components.params import load_config, save_config
from components.training import loop, tracked
from components.training.ending import Preempted
from model.data.index import CocoIndex
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import find_checkpoint, last_checkpoint
from model.errors import UserError

TINY = Path(__file__).with_name("tiny.yaml")
EPOCH, STEPS = 3, 4


class KilledError(BaseException):
    """What a kill looks like from within: nothing after it happens."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 + 4 generated images, and room for runs."""
    folder = tmp_path_factory.mktemp("ends")
    config = small_config(folder, "unused")
    download.run(config)
    prepare.run(config)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    """A run that nothing has interrupted."""
    config = small_config(root, "whole")
    train.run(config, skip_test=True)
    return config


@pytest.fixture(autouse=True)
def _no_signal_is_left_to_others() -> Iterator[None]:
    """A signal that training does not handle fails the test, instead of ending all tests."""

    def fail(number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"{signal.Signals(number).name} ends the process silently")

    with handled([signal.SIGTERM, signal.SIGINT], fail):
        yield


def small_config(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"train.output_dir={root}/{name}")
    short = (f"train.max_iters={STEPS}", "train.batch_size=4", "train.lr_steps=[]", "train.checkpoint_period=100")
    scored = ("evaluate.every_epoch=true", "evaluate.batch_size=1", "model.score_threshold=0.001")
    return load_config(TINY, [*folders, *short, *scored, *overrides])


def begun(root: Path, name: str, *overrides: str) -> Config:
    """A run with its first step; before that, images of val are read."""
    train.run(small_config(root, name, *overrides, "train.max_iters=1"), skip_test=True)
    return small_config(root, name, *overrides)


def journal(config: Config) -> list[tuple[int, dict[str, float]]]:
    """Losses and scores of epochs, line by line."""
    path = config.train.output_dir / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [
        (line["step"], {name: v for name, v in line["metrics"].items() if name.startswith(("loss/", "epoch/"))})
        for line in lines
    ]
    return [(step, metrics) for step, metrics in kept if metrics]


def saved(config: Config) -> dict[str, Any]:
    path = last_checkpoint(config.train.output_dir)
    return read_checkpoint(path) if path else {"step": 0}


def assert_same(config: Config, whole: Config) -> None:
    """The run has what one has that nothing has interrupted, bit for bit."""
    assert [step for step, _ in journal(whole)] == [1, 2, 3, EPOCH, STEPS]
    assert journal(config) == journal(whole)
    ours, theirs = saved(config), saved(whole)
    assert not ours["awaits_evaluation"]
    assert ours["is_complete"]
    for name in ("step", "best_ap", "evaluations_since_best"):
        assert ours[name] == theirs[name]
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    best = find_checkpoint(config.train.output_dir, "best_checkpoint")
    assert best is not None
    assert best.name == f"step_000000{EPOCH}.pt"


def wait_until(condition: Callable[[], bool], ranks: Any) -> None:
    ends_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_at, ranks.output()
        time.sleep(0.02)


def evaluated_path(config: Config, number: int) -> Path:
    """An image of val; with a batch size of 1, of two ranks the first reads those of even numbers."""
    return CocoIndex.open(config.data.prepared_dir, config.evaluate.split).image_path(number)


def test_a_kill_while_an_epoch_is_evaluated_costs_no_step_and_the_evaluation_is_made_up_for(
    root: Path, whole: Config, leased: Callable[[Path], AbstractContextManager[None]], start_ranks: Callable[..., Any]
) -> None:
    config = begun(root, "killed", "data.workers=1")
    params = root / "killed.yaml"
    save_config(config, params)
    with leased(evaluated_path(config, 2)):
        ranks = start_ranks(1, "train", "--skip-test", "--params", str(params))
        wait_until(lambda: saved(config)["step"] == EPOCH, ranks)
        time.sleep(0.5)
        ranks.processes[0].kill()
    ranks.wait()
    assert saved(config)["awaits_evaluation"]
    train.run(config, skip_test=True)
    assert_same(config, whole)


def test_a_kill_before_the_scores_of_an_epoch_are_saved_does_not_log_them_twice(
    root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, times = small_config(root, "killed_late"), list[int]()

    def saved_once(run_dir: Path, step: int, state: dict[str, Any], **options: int) -> Path:
        times.append(step)
        if len(times) > 1:
            raise KilledError
        return save(run_dir, step, state, **options)

    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", saved_once)
    with pytest.raises(KilledError):
        train.run(config, skip_test=True)
    monkeypatch.undo()
    assert times == [EPOCH, EPOCH]
    assert [step for step, _ in journal(config)] == [1, 2, 3, EPOCH], "the scores are logged"
    train.run(config, skip_test=True)
    assert_same(config, whole)


def test_an_evaluation_that_fails_at_the_end_of_an_epoch_is_made_up_for(
    root: Path,
    whole: Config,
    without: Callable[[Path], AbstractContextManager[None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = begun(root, "not_evaluated")
    with without(evaluated_path(config, 2)), pytest.raises(UserError, match="is gone since"):
        train.run(config, skip_test=True)
    assert f"ended by an error: saved step {EPOCH}; run the same command" in capsys.readouterr().out
    train.run(config, skip_test=True)
    assert_same(config, whole)


# Where a signal comes: the function of a module that is called then.
PLACES: dict[str, tuple[ModuleType, str, int]] = {
    "the last step is being saved": (loop, "save_checkpoint", STEPS),
    "training has ended": (tracked, "require_checkpoint", STEPS),
    "the result is evaluated": (final_evaluation, "score", STEPS),
    "an epoch is evaluated": (loop, "evaluate_model", EPOCH),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGINT, "interrupted")], ids=["TERM", "INT"]
)
def test_a_signal_is_obeyed_before_the_next_evaluation(
    place: str,
    number: signal.Signals,
    words: str,
    root: Path,
    whole: Config,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    module, name, step = PLACES[place]
    config = small_config(root, f"{name}_{number.name}")
    returned = []

    def signalled(*arguments: Any, **options: Any) -> Any:
        if name != "save_checkpoint" or arguments[1] == STEPS:
            os.kill(os.getpid(), number)
        result = function(*arguments, **options)
        returned.append(name)
        return result

    function = getattr(module, name)
    monkeypatch.setattr(module, name, signalled)
    with pytest.raises(Preempted) as caught:
        train.run(config)
    monkeypatch.undo()
    assert caught.value.code == 128 + number
    assert f"{words}: saved step {step}; run the same command to continue from there" in capfd.readouterr().out
    assert bool(returned) == (name == "save_checkpoint"), "what is saved is saved whole, all else ends at once"
    assert saved(config)["step"] == step
    assert not (config.train.output_dir / "evaluation.json").exists()
    train.run(config)
    assert_same(config, whole)
    assert (config.train.output_dir / "evaluation.json").exists()


def test_training_whose_output_nobody_reads_saves_its_last_step(root: Path) -> None:
    """As in `maskrcnn train | head`, or where Ctrl-C has ended `tee`."""
    config = small_config(root, "unread", "evaluate.every_epoch=false", "train.log_period=1", "train.max_iters=500")
    save_config(config, root / "unread.yaml")
    command = [sys.executable, "-m", "components.train", "--params", str(root / "unread.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout as output:
        while "iter: 1 " not in (line := output.readline()):
            assert line, process.stderr.read()
    with process.stderr as errors:
        assert (errors.read(), process.wait()) == ("", 141)
    assert 1 < saved(config)["step"] < 500


def test_two_processes_end_together_while_they_evaluate_also_if_one_of_them_alone_was_asked(
    root: Path, leased: Callable[[Path], AbstractContextManager[None]], start_ranks: Callable[..., Any]
) -> None:
    config = begun(root, "in_two", "data.workers=1")
    params = root / "in_two.yaml"
    save_config(config, params)

    def ended(evaluates: Callable[[Any], bool], asked: list[int]) -> str:
        """Start training; once it evaluates, while rank 1 waits for an image, ask ranks to end; return the output."""
        with leased(evaluated_path(config, 1)):
            ranks = start_ranks(2, "train", "--params", str(params))
            wait_until(lambda: evaluates(ranks), ranks)
            time.sleep(1)
            began_s = time.monotonic()
            for rank in asked:
                os.kill(ranks.processes[rank].pid, signal.SIGTERM)
            wait_until(lambda: not any(process.is_alive() for process in ranks.processes), ranks)
            assert time.monotonic() - began_s < 30, "the image comes after 45 s"
        assert ranks.wait() == [143, 143], ranks.output()
        assert "Traceback" not in ranks.output(0) + ranks.output(1)
        return ranks.output(0) + ranks.output(1)

    text = ended(lambda _: saved(config)["step"] == EPOCH, [1])
    assert text.count(f"ended by SIGTERM: saved step {EPOCH}; run the same command") == 1
    assert saved(config)["awaits_evaluation"]
    ranks = start_ranks(2, "train", "--skip-test", "--params", str(params))
    assert ranks.wait() == [0, 0], ranks.output()
    assert [step for step, _ in journal(config)] == [1, 2, 3, EPOCH, STEPS]
    text = ended(lambda ranks: "trained to step" in ranks.output(), [0, 1])
    assert text.count(f"ended by SIGTERM: saved step {STEPS}; run the same command") == 1
    assert not (config.train.output_dir / "evaluation.json").exists()
    ranks = start_ranks(2, "train", "--params", str(params))
    assert ranks.wait() == [0, 0], ranks.output()
    assert (config.train.output_dir / "evaluation.json").exists()
