"""The stability stage: what a seed decides, a study that is broken off and goes on, what is refused, the study in
MLflow.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from components import download, prepare, stability, train
from components.config import Config
from components.params import ConfigError, load_config, save_config
from components.runs.journal import last_step
from components.studies.process import SeedProcess, _environment
from components.studies.result import StabilityError
from components.studies.seed import seed_config
from components.studies.seeds import find_finished, train_seeds
from components.studies.study import summarise_study
from components.tracking.tracker import open_tracker, send_rest
from model.engine.pointers import last_checkpoint

TINY = Path(__file__).with_name("tiny.yaml")
STEPS = 2


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 + 4 generated images, and room for studies."""
    root = tmp_path_factory.mktemp("stability")
    config = study_config(root, "unused")
    download.run(config)
    prepare.run(config)
    return root


def study_config(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"stability.output_dir={root}/{name}")
    return load_config(
        TINY,
        [*folders, "model.score_threshold=0.001", f"train.max_iters={STEPS}", "train.lr_steps=[1]", *overrides],
    )


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def losses(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line)["metrics"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name.startswith("loss/")} for line in lines if "loss/total" in line]


def outcome(config: Config) -> dict[str, Any]:
    """All that training and evaluation of a run came to: losses, detections, scores."""
    run_dir = config.train.output_dir
    found = {task: (run_dir / "inference" / f"{task}.json").read_text() for task in ("bbox", "segm")}
    return {"losses": losses(run_dir), **found, "evaluation": json.loads((run_dir / "evaluation.json").read_text())}


def assert_a_seed_decides_all(root: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    outcomes = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        config = seed_config(study_config(root, f"seeds_{name}", *overrides), seed)
        train.run(config)
        outcomes.append(outcome(config))
    one, again, other = outcomes
    assert again == one
    assert len(one["bbox"]) > 100, "something is found that could differ"
    assert not [step for step, also in zip(one["losses"], other["losses"], strict=True) if step == also]
    assert other["bbox"] != one["bbox"]
    return one, other


def test_a_seed_twice_gives_the_same_losses_and_detections_and_another_seed_others(shapes: Path) -> None:
    assert_a_seed_decides_all(shapes)


@pytest.mark.slow
def test_a_seed_twice_gives_the_same_ap_and_another_seed_another(shapes: Path) -> None:
    one, other = assert_a_seed_decides_all(
        shapes / "..", f"data.raw_dir={shapes}/raw", f"data.prepared_dir={shapes}/prepared",
        f"stability.output_dir={shapes}/long",
        "train.max_iters=100", "train.lr_steps=[90]", "train.warmup_iters=10", "train.base_lr=0.04",
        "evaluate.split=train",
    )  # fmt: skip
    assert 0 < one["evaluation"]["bbox"]["AP"] != other["evaluation"]["bbox"]["AP"] > 0


@pytest.fixture(scope="module")
def database(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('study'))}"


