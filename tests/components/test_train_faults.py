"""Training and evaluation whose data fail or whose end is asked for: an error or a status at once, and no step lost."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from components import download, evaluate, prepare, train
from components.config import Config
from components.launch import handled
from components.params import load_config
from components.training import loop
from components.training.ending import Preempted
from model.data.index import CocoIndex
from model.data.loader import GroupedBatchSampler
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import last_checkpoint
from model.errors import UserError

TINY = Path(__file__).with_name("tiny.yaml")
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 + 4 generated images, and room for runs."""
    folder = tmp_path_factory.mktemp("faults")
    config = small_config(folder, "unused")
    download.run(config)
    prepare.run(config)
    return folder


def small_config(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"train.output_dir={root}/{name}")
    short = (f"train.max_iters={STEPS}", "train.lr_steps=[2]", "train.checkpoint_period=100", "data.workers=1")
    return load_config(TINY, [*folders, *short, *overrides])


def image_of_step(config: Config, step: int) -> Path:
    index = CocoIndex.open(config.data.prepared_dir, "train")
    sampler = GroupedBatchSampler(index, config.data, batch_size=config.train.batch_size, seed=config.train.seed)
    *_, batch = islice(sampler, step)
    return index.image_path(batch[0][0])


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Within the context workers that open the file wait for ever, as for a disk that does not answer."""

    def open_or_wait(source: object, *words: object) -> Image.Image:
        while source == path:
            time.sleep(1)
        return opened(source, *words)

    opened: Callable[..., Image.Image] = Image.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", open_or_wait)
        yield


@contextmanager
def owners_of(config: Config) -> Iterator[set[str]]:
    """The stages that the lock of a run has named."""
    owners: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            with suppress(FileNotFoundError):
                owners.update(filter(None, [(config.train.output_dir / ".lock").read_text().partition(" (")[0]]))

    threading.Thread(target=watch, daemon=True).start()
    yield owners
    ended.set()


def losses(config: Config) -> list[float]:
    path = config.train.output_dir / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["metrics"]["loss/total"] for line in lines]


def saved_step(config: Config) -> int:
    path = last_checkpoint(config.train.output_dir)
    return read_checkpoint(path)["step"] if path else 0


def test_data_that_fail_end_training_and_evaluation_with_their_name_and_without_losing_a_step(
    root: Path, without: Callable[[Path], AbstractContextManager[None]]
) -> None:
    config = small_config(root, "broken")
    path = image_of_step(config, 2)
    with without(path), pytest.raises(UserError) as caught:
        train.run(config, skip_test=True)
    assert str(caught.value).startswith(f"{path}: is gone since `maskrcnn prepare`")
    assert (saved_step(config), len(losses(config))) == (1, 1)
    with hanging(path), pytest.raises(UserError, match=rf"no batch came within 1 s.*{path}.*train\.timeout_s"):
        train.run(small_config(root, "broken", "train.timeout_s=2"), skip_test=True)
    assert (saved_step(config), len(losses(config))) == (1, 1)
    train.run(config, skip_test=True)
    whole = small_config(root, "whole", "data.workers=0")
    train.run(whole, skip_test=True)
    assert losses(config) == losses(whole), "bit for bit"
    path = CocoIndex.open(config.data.prepared_dir, "val").image_path(2)
    with without(path), pytest.raises(UserError, match=r"is gone since `maskrcnn prepare`"):
        evaluate.run(config)
    with hanging(path), owners_of(config) as owners, pytest.raises(UserError, match=r"no batch came within 1 s"):
        train.run(small_config(root, "broken", "train.timeout_s=2"))  # trained already; evaluates
    assert owners == {"maskrcnn train"}, "no other stage can start before evaluation"


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(signal.SIGTERM, 143, "ended by SIGTERM: saved step 1"), (signal.SIGINT, 130, "interrupted: saved step 1")],
)
def test_a_signal_is_obeyed_while_data_are_awaited(
    root: Path, number: signal.Signals, status: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(root, f"ended_by_{number.name}")

    def send() -> None:
        while not losses(config):
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    with hanging(image_of_step(config, 2)):
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(Preempted) as caught:
            train.run(config, skip_test=True)
    assert caught.value.code == status
    assert saved_step(config) == 1
    output = capfd.readouterr()
    assert f"{words}; run the same command to continue from there" in output.out
    assert ("Ctrl-C again ends training at once" in output.err) == (number == signal.SIGINT)


def test_the_second_ctrl_c_is_left_to_the_system_unless_torchrun_sends_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for environment, left in (({}, True), ({"WORLD_SIZE": "1"}, False)):
        training = loop.Training(small_config(root, "unused"), torch.device("cpu"), Console(quiet=True))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with handled([signal.SIGINT], lambda number, _, training=training: training.ending.ask(number)):
            os.kill(os.getpid(), signal.SIGINT)
            assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == left
