"""Measurement in fresh processes, in which nothing has used memory or threads before."""

import os
import subprocess
import sys
from pathlib import Path

from components.benchmarks.case import Case, Measurement
from model.errors import UserError


class BenchmarkError(UserError):
    """A case could not be measured."""


def in_fresh_process(case: Case, *, threads: int | None = None) -> Measurement:
    """Measure a case in fresh processes, with torchrun if there are several.

    Args:
        threads: CPU threads per process; None leaves it to torch.

    Raises:
        BenchmarkError: if a process fails; the message has its last error line.
    """
    launcher = ["-m", "components.launch", "--standalone", f"--nproc-per-node={case.processes}"]
    command = [
        sys.executable,
        *(launcher if case.processes > 1 else []),
        "-m",
        "components.benchmarks.run_case",
        case.model_dump_json(),
    ]
    root = str(
        Path(__file__).resolve().parents[2]
    )  # the caller may be in another folder, without the package installed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.strip().splitlines() if "Error" in line]
        last_lines = (errors or done.stderr.strip().splitlines())[-1:] or [
            f"exit status {done.returncode}, without a message"
        ]
        raise BenchmarkError(
            f"benchmark of {case.mode}, {case.dtype}, batch {case.batch}, {case.height} × {case.width} failed: "
            f"{last_lines[0].strip()}; "
            "try a smaller benchmark.batch_sizes or benchmark.height_px and width_px"
        )
    return Measurement.model_validate_json(done.stdout.splitlines()[-1])