@pytest.fixture(scope="module")
def broken_then_mended(shapes: Path, database: str) -> tuple[Config, str, dict[int, Path]]:
    """A study of seeds 1 and 2 of which 2 cannot be trained, and the same after 2 was trained by hand."""
    config = study_config(
        shapes,
        "study",
        "stability.seeds=[1, 2]",
        "stability.parallel=2",
        "tracking.enabled=true",
        f"tracking.uri={database}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.chdir(shapes)
        obstacle = shapes / "study" / "seed_2"
        obstacle.parent.mkdir()
        obstacle.write_text("no folder")
        with pytest.raises(StabilityError) as error:
            stability.run(config)
        first = last_checkpoint(shapes / "study" / "seed_1")
        assert first is not None
        stamps = {1: first.stat().st_mtime_ns}
        obstacle.unlink()
        train.run(seed_config(config, 2))  # as the process of a seed does, with mlflow and torch loaded
        stability.run(config)
        assert first.stat().st_mtime_ns == stamps[1], "the finished seed was kept"
    return config, str(error.value), {seed: shapes / "study" / f"seed_{seed}" for seed in (1, 2)}


def test_a_seed_that_fails_is_reported_and_holds_up_no_other(
    broken_then_mended: tuple[Config, str, dict[int, Path]],
) -> None:
    failure = broken_then_mended[1]
    assert "1 did not; finished ones are kept" in failure
    assert "seed 2: status 2" in failure
    assert "study/seed_2: File exists; a folder is needed there" in failure
    assert "seed 1" not in failure


def test_a_study_leaves_what_it_promises(broken_then_mended: tuple[Config, str, dict[int, Path]]) -> None:
    config, _, run_dirs = broken_then_mended
    folder = config.stability.output_dir
    report = json.loads((folder / "stability.json").read_text())
    assert report["seeds"] == [1, 2]
    shown = {"AP_mean": report["bbox"]["AP"]["mean"], "AP_deviation": report["bbox"]["AP"]["deviation"]}
    assert json.loads((folder / "scores.json").read_text())["bbox"] == shown
    for seed, run_dir in run_dirs.items():
        evaluation = json.loads((run_dir / "evaluation.json").read_text())
        assert report["bbox"]["AP"]["values"][seed - 1] == evaluation["bbox"]["AP"]
        assert json.loads((folder / "evaluations" / f"seed_{seed}.json").read_text()) == evaluation
        assert load_config(run_dir / "config.yaml").train.seed == seed
        assert len(losses(run_dir)) == STEPS
    assert {"stability.csv", "stability.md", "stability.png"} <= {path.name for path in folder.iterdir()}


def test_seeds_are_children_of_the_studys_one_run(
    broken_then_mended: tuple[Config, str, dict[int, Path]], database: str
) -> None:
    client = MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name("maskrcnn")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"study", "seed_1", "seed_2"}, "a study that goes on stays in its run"
    study = runs["study"].info.run_id
    assert [runs[f"seed_{seed}"].data.tags["mlflow.parentRunId"] for seed in (1, 2)] == [study, study]
    assert "mlflow.parentRunId" not in runs["study"].data.tags
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    report = json.loads((broken_then_mended[0].stability.output_dir / "stability.json").read_text())
    assert runs["study"].data.metrics["ap_mean/bbox"] == report["bbox"]["AP"]["mean"]
    assert "ap_deviation/segm" in runs["study"].data.metrics
    assert {file.path for file in client.list_artifacts(study)} >= {"stability.json", "stability.png"}


def test_the_same_study_again_trains_nothing_and_says_the_same(
    broken_then_mended: tuple[Config, str, dict[int, Path]], capsys: pytest.CaptureFixture[str], database: str
) -> None:
    config = broken_then_mended[0]
    before = {path: path.stat().st_mtime_ns for path in (config.stability.output_dir / "seed_1").rglob("*")}
    text = (config.stability.output_dir / "stability.json").read_text()
    stability.run(config)
    assert capsys.readouterr().out.count("finished before, kept") == 2
    assert {path: path.stat().st_mtime_ns for path in (config.stability.output_dir / "seed_1").rglob("*")} == before
    assert (config.stability.output_dir / "stability.json").read_text() == text
    client = MlflowClient(tracking_uri=database)
    study = json.loads((config.stability.output_dir / "mlflow_run.json").read_text())["run_id"]
    assert len(client.get_metric_history(study, "ap_mean/bbox")) == 1


