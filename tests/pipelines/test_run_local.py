"""Whole pipelines through kfp's local runner: what the stages give one by one, in one MLflow run, and a run that is
marked when it fails.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "tests" / "components" / "tiny.yaml"
OVERRIDES = [
    "data.raw_dir=data/raw", "data.prepared_dir=data/prepared", "train.output_dir=runs/tiny", "train.max_iters=6",
    "train.processes=2", "train.device=cpu", "tracking.enabled=true", "stability.output_dir=runs/study",
    "benchmark.modes=[inference]",
    "benchmark.batch_sizes=[1]", "benchmark.warmup=0", "benchmark.steps=1", "benchmark.torchvision=false",
    "predict.images=2",
]  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kfp")]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "KF_"))}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words, "--params", str(TINY), *OVERRIDES]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(command(*words), cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def mlflow_runs(folder: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def artifacts(folder: Path, step: str) -> Path:
    return min((folder / "runs" / "pipeline").glob(f"*/{step}"))  # of the first run


def metadata(folder: Path, step: str, artifact: str) -> Any:
    """What the step said of its artifact."""
    return read(artifacts(folder, step) / "executor_output.json")["artifacts"][artifact]["artifacts"][0]["metadata"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the whole training pipeline has run."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = run(folder, "pipelines.cli", "pipeline", "run-local")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_pipeline_gives_the_ap_of_the_stages_to_the_last_bit(pipeline: Path, tmp_path: Path):
    for stage in (["download"], ["prepare"], ["train", "--skip-test"], ["evaluate"]):
        done = run(tmp_path, f"components.{stage[0]}", *stage[1:])
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = (read(folder / "runs" / "tiny" / "evaluation.json") for folder in (pipeline, tmp_path))
    assert one == other
    assert one["bbox"]["AP"] is not None
    losses = [(folder / "runs" / "tiny" / "metrics.csv").read_text().splitlines() for folder in (pipeline, tmp_path)]
    names = [i for i, name in enumerate(losses[0][0].split(",")) if name == "step" or name.startswith("loss/")]
    assert len(names) > 5
    assert [[line.split(",")[i] for i in names] for line in losses[0]] == [
        [line.split(",")[i] for i in names] for line in losses[1]
    ]


def test_all_of_it_is_one_finished_mlflow_run(pipeline: Path):
    (found,) = mlflow_runs(pipeline)
    assert found.info.status == "FINISHED"
    evaluation = read(pipeline / "runs" / "tiny" / "evaluation.json")
    assert found.data.metrics["ap/bbox"] == evaluation["bbox"]["AP"]
    assert any(name.startswith("throughput/") for name in found.data.metrics)  # of the benchmark


def test_artifacts_say_where_everything_is_and_came_from(pipeline: Path):
    (found,) = mlflow_runs(pipeline)
    evaluation = read(pipeline / "runs" / "tiny" / "evaluation.json")
    data, model, metrics = (
        metadata(pipeline, "prepare", "dataset"),
        metadata(pipeline, "train-here", "model"),
        metadata(pipeline, "evaluate", "metrics"),
    )
    assert data["val_data_hash"] == metrics["data_hash"] == evaluation["data_hash"]
    assert model["train_data_hash"] == data["train_data_hash"]
    assert model["mlflow_run_id"] == metrics["mlflow_run_id"] == found.info.run_id
    assert (pipeline / model["run_dir"] / "checkpoints" / model["checkpoint"]).is_file()
    assert metrics["ap/segm"] == evaluation["segm"]["AP"]
    assert metadata(pipeline, "register", "registered")["version"] == "1"
    for step in ("evaluate", "predict"):
        page = (artifacts(pipeline, step) / "page").read_text()
        assert "data:image/" in page


def test_the_same_again_trains_no_step_more_and_stays_one_run(pipeline: Path):
    before = (pipeline / "runs" / "tiny" / "last_checkpoint").stat().st_mtime_ns
    done = run(pipeline, "pipelines.cli", "pipeline", "run-local", "train.max_iters=6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (pipeline / "runs" / "tiny" / "last_checkpoint").stat().st_mtime_ns == before
    assert len(mlflow_runs(pipeline)) == 1


def test_three_seeds_give_the_table(tmp_path: Path):
    words = ["stability.seeds=[5, 6, 7]", "train.processes=1", "train.max_iters=3"]
    done = subprocess.run(
        [*command("pipelines.cli", "pipeline", "run-local", "--pipeline", "stability"), *words],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    study = tmp_path / "runs" / "study"
    report = read(study / "stability.json")
    evaluations = [read(study / f"seed_{seed}" / "evaluation.json") for seed in (5, 6, 7)]
    assert report["seeds"] == [5, 6, 7]
    assert report["bbox"]["AP"]["values"] == [evaluation["bbox"]["AP"] for evaluation in evaluations]
    assert "| final AP box |" in (study / "stability.md").read_text()
    assert metadata(tmp_path, "summarise", "metrics")["ap_mean/bbox"] == report["bbox"]["AP"]["mean"]
    runs = mlflow_runs(tmp_path)
    assert [found.info.status for found in runs] == ["FINISHED"] * 4
    (parent,) = [found for found in runs if found.info.run_name == "study"]
    assert {found.data.tags.get("mlflow.parentRunId") for found in runs if found is not parent} == {parent.info.run_id}


def test_a_failure_is_reported_and_marks_the_run_failed(tmp_path: Path):
    """Evaluation finds no data of the split, which training does not need; the run had finished by itself."""
    done = run(tmp_path, "pipelines.cli", "pipeline", "run-local", "evaluate.skip_eval=true", "train.processes=1")
    assert done.returncode == 1
    assert "must have AP, got none" in done.stdout  # of `register`, which needs a score
    assert "Inner task failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (found,) = mlflow_runs(tmp_path)
    assert found.info.status == "FAILED"


def test_sigterm_saves_a_checkpoint_and_leaves_nothing_running(tmp_path: Path):
    words = [
        *command("pipelines.cli", "pipeline", "run-local"),
        "train.max_iters=100000",
        "train.checkpoint_period=100000",
    ]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal, until_s = tmp_path / "runs" / "tiny" / "log.jsonl", time.monotonic() + 400
    try:
        while not (journal.is_file() and journal.read_text().count("\n") > 2):
            assert process.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    finally:
        process.kill()
    assert (tmp_path / "runs" / "tiny" / "last_checkpoint").is_file()
    size = journal.stat().st_size
    time.sleep(2)
    assert journal.stat().st_size == size
    (found,) = mlflow_runs(tmp_path)
    assert found.info.status == "KILLED"
