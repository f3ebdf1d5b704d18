"""One seed of a study in training: `components.train` in a separate process, which trains and then evaluates.

Its output goes to `seed_<seed>.log` beside its folder. The file is locked while the process lives, even if it outlives
its study, so that no two processes train into one folder.
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
from components.studies.result import StabilityError
from model.files import make_folder

_SHOWN_LINES = 8  # lines of the log in the error of a failed seed


class SeedProcess:
    """Process that trains one seed."""

    def __init__(self, config: Config, *, slot: int, parallel: int) -> None:
        """Start, or continue from the last checkpoint.

        Args:
            config: configuration of this seed's run.
            slot: 0 to parallel − 1: index of its share of cores and GPUs.

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
            # Ctrl-C does not reach a new session, only the study, which lets seeds save a checkpoint first.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(config, slot, parallel),
                start_new_session=True,
            )
        self._began = time.monotonic()
        self._is_ending = False

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self._began) / 60

    def status(self) -> int | None:
        """Exit status; negative: the signal that killed it; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask the process, once, to save a checkpoint and end."""
        if not self._is_ending:
            self._process.terminate()
        self._is_ending = True

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def failure(self) -> str:
        """Reason of a failure, with the end of the log; empty if there was none."""
        status = self.status()
        if not status:
            return ""
        reason = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        return "\n".join(
            [f"seed {self.config.train.seed}: {reason}; {self.log} ends with", *(f"    {line}" for line in lines)]
        )


def log_path(config: Config) -> Path:
    """Path of a seed's log: beside its folder, which training may move aside."""
    return config.train.output_dir.with_name(f"{config.train.output_dir.name}.log")


def _lock(descriptor: int, path: Path) -> None:
    """Lock an open file while it is open here or in a child process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StabilityError(
            f"{path}: another process trains this seed and must end first; it may have outlived its study; find it "
            f"with `fuser {path}`"
        ) from None


def _environment(config: Config, slot: int, parallel: int) -> dict[str, str]:
    """Environment of the process, with a share of the cores and GPUs if several seeds train at a time."""
    environment = dict(os.environ)
    environment.pop("MLFLOW_RUN_ID", None)  # the study's run; each seed has its own
    if parallel == 1:
        return environment
    train = config.train
    if train.processes == 1:  # torchrun sets it for several
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(hardware()["cores"]) // parallel)))
    gpus = _gpu_names()
    if gpus and train.device in ("auto", "cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::parallel] or [gpus[slot % len(gpus)]])
    return environment


def _gpu_names() -> list[str]:
    """GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
