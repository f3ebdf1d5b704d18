"""The GPU session (.ci/gpu): what it needs, and that its summary can be pasted into a document."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Run in a process of its own, where these cannot be imported.
COLLECT = """
import sys
import time
for name in ("mlflow", "kfp", "kfp_server_api", "dvc", "kubernetes", "kubeflow"):
    sys.modules[name] = None
import components.benchmark, components.download, components.prepare, components.train
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_the_tests_for_a_gpu_and_the_stages_need_neither_mlflow_nor_kfp():
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "tests/model/engine/test_steps_gpu.py" in done.stdout
    assert "tests/cuda_ops/test_multilevel_roi_align.py" in done.stdout
    assert "tests/components" not in done.stdout


def summary_of(out: Path) -> str:
    command = [sys.executable, str(REPOSITORY / ".ci" / "gpu" / "summary.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_session_is_told_in_tables(tmp_path: Path):
    """Of a session whose smoke found a fault, whose figures are of one network, and whose demo ended in the middle of a write."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "train_bf16").mkdir()
    (tmp_path / "steps.txt").write_text("smoke | failed, status 1 | 12 | 40\ntrain_bf16 | ok | 30 | 70\n")
    (tmp_path / "logs" / "smoke.txt").write_text("ok   box_iou 0.1 s\nFAIL batched_nms 0.2 s differs\n1 failures\n")
    (tmp_path / "logs" / "tests_model.txt").write_text("FAILED tests/a.py::b\n== 1 failed, 8 passed in 3 s ==\n")
    row = {"mode": "train", "model": "ours", "dtype": "bfloat16", "batch": 16, "height": 800}
    row |= {"width": 1344, "images_per_s": 250.0, "step_s": {"median": 0.064, "p90": 0.07, "p99": 0.07}}
    row |= {"peak_memory_mib": 9000.0, "ratio_to_torchvision": 0.25}
    theirs = row | {"model": "torchvision NHWC", "images_per_s": 62.5, "step_s": {"median": 0.256}}
    report = {"backbone": "resnet50", "hardware": {"cpu": "a cpu", "cores": 16, "gpu": "NVIDIA X", "gpus": 1}}
    report |= {"commit": "abcdef0" + 33 * "0", "steps": {"cases": [row, theirs]}}
    (tmp_path / "train_bf16" / "benchmark.json").write_text(json.dumps(report))
    gathered = report | {"steps": {"cases": [row | {"images_per_s": 300.0}]}}
    (tmp_path / "gather_bf16").mkdir()
    (tmp_path / "gather_bf16" / "benchmark.json").write_text(json.dumps(gathered))
    operator = {"case": "box_iou", "rival_name": "torchvision", "compiled": 0.001, "reference": 0.002, "rival": 0.004}
    (tmp_path / "operators.jsonl").write_text(json.dumps(operator) + "\n")
    (tmp_path / "evaluation_float32.json").write_text('{"bbox": {"AP"')
    told = summary_of(tmp_path)
    assert "| smoke | failed, status 1 | 12 | 40 |" in told
    assert "- FAIL batched_nms 0.2 s differs\n- 1 failures" in told
    assert "- tests_model: FAILED tests/a.py::b\n- tests_model: 1 failed, 8 passed in 3 s" in told
    assert "| 1 × NVIDIA X | 16 | bfloat16 | 250 | – | 0.064 s | 9000 MiB | 0.25 |" in told
    scatters, gathers = told.split("### Training, RoIAlign's gradient gathered")
    assert "| bfloat16 | 300 |" in gathers
    assert "| bfloat16 | 300 |" not in scatters
    assert "| train bfloat16 ×16 | channels-last | 62.5 | 256.00 ms |" in told
    assert "| box_iou | 1.000 ms | 2.000 ms | torchvision 4.000 ms | 4.0× |" in told
    assert "### Demo\n\nCannot be told: JSONDecodeError" in told
    assert "Sanitizers" not in told


def refused(script: str, *arguments: str, **environment: str) -> str:
    command = [str(REPOSITORY / ".ci" / "gpu" / script), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_what_the_session_does_not_know_ends_it_before_anything_runs(tmp_path: Path):
    out = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    assert refused("session", "--dyr", **out) == "error: the only option is --dry, got --dyr\n"
    assert refused("session", "--dry", ONLY="smoke nonsense", **out).endswith("phases_bf16 , got nonsense\n")
    assert not (tmp_path / "out").exists()


def test_a_kit_replaces_nothing_but_a_kit(tmp_path: Path):
    (tmp_path / "thesis").write_text("years of work")
    python = {"PYTHON": sys.executable}
    assert "must be new, empty or a kit" in refused("make_kit", str(tmp_path), **python)
    assert "takes one FOLDER, got --help" in refused("make_kit", "--help", **python)
    assert "must be an interpreter with pip" in refused("make_kit", PYTHON="/bin/false")
    assert "must be 3.11 to 3.14, got 2.7" in refused("make_kit", PYTHON_VERSION="2.7", **python)
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_session_that_is_told_to_end_does_so_at_once_and_says_where_it_was(tmp_path: Path):
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "ONLY": "library", "KIT": "none"}
    session = subprocess.Popen(
        [str(REPOSITORY / ".ci" / "gpu" / "session"), "--dry"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not (out / "logs" / "library.txt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        session.terminate()
        assert session.wait(120) == 143  # within a second, but for the summary
    finally:
        session.kill()
    assert (out / "steps.txt").read_text().splitlines()[-1].startswith("library | interrupted |")
