"""What signals do to a process: handled for a while, and left alone where they were ignored."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from components.launch import STATUS_OF_SIGTERM, handled

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
