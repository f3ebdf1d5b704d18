"""The local pipeline: dvc.yaml agrees with the code and with the parameters; DVC runs it with git and without."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from components.config import Config

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
STUDY: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "stability" / "dvc.yaml").read_text())["stages"]
by_stage = pytest.mark.parametrize("stage", STAGES)

# Parameters that change no result, so that no stage runs again for them.
IDLE = {
    f"train.{name}"
    for name in (
        "apex",
        "compile",
        "cuda_graph",
        "deterministic",
        "device",
        "log_period",
        "processes",
        "resume",
        "timeout_s",
    )
} | {"data.timeout_s", "data.workers", "evaluate.backend"}
# Code that every stage uses and that changes none of its outputs.
IDLE_CODE = {
    f"components/{name}.py"
    for name in (
        "cli",
        "config",
        "params",
        "runs/identity",
        "runs/environment",
        "runs/figures",  # of tables on the screen
        "runs/journal",
        "runs/lock",
        "launch",
        "tracking/outbox",
        "runs/recipes",
        "runs/result",
        "tracking/tracker",
        "tracking/monitor",
        "tracking/server",
        "training/log",
    )
}
IDLE_CODE |= {"model/config.py", "model/errors.py", "model/files.py"}


def params_of(stage: str) -> set[str]:
    """The full names of the parameters that a stage lists, sections spelt out."""
    listed = STAGES[stage]["params"]
    return {key for key in Config().flat() if any(key == name or key.startswith(f"{name}.") for name in listed)}


@cache
def imported_files(path: str) -> frozenset[str]:
    """The repository's files that a file itself imports."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {f"{name.replace('.', '/')}{end}" for name in names for end in (".py", "/__init__.py")}
    return frozenset(file for file in files if (REPOSITORY / file).is_file())


def imports(path: str, seen: set[str]) -> set[str]:
    """The repository's files that a file imports, and those that they import."""
    for file in imported_files(path) - seen:
        if file not in seen:  # another one may have come to it
            seen.add(file)
            imports(file, seen)
    return seen


@by_stage
def test_a_stage_runs_the_module_of_its_name(stage: str):
    assert STAGES[stage]["cmd"].split()[:3] == ["python", "-m", f"components.{stage}"]


@by_stage
def test_a_stage_lists_parameters_that_exist(stage: str):
    known = set(Config().flat())
    for name in STAGES[stage]["params"]:
        assert name in known or any(key.startswith(f"{name}.") for key in known), name


def test_every_parameter_that_matters_is_some_stages():
    used = set().union(*(params_of(stage) for stage in STAGES))
    unused = {
        key
        for key in Config().flat()
        if key not in used and not key.startswith(("cluster.", "registry.", "stability.", "tracking."))
    }
    assert unused == IDLE


@by_stage
def test_a_stage_depends_on_the_code_that_it_runs(stage: str):
    deps = [dep for dep in STAGES[stage]["deps"] if not dep.startswith("${")]
    assert all((REPOSITORY / dep).exists() for dep in deps), deps
    used = imports(f"components/{stage}.py", {f"components/{stage}.py"}) - IDLE_CODE
    if stage == "train":  # which looks and evaluates, but learns nothing of it; what is drawn then must not train anew
        used -= {
            f"components/{name}.py"
            for name in (
                "evaluation/before_after",
                "evaluate",
                "evaluation/checkpoint",
                "evaluation/detect",
                "evaluation/files",
                "evaluation/plots",
                "evaluation/score",
                "runs/trained",
            )
        }
    used = {file for file in used if (REPOSITORY / file).stat().st_size and not file.endswith("/__init__.py")}
    assert not {file for file in used if not any(file == dep or file.startswith(f"{dep}/") for dep in deps)}


def test_checkpoints_outlive_an_interrupted_stage():
    """DVC removes what a stage makes before it runs again, unless that persists."""
    outs = {name: settings for out in STAGES["train"]["outs"] for name, settings in out.items()}
    assert set(outs) == {f"${{train.output_dir}}/{name}" for name in ("checkpoints", "last_checkpoint", "before.json")}
    assert all(settings["persist"] for settings in outs.values())


@pytest.mark.parametrize("stage", ["evaluate", "predict", "benchmark"])
def test_what_follows_training_runs_anew_for_a_new_model(stage: str):
    assert {"${train.output_dir}/checkpoints", "${train.output_dir}/last_checkpoint"} <= set(STAGES[stage]["deps"])


def test_a_seed_of_a_study_lists_what_training_and_evaluation_list():
    set_by_the_study = {"train.seed", "train.output_dir"}
    without_effect = {"evaluate.drawn_images", "evaluate.skip_eval"}  # on scores; and a study refuses to skip them
    listed = {*STAGES["train"]["params"], *STAGES["evaluate"]["params"], "stability.output_dir"}
    assert set(STUDY["seed"]["params"]) == listed - set_by_the_study - without_effect
    drawing = {"components/evaluation/before_after.py", "components/evaluation/plots.py"}
    deps = {dep for stage in ("train", "evaluate") for dep in STAGES[stage]["deps"] if "train.output_dir" not in dep}
    assert set(STUDY["seed"]["deps"]) == deps - drawing


def test_checkpoints_of_seeds_outlive_an_interruption():
    outs = {name: settings for out in STUDY["seed"]["outs"] for name, settings in out.items()}
    assert len(outs) == 2
    assert all(settings["persist"] for settings in outs.values())


