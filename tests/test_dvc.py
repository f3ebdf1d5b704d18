"""The local pipeline as it is declared: dvc.yaml agrees with the code and with the parameters, and DVC reads it."""

import ast
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from components.config import Config
from components.evaluation.score import evaluate_model
from model.config import EvaluateConfig

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]
STUDY: dict[str, Any] = YAML(typ="safe").load((REPOSITORY / "stability" / "pipeline.yaml").read_text())["stages"]
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
        "runs/experiment",
        "runs/figures",  # of tables on the screen
        "runs/journal",
        "runs/lock",
        "launch",
        "tracking/outbox",
        "tracking/run_file",
        "tracking/registered",  # for models:/ alone
        "tracking/registry",
        "runs/recipes",
        "runs/result",
        "runs/thresholds",  # reads what evaluate wrote
        "tracking/tracker",
        "tracking/monitor",
        "tracking/server",
        "tracking/client",
        "tracking/uploads",
        "tracking/reason",
        "training/log",
        "training/progress",
    )
}
IDLE_CODE |= {f"model/{name}.py" for name in ("config", "data_config", "errors", "files")}


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
                "evaluation/analysis",
                "evaluation/analysis_plots",
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


def outputs(stage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The outputs of a stage with their settings, metrics too."""
    listed = [{out: {}} if isinstance(out, str) else out for key in ("outs", "metrics") for out in stage.get(key, ())]
    return {name: settings for out in listed for name, settings in out.items()}


def test_every_output_is_cached_so_that_a_version_comes_back_whole():
    """Raw data are the user's own folder, or gigabytes."""
    for pipeline in (STAGES, STUDY):
        for stage in pipeline.values():
            uncached = {name for name, settings in outputs(stage).items() if not settings.get("cache", True)}
            assert uncached <= {"${data.raw_dir}"}


def test_what_a_stage_needs_to_continue_or_tells_mlflow_is_not_removed_nor_restored_from_the_run_cache():
    """DVC removes what a stage makes before it runs again, or restores it and does not run it, unless that persists."""
    for stage in ("train", "evaluate", "benchmark", "record"):
        assert all(settings.get("persist") for settings in outputs(STAGES[stage]).values()), stage
    assert outputs(STUDY["seed"])["${stability.output_dir}/seed_${item.seed}"] == {"persist": True}


def test_metrics_are_few():
    metrics = [name for pipeline in (STAGES, STUDY) for stage in pipeline.values() for name in stage.get("metrics", ())]
    names = [next(iter(name)) if isinstance(name, dict) else name for name in metrics]
    assert [Path(name).name for name in names] == ["scores.json", "speed.json", "scores.json"]


@pytest.mark.parametrize("stage", ["evaluate", "predict", "benchmark"])
def test_what_follows_training_runs_anew_for_a_new_model(stage: str):
    assert {"${train.output_dir}/checkpoints", "${train.output_dir}/last_checkpoint"} <= set(STAGES[stage]["deps"])


def test_a_seed_of_a_study_lists_what_training_and_evaluation_list():
    set_by_the_study = {"train.seed", "train.output_dir"}
    without_effect = {"evaluate.drawn_images", "evaluate.skip_eval"}  # on scores; and a study refuses to skip them
    listed = {*STAGES["train"]["params"], *STAGES["evaluate"]["params"], "stability.output_dir"}
    assert set(STUDY["seed"]["params"]) == listed - set_by_the_study - without_effect
    names = ("analysis", "analysis_plots", "before_after", "plots")  # of drawings and analyses, which change no score
    drawing = {f"components/evaluation/{name}.py" for name in names}
    deps = {dep for stage in ("train", "evaluate") for dep in STAGES[stage]["deps"] if "train.output_dir" not in dep}
    assert set(STUDY["seed"]["deps"]) == deps - drawing


def test_training_lists_the_settings_of_its_evaluations():
    training = "".join((REPOSITORY / f"components/training/{name}.py").read_text() for name in ("loop", "goals"))
    source = inspect.getsource(evaluate_model) + training
    read = {name for name in re.findall(r"\bevaluate\.(\w+)", source) if name in EvaluateConfig.model_fields}
    assert {"every_epoch", "target_segm_ap", "max_detections"} <= read
    assert {f"evaluate.{name}" for name in read - {"batch_size", "backend"}} == {
        name for name in STAGES["train"]["params"] if name.startswith("evaluate.")
    }


def test_a_summary_depends_on_the_code_that_computes_it():
    used = imports("components/studies/summary.py", set()) - IDLE_CODE
    used = {file for file in used if file.startswith("components/") and (REPOSITORY / file).stat().st_size}
    training = {
        file for file in used if file in imports("components/training/loop.py", {"components/training/loop.py"})
    }
    assert used - training <= set(STUDY["summary"]["deps"])


def test_raw_data_is_never_deleted_nor_cached():
    assert STAGES["download"]["outs"] == [{"${data.raw_dir}": {"cache": False, "persist": True}}]


EDGES = {
    ("download", "prepare"),
    ("prepare", "train"),
    ("prepare", "evaluate"),
    ("prepare", "predict"),
    ("train", "evaluate"),
    ("train", "predict"),
    ("train", "benchmark"),
    ("train", "record"),
    ("evaluate", "record"),
    ("benchmark", "record"),
}
EDGES_OF_STUDY = {
    ("prepare", "stability/dvc.yaml:seed"),
    ("stability/dvc.yaml:seed", "stability/dvc.yaml:summary"),
}


# Several commands in one process, whose start takes longer than they do.
IN_TURN = """
import shutil
import subprocess
from dvc.cli import main

def run(*words):
    assert main(words) == 0
    print("=" * 9, flush=True)

run("stage", "list")
run("dag", "--dot", "--collapse-foreach-matrix")
shutil.copy("stability/pipeline.yaml", "stability/dvc.yaml")
run("dag", "--dot", "--collapse-foreach-matrix")
subprocess.run(["git", "init", "--quiet"], check=True)
run("stage", "list")
"""


def test_dvc_reads_stages_and_their_edges_with_git_and_without(tree: Path):
    """A study is known only once its pipeline was copied: stages that were never run would make `dvc checkout` fail."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", IN_TURN], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    without_git, dag, dag_with_study, with_git, _ = done.stdout.split("=" * 9)
    assert [line.split()[0] for line in without_git.splitlines()] == list(STAGES)
    assert [line.split()[0] for line in with_git.splitlines() if line] == list(STAGES)
    assert set(re.findall(r'"(.+)" -> "(.+)";', dag)) == EDGES
    assert set(re.findall(r'"(.+)" -> "(.+)";', dag_with_study)) == EDGES | EDGES_OF_STUDY
