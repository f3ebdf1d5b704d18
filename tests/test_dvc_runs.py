"""The local pipeline as DVC runs it: what a change reruns, what an interruption loses, and versions that come back."""

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]


def python(*words: str, where: Path) -> str:
    """The output of a Python program, which must succeed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(where),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run([sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(*words: str, where: Path) -> str:
    """The output of a dvc command, which must succeed."""
    return python("-m", "dvc", *words, where=where)


def set_values(tree: Path, **values: Any) -> None:
    """Change parameters: section__key=value."""
    yaml = YAML()
    params = yaml.load((tree / "params.yaml").read_text())
    for name, value in values.items():
        *sections, key = name.split("__")
        node = params
        for section in sections:
            node = node[section]
        node[key] = value
    with (tree / "params.yaml").open("w") as file:
        yaml.dump(params, file)


TINY = {
    "data__shapes__train_images": 6,
    "data__shapes__val_images": 2,
    "data__workers": 0,
    "train__max_iters": 4,
    "train__batch_size": 2,
    "train__lr_steps": [3],
    "train__checkpoint_period": 2,
    "evaluate__batch_size": 2,
    "evaluate__drawn_images": 1,
    "predict__images": 1,
    "benchmark__batch_sizes": [1],
    "benchmark__warmup": 0,
    "benchmark__steps": 1,
    "benchmark__torchvision": False,
}


def stages_run(tree: Path, *targets: str) -> list[str]:
    """The stages that `dvc repro` found reason to run."""
    output = dvc("repro", *targets, where=tree).splitlines()
    return [line.split("'")[1] for line in output if line.startswith("Running stage")]


def test_a_change_reruns_just_what_depends_on_it(tree: Path):
    set_values(tree, **TINY)
    assert sorted(stages_run(tree)) == sorted(STAGES)
    assert stages_run(tree) == []
    for changes, reruns in (
        ({"data__workers": 1, "train__log_period": 1}, []),
        ({"predict__score_threshold": 0.9}, ["predict"]),
        ({"evaluate__drawn_images": 2}, ["evaluate", "record"]),
        ({"benchmark__steps": 2}, ["benchmark", "record"]),
        ({"train__base_lr": 0.001}, ["train", "evaluate", "predict", "benchmark", "record"]),
    ):
        set_values(tree, **changes)
        assert sorted(stages_run(tree)) == sorted(reruns), changes


def test_an_interrupted_repro_continues_from_the_last_checkpoint(tree: Path):
    set_values(tree, **TINY | {"train__max_iters": 2})
    dvc("repro", "train", where=tree)
    # As an interruption leaves it: checkpoints, but no entry in dvc.lock that says the stage is done.
    (tree / "dvc.lock").unlink()
    set_values(tree, train__max_iters=4)
    assert "step 2" in next(
        line for line in dvc("repro", "train", where=tree).splitlines() if "continuing from" in line
    )


def test_raw_data_outside_the_repository_stays_as_it_is(tree: Path):
    set_values(tree, **TINY, data__raw_dir="../raw")
    dvc("repro", "prepare", where=tree)
    before = {path: path.stat().st_mtime_ns for path in sorted((tree.parent / "raw").rglob("*"))}
    set_values(tree, data__source="custom", data__train_images="train", data__val_images="val")
    set_values(tree, data__train_annotations="annotations/instances_train.json")
    set_values(tree, data__val_annotations="annotations/instances_val.json")
    assert "Running stage 'prepare'" in dvc("repro", "prepare", where=tree)
    assert {path: path.stat().st_mtime_ns for path in sorted((tree.parent / "raw").rglob("*"))} == before


def test_a_study_is_a_pipeline_of_its_own_and_another_seed_trains_alone(tree: Path):
    set_values(tree, **TINY, stability__seeds=[1, 2])
    shutil.copy(tree / "stability" / "pipeline.yaml", tree / "stability" / "dvc.yaml")
    study, seed = "stability/dvc.yaml", "stability/dvc.yaml:seed@{}"
    assert stages_run(tree, study) == ["download", "prepare", seed.format(1), seed.format(2), f"{study}:summary"]
    assert stages_run(tree, study) == []
    set_values(tree, stability__seeds=[1, 2, 5], stability__parallel=3, evaluate__drawn_images=2)
    assert stages_run(tree, study) == [seed.format(5), f"{study}:summary"]
    report = json.loads((tree / "runs" / "shapes_demo_stability" / "stability.json").read_text())
    assert report["seeds"] == [1, 2, 5]
    set_values(tree, stability__seeds=[1, 5])
    assert stages_run(tree, study) == [f"{study}:summary"]
    assert sorted(stages_run(tree)) == sorted({*STAGES} - {"download", "prepare"}), "the main pipeline begins no study"
    assert stages_run(tree, study) == [], "nor does it touch one"


def test_an_interrupted_seed_continues_from_its_last_checkpoint(tree: Path):
    """As an interruption leaves it: a checkpoint, but no evaluation, and no entry in dvc.lock that says the stage is
    done.
    """
    set_values(tree, **TINY, stability__seeds=[1])
    shutil.copy(tree / "stability" / "pipeline.yaml", tree / "stability" / "dvc.yaml")
    dvc("repro", "stability/dvc.yaml:seed@1", where=tree)
    folder = tree / "runs" / "shapes_demo_stability"
    (tree / "stability" / "dvc.lock").unlink()
    (folder / "seed_1" / "evaluation.json").unlink()
    (folder / "seed_1" / "last_checkpoint").write_text("checkpoints/step_0000002.pt\n")
    (folder / "seed_1" / "checkpoints" / "step_0000004.pt").unlink()
    dvc("repro", "stability/dvc.yaml:seed@1", where=tree)
    assert "continuing from" in (folder / "seed_1.log").read_text()


def git(*words: str, where: Path) -> None:
    subprocess.run(["git", *words], cwd=where, check=True, capture_output=True)


def commit_version(tree: Path) -> Path:
    """Run the pipeline in a tree with git and commit the result; return the run's folder."""
    dvc("repro", where=tree)
    assert "up to date" in dvc("status", where=tree)
    git("add", ".", where=tree)
    git("commit", "--message", "a version", where=tree)
    return tree / "runs" / "shapes_demo"


