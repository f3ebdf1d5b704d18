"""What signals do to a process: handled for a while, and left alone where they were ignored."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.launch import STATUS_OF_SIGTERM, handled, status_of

ROOT = Path(__file__).resolve().parents[2]
# Sends itself both signals within the block, then SIGHUP once more behind it.
CHILD = """
import os, signal
from components.launch import handled

seen = []
with handled((signal.SIGTERM, signal.SIGHUP), lambda number, _: seen.append(signal.Signals(number).name)):
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
print(*seen, flush=True)
os.kill(os.getpid(), signal.SIGHUP)
print("alive")
"""

# Runs a command as torchrun is run: one that saves at SIGTERM and then ends with 1.
PARENT = """
import sys
from components.launch import _run

command = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))"
sys.exit(_run([sys.executable, "-c", command + "; print('ready', flush=True); time.sleep(20)"]))
"""


def child(*, nohup: bool) -> tuple[int, list[str]]:
    """The status of such a process, and what it says."""
    disposition = signal.SIG_IGN if nohup else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, disposition),
        text=True,
        timeout=60,
    )
    assert not done.stderr
    return done.returncode, done.stdout.split()


def test_a_signal_is_handled_within_the_block_alone() -> None:
    assert child(nohup=False) == (-signal.SIGHUP, ["SIGHUP", "SIGTERM"])


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    assert child(nohup=True) == (0, ["SIGTERM", "alive"])


def test_another_thread_runs_without() -> None:
    handlers = []

    def work() -> None:
        with handled([signal.SIGUSR1], lambda *_: None):
            handlers.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def test_sigterm_is_passed_on_to_the_processes_and_decides_the_status() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()  # this one alone, as a batch system may
        assert process.wait(15) == STATUS_OF_SIGTERM


def test_a_signal_that_is_ignored_since_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with handled([signal.SIGUSR1], lambda *_: None):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_status_of_a_job_is_that_of_its_processes() -> None:
    for exit_codes, status in (
        ([2], 2), ([1, 2, -15], 2), ([1], 1), ([1, -15], 1), ([-9, -15], 1), ([-11], 1),
        ([143], 143), ([-15], 143), ([143, -15], 143), ([130, -15], 130), ([-2], 130), ([1, 143], 1), ([141, -15], 141),
    ):  # fmt: skip
        assert status_of(exit_codes) == status, exit_codes


SAVES = "signal.signal(15, lambda *_: (time.sleep(0.5), print('saved'), sys.exit(143)))"
# What a stage does in rank 1; rank 0 ends because of it.
ENDS = {
    "an error": (
        "print('error: an image is gone', file=sys.stderr, flush=True); ready.touch(); sys.exit(2)",
        "while not ready.exists(): time.sleep(0.01)\nsys.exit(2)",
    ),
    "a bug": (
        "signal.signal(15, signal.SIG_IGN); from torch.distributed.elastic.multiprocessing import errors; "
        "errors.record(bug)()",
        "sys.exit(1)",
    ),
    "a signal": (
        f"{SAVES}\n    while not ready.exists(): time.sleep(0.01)\n    os.kill(os.getppid(), 15); time.sleep(30)",
        f"{SAVES}; ready.touch(); time.sleep(30)",
    ),
}


@pytest.mark.parametrize(("kind", "status"), [("an error", 2), ("a bug", 1), ("a signal", 143)])
def test_torchrun_reports_only_what_no_process_has_reported(
    kind: str, status: int, tmp_path: Path, start_ranks: Callable[..., Any]
) -> None:
    script = tmp_path / "stage.py"
    of_rank_1, of_rank_0 = ENDS[kind]
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "ready = pathlib.Path(__file__).with_name('ready')\n"
        "def bug():\n    raise ValueError('deep in the work')\n"
        f"if os.environ['RANK'] == '1':\n    {of_rank_1}\n{of_rank_0}\n"
    )
    ranks = start_ranks(1, "launch", "--standalone", "--nproc-per-node=2", str(script))
    ended, said = ranks.wait(), ranks.output()
    assert ended == [status], said
    assert "torch/distributed/launcher" not in said
    assert "torch/distributed/elastic/multiprocessing/api.py" not in said
    if kind == "an error":
        assert said.count("\n") == said.count("error: an image is gone\n") == 1
    if kind == "a signal":
        assert said.count("saved") == 2, "each has time to save; lines of two processes may mix"
    if kind == "a bug":
        root_cause = said[said.index("Root Cause") :]
        assert "rank      : 1" in root_cause
        assert "ValueError: deep in the work" in root_cause
        assert "rank      : 0" not in said
