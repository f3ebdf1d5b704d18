"""What a pipeline's step does around its stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.config import Config
from components.kubeflow import context
from components.kubeflow.context import COMPILED, compiled_values, configured, job_id
from components.params import config_text, save_config
from components.pytorchjob import make_manifest
from components.studies.seed import seed_config
from components.tracking.tracker import open_tracker


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in (COMPILED, "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    default = Config()
    cluster = {"image": "registry/maskrcnn:1", "working_dir": str(tmp_path / "w")}
    tracking = default.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    return default.model_copy(update={"cluster": default.cluster.model_copy(update=cluster), "tracking": tracking})


def test_params_and_overrides_are_read(config: Config):
    with configured(config_text(config), ["train.seed=3", "data.workers=0"]) as found:
        assert (found.train.seed, found.data.workers) == (3, 0)
        assert found.cluster == config.cluster


def test_a_seed_of_a_study_has_a_folder_of_its_own(config: Config):
    with configured(config_text(config), ["stability.output_dir=runs/study"], 4) as found:
        assert (found.train.seed, found.train.output_dir) == (4, Path("runs/study/seed_4"))


@pytest.mark.parametrize(
    ("params", "overrides", "reason"),
    [
        (" ", [], "params: must be the text of a parameter file"),
        ("train: {sed: 1}", [], "params: train.sed: unknown key; did you mean train.seed?"),
        ("{}", ["train.seed"], "must be section.key=value"),
        ("a: [", [], "params: not YAML"),
    ],
)
def test_a_users_error_ends_the_step_with_a_message(
    params: str, overrides: list[str], reason: str, capsys: pytest.CaptureFixture[str], config: Config
):
    with pytest.raises(SystemExit) as exit_, configured(params, overrides):
        pass
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_step_in_a_pod_works_in_the_volumes_folder(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "w").mkdir()
    monkeypatch.setenv(COMPILED, compiled_values(config))
    with configured(config_text(config), ["cluster.nodes=3", "train.processes=4"]) as found:
        assert Path.cwd() == tmp_path / "w"
        assert found.cluster.nodes == 3
        assert found.train.processes == 1


@pytest.mark.parametrize("word", ["cluster.image=registry/maskrcnn:2", "stability.parallel=9", "cluster.volumes=[]"])
def test_what_was_compiled_in_cannot_be_overridden_by_a_run(
    word: str, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv(COMPILED, compiled_values(config))
    with pytest.raises(SystemExit), configured(config_text(config), [word]):
        pass
    error = capsys.readouterr().err
    assert f"{word.split('=')[0]}: must be the value compiled into this pipeline" in error
    assert "compile or submit the pipeline again" in error


def test_a_job_is_that_of_its_pipeline_run_and_seed(config: Config):
    ids = {job_id(seed_config(config, seed), run) for seed in (1, 2) for run in ("0a1b2c3d-4", "9f8e7d6c-5")}
    assert ids == {"seed_1-0a1b2c3d", "seed_2-0a1b2c3d", "seed_1-9f8e7d6c", "seed_2-9f8e7d6c"}


def test_runs_are_marked_as_their_pipelines_ended(config: Config, empty_database: Path, tmp_path: Path):
    from mlflow import MlflowClient

    shutil.copy(empty_database, tmp_path)
    statuses = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELED": "KILLED", "ANYTHING": "FAILED"}
    statuses |= {"COMPLETE": "FINISHED", "RUNNING": "KILLED"}  # the words of a cluster
    for state in statuses:
        train = config.train.model_copy(update={"output_dir": Path("runs") / state})
        one = config.model_copy(update={"train": train})
        with open_tracker(one, run_dir=train.output_dir):
            pass
        context.end_runs(one, state, "run-1", is_study=False)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.run_name: run.info.status for run in found} == statuses


@pytest.mark.parametrize(("state", "ends"), [("RUNNING", True), ("FAILED", True), ("COMPLETE", False)])
def test_a_job_whose_step_was_killed_is_deleted_at_the_end_of_the_pipeline(
    config: Config, make_cluster: Any, monkeypatch: pytest.MonkeyPatch, state: str, ends: bool
):
    monkeypatch.setenv(COMPILED, compiled_values(config))
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    own = config.cluster.model_copy(update={"working_dir": "/workspace"})
    config, cluster = config.model_copy(update={"cluster": own}), make_cluster()
    seeds = [seed_config(config, seed) for seed in config.stability.seeds[:3]]
    for one in seeds:
        job = make_manifest(one, run_id=job_id(one, "0123456789"))
        name = job["metadata"]["name"]
        cluster.jobs[name] = job
        cluster.change(name, "ADDED")
    cluster.set_condition(name, "Failed")  # an ended one is kept, to be looked at
    context.end_runs(config, state, "0123456789", is_study=True)
    assert len(cluster.jobs) == 3 - 2 * ends
    assert name in cluster.jobs
    calls = [call for call in cluster.calls if call[1] == "pytorchjobs"]
    assert not ends or "delete delete get" in " ".join(verb for verb, _ in calls), "they are awaited together"


def test_a_completed_seed_of_a_failed_study_stays_finished(config: Config, empty_database: Path, tmp_path: Path):
    from mlflow import MlflowClient

    shutil.copy(empty_database, tmp_path)
    stability = config.stability.model_copy(update={"seeds": (1, 2)})
    config = config.model_copy(update={"stability": stability})
    for seed in stability.seeds:
        one = seed_config(config, seed)
        with open_tracker(one, run_dir=one.train.output_dir):
            pass
    done = seed_config(config, 1)
    evaluation = {"checkpoint": f"step_{done.train.max_iters}.pt", "images": 3, "data_hash": "ab", "bbox": {"AP": 0.5}}
    save_config(done, done.train.output_dir / "config.yaml")
    (done.train.output_dir / "evaluation.json").write_text(json.dumps(evaluation))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")

    def statuses() -> list[str]:
        found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return [run.info.status for run in sorted(found, key=lambda run: run.info.run_name)]

    context.end_runs(config, "FAILED", "run-1", is_study=True)
    assert statuses() == ["FINISHED", "FAILED"]
    context.end_runs(done, "CANCELED", "run-1", is_study=False)
    assert statuses() == ["KILLED", "FAILED"]


def test_without_a_run_there_is_none_to_mark(config: Config, capsys: pytest.CaptureFixture[str]):
    context.end_runs(config, "FAILED", "run-1", is_study=False)
    assert "no MLflow run was started" in capsys.readouterr().out
    assert not Path("mlflow.db").exists()
