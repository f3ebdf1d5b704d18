"""One seed of a study at work: `components.train` in a process of its own, which trains and then evaluates.

What it says goes to `seed_<seed>.log` beside its folder. The file is locked as long as the process lives, even one that outlived its
study, so that no two processes train into one folder.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from components.config import Config
from components.params import save_config
from components.runs.environment import hardware
from components.studies.summary import StabilityError
from model.files import make_folder

_TOLD_LINES = 8  # of the log, when a seed has failed


class SeedProcess:
    """Training of one seed, under way."""

    def __init__(self, config: Config, *, slot: int, parallel: int) -> None:
        """Begin, or continue from the last checkpoint.

        Args:
            config: of the seed's own run.
            slot: 0 to parallel − 1: which share of cores and GPUs it takes.

        Raises:
            StabilityError: if another process trains this seed.
        """
        self.config = config
        self.log = log_path(config)
        make_folder(self.log.parent)
        params = self.log.with_suffix(".yaml")
        with self.log.open("ab") as log:
            _lock(log.fileno(), self.log)
            save_config(config, params)
            command = [sys.executable, "-m", "components.train", "--params", str(params)]
            # A session of its own: Ctrl-C reaches the study alone, which lets seeds save a checkpoint first.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(config, slot, parallel),
                start_new_session=True,
            )
        self._began = time.monotonic()
        self._is_told = False

    @property
    def minutes(self) -> float:
        """Since it began."""
        return (time.monotonic() - self._began) / 60

    def status(self) -> int | None:
        """What it ended with; negative: the signal that killed it; None while it is at work."""
        return self._process.poll()

    def end(self) -> None:
        """Tell it, once, to save a checkpoint and end."""
        if not self._is_told:
            self._process.terminate()
        self._is_told = True

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait()

    def trouble(self) -> str:
        """Why it failed, as far as its log tells; empty where it did not."""
        status = self.status()
        if not status:
            return ""
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TOLD_LINES:]
        return "\n".join(
            [f"seed {self.config.train.seed}: {why}; {self.log} ends with", *(f"    {line}" for line in lines)]
        )


def log_path(config: Config) -> Path:
    """What a seed's process says goes there: beside its folder, which training may yet move aside."""
    return config.train.output_dir.with_name(f"{config.train.output_dir.name}.log")


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file for as long as it is open here or in a child."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StabilityError(
            f"{path}: another process trains this seed, and must end first; it may have outlived its study. `fuser {path}` tells which it is"
        ) from None


def _environment(config: Config, slot: int, parallel: int) -> dict[str, str]:
    """This process's environment, with a share of the cores and GPUs where several seeds train at a time."""
    environment = dict(os.environ)
    environment.pop("MLFLOW_RUN_ID", None)  # it names the study's run; each seed has its own
    if parallel == 1:
        return environment
    train = config.train
    if train.processes == 1:  # torchrun sees to many
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(hardware()["cores"]) // parallel)))
    gpus = _visible_gpus()
    if gpus and train.device in ("auto", "cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::parallel] or [gpus[slot % len(gpus)]])
    return environment


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