def test_a_summary_depends_on_the_code_that_computes_it():
    used = imports("components/studies/summary.py", set()) - IDLE_CODE
    used = {file for file in used if file.startswith("components/") and (REPOSITORY / file).stat().st_size}
    training = {
        file for file in used if file in imports("components/training/loop.py", {"components/training/loop.py"})
    }
    assert used - training <= set(STUDY["summary"]["deps"])


def test_raw_data_is_never_deleted_nor_cached():
    assert STAGES["download"]["outs"] == [{"${data.raw_dir}": {"cache": False, "persist": True}}]


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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a user has: a copy of the repository, without git, beside nothing."""
    for name in ("components", "cuda_ops", "model", "pipelines", "recipes"):
        shutil.copytree(
            REPOSITORY / name, tmp_path / "repo" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for name in (
        ".dvc/config",
        ".dvc/.gitignore",
        ".dvcignore",
        ".gitignore",
        "dvc.yaml",
        "params.yaml",
        "stability/dvc.yaml",
    ):
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "repo" / name)
    return tmp_path / "repo"


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


EDGES = {
    ("download", "prepare"),
    ("prepare", "train"),
    ("prepare", "evaluate"),
    ("prepare", "predict"),
    ("train", "evaluate"),
    ("train", "predict"),
    ("train", "benchmark"),
    ("prepare", "stability/dvc.yaml:seed"),
    ("stability/dvc.yaml:seed", "stability/dvc.yaml:summary"),
}


# Three commands in one process, whose start takes longer than they do.
IN_TURN = """
import subprocess
from dvc.cli import main

def run(*words):
    assert main(words) == 0
    print("=" * 9, flush=True)

run("stage", "list")
run("dag", "--dot", "--collapse-foreach-matrix")
subprocess.run(["git", "init", "--quiet"], check=True)
run("stage", "list")
"""


def test_dvc_reads_stages_and_their_edges_with_git_and_without(tree: Path):
    without_git, dag, with_git, _ = python("-c", IN_TURN, where=tree).split("=" * 9)
    assert [line.split()[0] for line in without_git.splitlines()] == list(STAGES)
    assert [line.split()[0] for line in with_git.splitlines() if line] == list(STAGES)
    assert set(re.findall(r'"(.+)" -> "(.+)";', dag)) == EDGES


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


@pytest.mark.slow
def test_a_change_reruns_just_what_depends_on_it(tree: Path):
    set_values(tree, **TINY)
    assert sorted(stages_run(tree)) == sorted(STAGES)
    assert stages_run(tree) == []
    for changes, reruns in (
        ({"data__workers": 1, "train__log_period": 1}, []),
        ({"predict__score_threshold": 0.9}, ["predict"]),
        ({"evaluate__drawn_images": 2}, ["evaluate"]),
        ({"benchmark__steps": 2}, ["benchmark"]),
        ({"train__base_lr": 0.001}, ["train", "evaluate", "predict", "benchmark"]),
    ):
        set_values(tree, **changes)
        assert sorted(stages_run(tree)) == sorted(reruns), changes


@pytest.mark.slow
def test_an_interrupted_repro_continues_from_the_last_checkpoint(tree: Path):
    set_values(tree, **TINY | {"train__max_iters": 2})
    dvc("repro", "train", where=tree)
    # As an interruption leaves it: checkpoints, but no entry in dvc.lock that says the stage is done.
    (tree / "dvc.lock").unlink()
    set_values(tree, train__max_iters=4)
    assert "step 2" in next(
        line for line in dvc("repro", "train", where=tree).splitlines() if "continuing from" in line
    )


@pytest.mark.slow
def test_raw_data_outside_the_repository_stays_as_it_is(tree: Path):
    set_values(tree, **TINY, data__raw_dir="../raw")
    dvc("repro", "prepare", where=tree)
    before = {path: path.stat().st_mtime_ns for path in sorted((tree.parent / "raw").rglob("*"))}
    set_values(tree, data__source="custom", data__train_images="train", data__val_images="val")
    set_values(tree, data__train_annotations="annotations/instances_train.json")
    set_values(tree, data__val_annotations="annotations/instances_val.json")
    assert "Running stage 'prepare'" in dvc("repro", "prepare", where=tree)
    assert {path: path.stat().st_mtime_ns for path in sorted((tree.parent / "raw").rglob("*"))} == before


@pytest.mark.slow
def test_a_study_is_a_pipeline_of_its_own_and_another_seed_trains_alone(tree: Path):
    set_values(tree, **TINY, stability__seeds=[1, 2])
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


@pytest.mark.slow
def test_an_interrupted_seed_continues_from_its_last_checkpoint(tree: Path):
    """As an interruption leaves it: a checkpoint, but no evaluation, and no entry in dvc.lock that says the stage is done."""
    set_values(tree, **TINY, stability__seeds=[1])
    dvc("repro", "stability/dvc.yaml:seed@1", where=tree)
    folder = tree / "runs" / "shapes_demo_stability"
    (tree / "stability" / "dvc.lock").unlink()
    (folder / "seed_1" / "evaluation.json").unlink()
    (folder / "seed_1" / "last_checkpoint").write_text("checkpoints/step_0000002.pt\n")
    (folder / "seed_1" / "checkpoints" / "step_0000004.pt").unlink()
    dvc("repro", "stability/dvc.yaml:seed@1", where=tree)
    assert "continuing from" in (folder / "seed_1.log").read_text()