@pytest.fixture
def versions(tree: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A tree with two versions of a run, the run's folder, and evaluation.json of the first."""
    git("init", where=tree)
    git("config", "user.name", "a", where=tree)
    git("config", "user.email", "a@b.c", where=tree)
    dvc("config", "--local", "core.no_scm", "false", where=tree)
    set_values(tree, **TINY, model__score_threshold=0.001, benchmark__modes=["train"], benchmark__memory=False)
    run_dir = commit_version(tree)
    first = json.loads((run_dir / "evaluation.json").read_text())
    assert first["detections"] > 0
    set_values(tree, train__base_lr=0.001)
    commit_version(tree)
    return tree, run_dir, first


def test_versions_come_back_whole_and_can_be_compared(versions: tuple[Path, Path, dict[str, Any]]):
    tree, run_dir, first = versions
    difference = json.loads(dvc("metrics", "diff", "HEAD~1", "--all", "--json", where=tree))
    assert set(difference) == {f"runs/shapes_demo/{name}.json" for name in ("scores", "speed")}
    assert {"bbox.AP", "segm.AP"} <= set(difference["runs/shapes_demo/scores.json"])
    dvc("plots", "diff", "HEAD~1", where=tree)
    page = (tree / "dvc_plots" / "index.html").read_text()
    assert {"HEAD~1", "workspace"} <= set(re.findall(r'"rev": "([^"]+)"', page))
    assert "loss/total" in page
    assert "bbox_50" in page
    known = re.findall(r"\$\{train\.output_dir\}/([\w.]+):?$", (tree / "dvc.yaml").read_text(), flags=re.MULTILINE)
    assert {path.name for path in run_dir.iterdir()} == set(known)

    dvc("remote", "add", "--local", "--default", "store", "../store", where=tree)
    dvc("push", "--all-commits", where=tree)
    clone = tree.parent / "clone"
    git("checkout", "HEAD~1", where=tree)
    dvc("checkout", where=tree)
    assert "up to date" in dvc("status", where=tree)
    git("clone", str(tree), str(clone), where=tree)
    dvc("remote", "add", "--local", "--default", "store", str(tree.parent / "store"), where=clone)
    dvc("pull", where=clone)
    for folder in (tree, clone):
        run_dir = folder / "runs" / "shapes_demo"
        python("-m", "components.download", where=folder)
        python("-m", "components.evaluate", where=folder)
        again = json.loads((run_dir / "evaluation.json").read_text())
        assert {**again, "commit": ""} == {**first, "commit": ""}
        python("-m", "components.predict", "data/raw/shapes/val/000001.jpg", where=folder)
        output = python("-m", "components.train", "train.max_iters=5", "--skip-test", where=folder)
        assert "step 4" in next(line for line in output.splitlines() if "continuing from" in line)


def test_an_experiment_in_a_clone_ends_as_a_run_among_the_others(versions: tuple[Path, Path, dict[str, Any]]):
    tree, run_dir, _ = versions
    raw = {path: path.stat().st_mtime_ns for path in sorted((tree / "data" / "raw").rglob("*"))}
    dvc("exp", "run", "--temp", "--name", "sober-otter", "--set-param", "train.base_lr=0.005", where=tree)
    assert {path: path.stat().st_mtime_ns for path in sorted((tree / "data" / "raw").rglob("*"))} == raw
    rows = csv.DictReader(dvc("exp", "show", "--csv", where=tree).splitlines())
    (row,) = [row for row in rows if row["Experiment"] == "sober-otter"]
    assert row["bbox.AP"]
    assert row["train.images_per_s"]
    dvc("exp", "apply", "sober-otter", where=tree)
    assert "up to date" in dvc("status", where=tree)
    assert len((run_dir / "log.jsonl").read_text().splitlines()) > TINY["train__max_iters"]
    run_id = json.loads((run_dir / "mlflow_run.json").read_text())["run_id"]
    with sqlite3.connect(tree / "mlflow.db") as database:
        ended = database.execute("select run_uuid from runs where status = 'FINISHED'").fetchall()
        names = database.execute(
            "select run_uuid from tags where key = 'dvc.exp_name' and value = 'sober-otter'"
        ).fetchall()
    assert len(ended) == 3
    assert names == [(run_id,)]