def test_a_seed_evaluated_with_other_settings_is_evaluated_again(
    broken_then_mended: tuple[Config, str, dict[int, Path]], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(broken_then_mended[2][1], tmp_path / "seed_1")
    config = seed_config(broken_then_mended[0], 1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": run_dir})})
    assert find_finished(config) is not None
    path = run_dir / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_detections": 300}))
    assert find_finished(config) is None


def test_another_configuration_is_not_mixed_in(
    broken_then_mended: tuple[Config, str, dict[int, Path]], shapes: Path
) -> None:
    other = study_config(shapes, "study", "stability.seeds=[1, 2, 3]", "train.base_lr=0.5")
    with pytest.raises(
        StabilityError, match=r"seed_1: must be a run of this study, but differs in train\.base_lr \(0\.02 and 0\.5\)"
    ):
        stability.run(other)
    assert not (shapes / "study" / "seed_3").exists()


def test_other_data_are_not_mixed_in(
    broken_then_mended: tuple[Config, str, dict[int, Path]], shapes: Path, tmp_path: Path
) -> None:
    fewer = study_config(tmp_path, "study", f"data.raw_dir={shapes}/raw", "data.train_limit=6")
    prepare.run(fewer)
    elsewhere = (f"data.prepared_dir={tmp_path}/prepared", "stability.seeds=[1, 2, 3]")  # else the same parameters
    with pytest.raises(StabilityError, match=r"seed_1: must be a run of this study, but differs in the data;"):
        stability.run(study_config(shapes, "study", *elsewhere))


def test_a_summary_of_unfinished_seeds_is_refused(
    broken_then_mended: tuple[Config, str, dict[int, Path]], shapes: Path
) -> None:
    with pytest.raises(ValueError, match=r"seed_9/config\.yaml: no such file.*maskrcnn stability"):
        summarise_study(study_config(shapes, "study", "stability.seeds=[1, 2, 9]"))


def test_a_study_without_scores_is_refused(shapes: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.skip_eval: must be false"):
        stability.run(study_config(shapes, "none", "evaluate.skip_eval=true"))


def test_a_seed_that_is_not_of_the_study_is_refused(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        stability.main(["--params", str(TINY), "--seed", "6"])
    assert end.value.code == 2
    assert "must be one of stability.seeds, [1, 2, 3, 4, 5], got 6" in capsys.readouterr().err


def test_a_seed_that_another_process_trains_is_left_alone(shapes: Path) -> None:
    config = seed_config(study_config(shapes, "taken"), 3)
    (shapes / "taken").mkdir()
    with (shapes / "taken" / "seed_3.log").open("a") as log:  # as a process that outlived its study holds it
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(StabilityError, match=r"seed_3\.log: another process trains this seed"):
            SeedProcess(config, slot=0, parallel=1)
    assert not config.train.output_dir.exists()


def test_a_seed_that_is_killed_is_reported_with_its_signal(shapes: Path) -> None:
    seed = SeedProcess(seed_config(study_config(shapes, "shot"), 3), slot=0, parallel=1)
    os.kill(seed._process.pid, signal.SIGKILL)
    seed.wait()
    assert seed.failure().startswith(f"seed 3: killed by SIGKILL; {seed.log} ends with")


def start_study(config: Config, params: Path) -> subprocess.Popen[bytes]:
    save_config(config, params)
    return subprocess.Popen(
        [sys.executable, "-m", "components.stability", "--params", str(params)],
        stderr=subprocess.PIPE,
    )


def wait_for_steps(run_dir: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    while last_step(run_dir / "log.jsonl") < steps and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "the study ended before it could be interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_study_saves_and_goes_on_to_the_same_result(
    shapes: Path, tmp_path: Path, how: signal.Signals
) -> None:
    long = ("train.max_iters=40", "train.lr_steps=[30]", "train.checkpoint_period=1000", "stability.seeds=[1, 2]")
    unbroken = seed_config(study_config(shapes, f"unbroken_{how}", *long), 1)
    train.run(unbroken)
    config = study_config(shapes, f"interrupted_{how}", *long)
    seed = seed_config(config, 1)
    process = start_study(config, tmp_path / "params.yaml")
    wait_for_steps(seed.train.output_dir, 3, process)
    process.send_signal(how)
    assert process.wait(timeout=120) == 128 + how
    saved = last_checkpoint(seed.train.output_dir)
    assert saved is not None, "SIGTERM saves a checkpoint, which checkpoint_period alone would not have by then"
    assert 3 <= int(saved.stem.removeprefix("step_")) < 40
    assert not seed_config(config, 2).train.output_dir.exists(), "no seed begins after a signal"
    result = stability.run(config)
    assert result.report["seeds"] == [1, 2]
    assert "continuing from" in (config.stability.output_dir / "seed_1.log").read_text()
    assert outcome(seed) == outcome(unbroken)


@pytest.mark.slow
def test_a_killed_study_leaves_no_folder_to_two_processes(shapes: Path, tmp_path: Path) -> None:
    config = study_config(shapes, "killed", "train.max_iters=400", "train.lr_steps=[300]", "stability.seeds=[1]")
    process = start_study(config, tmp_path / "params.yaml")
    wait_for_steps(seed_config(config, 1).train.output_dir, 1, process)
    process.kill()
    process.wait()
    log = config.stability.output_dir / "seed_1.log"
    with pytest.raises(StabilityError, match="another process trains this seed"):
        train_seeds([seed_config(config, 1)], 1, Console(quiet=True))
    holders = [int(fd.parent.parent.name) for fd in Path("/proc").glob("[0-9]*/fd/1") if _is(fd, log)]
    for holder in holders:
        os.kill(holder, signal.SIGKILL)
    assert holders


def _is(link: Path, file: Path) -> bool:
    try:
        return link.samefile(file)
    except OSError:  # of another user, or gone
        return False


@pytest.mark.parametrize(
    ("parallel", "visible", "shares"),
    [
        (2, "4,5,6,7", ["4,6", "5,7"]),
        (3, "0,1", ["0", "1", "0"]),
        (1, "0,1", ["0,1"]),
        (2, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch, parallel: int, visible: str, shares: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = [_environment(Config(), slot, parallel)["CUDA_VISIBLE_DEVICES"] for slot in range(parallel)]
    assert given == shares


def test_a_named_gpu_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert _environment(load_config(TINY, ["train.device=cuda:1"]), 0, 2)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_cores_are_shared_out_unless_their_number_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(Config(), 0, 2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert "OMP_NUM_THREADS" not in _environment(Config(), 0, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _environment(Config(), 0, 2)["OMP_NUM_THREADS"] == "3"


def test_a_seed_never_logs_into_the_studys_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "ab")
    assert "MLFLOW_RUN_ID" not in _environment(Config(), 0, 1)


def test_the_last_step_of_a_journal_is_that_of_its_last_whole_line(tmp_path: Path) -> None:
    journal = tmp_path / "log.jsonl"
    assert last_step(journal) == 0
    journal.write_text(
        "".join(f'{{"step": {step}, "time": 0.5, "metrics": {{}}}}\n' for step in range(5000)) + '{"step": 50'
    )
    assert last_step(journal) == 4999


def test_children_find_their_parent_when_mlflow_was_away(empty_database: Path, tmp_path: Path) -> None:
    database = tmp_path / "not_yet" / "mlflow.db"
    config = load_config(TINY, ["tracking.enabled=true", f"tracking.uri=sqlite:///{database}"])
    database.parent.write_text("a file where the folder should be")
    for run_dir in (tmp_path / "study", tmp_path / "study" / "seed_1"):
        with open_tracker(config, run_dir=run_dir) as tracker:
            tracker.log_metrics({"ap/bbox": 0.5}, step=1)
    database.parent.unlink()
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    with open_tracker(config, run_dir=tmp_path / "study"):
        pass
    send_rest(config, run_dir=tmp_path / "study" / "seed_1")
    ids = [
        json.loads((tmp_path / path / "mlflow_run.json").read_text())["run_id"] for path in ("study", "study/seed_1")
    ]
    client = MlflowClient(tracking_uri=f"sqlite:///{database}")
    child = client.get_run(ids[1])
    assert child.data.tags["mlflow.parentRunId"] == ids[0]
    assert child.data.metrics["ap/bbox"] == 0.5
    ended = child.info.end_time
    send_rest(config, run_dir=tmp_path / "study" / "seed_1")
    assert client.get_run(ids[1]).info.end_time == ended, "a run with nothing left to send is left alone"
