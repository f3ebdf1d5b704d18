"""What `maskrcnn pipeline compile` writes: what a pod is made of, what a run may change, and nothing secret."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from components.params import load_config, parse_config
from pipelines.pipeline import main

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
STEPS = {
    "training": {"download", "prepare", "train", "evaluate", "predict", "benchmark", "register", "finish"},
    "stability": {"download", "prepare", "seeds", "train", "evaluate", "summarise", "finish"},
}
Command = Callable[..., int | str | None]  # returns the exit status
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("kfp")


class Compiled(NamedTuple):
    """A pipeline as text, the same read, and what it says of Kubernetes by step."""

    text: str
    spec: Json
    pods: Json


COMPILED: dict[tuple[str, tuple[str, ...]], Compiled] = {}
Compile = Callable[..., Compiled]


@pytest.fixture
def compiled(params: Path, pipeline_command: Command) -> Compile:
    """Compiles a pipeline, once for the same words; only to be read."""

    def compile_(*words: str, pipeline: str = "training") -> Compiled:
        key = (pipeline, words)
        if key not in COMPILED:
            assert pipeline_command("compile", "--pipeline", pipeline, "--output", "out/pipeline.yaml", *words) == 0
            text = Path("out/pipeline.yaml").read_text()
            spec, platform = YAML(typ="safe").load_all(text)
            executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            COMPILED[key] = Compiled(text, spec, {name.removeprefix("exec-"): pod for name, pod in executors.items()})
        return COMPILED[key]

    return compile_


def containers(spec: Json) -> Json:
    executors = spec["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): executor["container"] for name, executor in executors.items()}


def tasks(spec: Json) -> Json:
    """All tasks that run something, wherever they lie."""
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    found = {name: task for dag in dags for name, task in dag["tasks"].items()}
    return {name: task for name, task in found.items() if f"exec-{name}" in spec["deploymentSpec"]["executors"]}


def env(container: Json) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


# Compiles both pipelines by the command line into two files; prints a hash, which depends on its seed, and what was
# imported.
CHILD = """
import sys
from pipelines.cli import main
for name in ("training", "stability"):
    try:
        main(["pipeline", "compile", "--pipeline", name, "--output", f"{name}.yaml", *sys.argv[1:]])
    except SystemExit as end:
        assert end.code == 0, end.code
print(hash("here"), "torch" in sys.modules)
"""


def test_another_process_compiles_the_same_bytes_and_needs_no_torch(compiled: Compile):
    words = ["train.seed=3", "cluster.nodes=2"]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, *words]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    for pipeline in STEPS:
        assert Path(f"{pipeline}.yaml").read_text() == compiled(*words, pipeline=pipeline).text
    other_hash, has_torch = done.stdout.split()[-2:]
    assert int(other_hash) != hash("here")
    assert has_torch == "False"


@pytest.mark.parametrize("pipeline", STEPS)
def test_kfp_reads_it_back(pipeline: str, compiled: Compile):
    from kfp.components import load_component_from_text

    component = load_component_from_text(compiled(pipeline=pipeline).text)
    assert component.pipeline_spec.pipeline_info.name == f"maskrcnn-{pipeline}"
    assert set(component.pipeline_spec.root.input_definitions.parameters) == {"params", "overrides"}


@pytest.mark.parametrize("pipeline", STEPS)
def test_every_step_runs_in_the_one_image_and_installs_nothing(pipeline: str, compiled: Compile):
    spec = compiled(pipeline=pipeline).spec
    assert set(containers(spec)) == STEPS[pipeline]
    for container in containers(spec).values():
        assert container["image"] == "registry/maskrcnn:1"
        assert "pip install" not in json.dumps(container["command"])


@pytest.mark.parametrize("pipeline", STEPS)
def test_nothing_is_cached_since_no_step_depends_on_its_arguments_alone(pipeline: str, compiled: Compile):
    spec = compiled(pipeline=pipeline).spec
    assert set(tasks(spec)) == STEPS[pipeline]
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks(spec).values())


@pytest.mark.parametrize("pipeline", STEPS)
def test_a_pod_that_is_lost_is_begun_again_but_that_of_the_exit_handler(pipeline: str, compiled: Compile):
    spec = compiled(pipeline=pipeline).spec
    retries = {name: task.get("retryPolicy", {}).get("maxRetryCount", 0) for name, task in tasks(spec).items()}
    assert retries.pop("finish") == 0
    assert retries.pop("download") == 3
    assert set(retries.values()) == {1}


@pytest.mark.parametrize("pipeline", STEPS)
def test_every_pod_has_volumes_labels_user_and_time_limit(pipeline: str, compiled: Compile):
    pods = compiled(
        'cluster.volumes=["d:/workspace/data", "r:/workspace/runs:ro"]',
        "cluster.run_timeout_s=400",
        "cluster.pending_timeout_s=100",
        "train.output_dir=data/runs",
        "stability.output_dir=data/study",
        pipeline=pipeline,
    ).pods
    assert set(pods) == STEPS[pipeline]
    for name, pod in pods.items():
        assert [(mount["constant"], mount["mountPath"]) for mount in pod["pvcMount"]] == [
            ("d", "/workspace/data"),
            ("r", "/workspace/runs"),
        ]
        assert pod["podMetadata"]["labels"] == {
            "app.kubernetes.io/name": "maskrcnn",
            "app.kubernetes.io/component": "launcher",
        }
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        # A queue may take the place of training's job any number of times.
        assert pod.get("activeDeadlineSeconds") == (None if name == "train" else "500")


def test_the_network_policies_know_the_labels_of_the_steps(compiled: Compile):
    policies = YAML(typ="safe").load_all((ROOT / "k8s" / "base" / "network.yaml").read_text())
    selected = {policy["metadata"]["name"]: policy["spec"]["podSelector"].get("matchLabels") for policy in policies}
    labels = compiled().pods["train"]["podMetadata"]["labels"].items()
    for name in ("launcher", "tracking"):
        assert selected[name].items() <= labels


def test_steps_that_compute_have_the_nodes_size_and_those_that_use_the_model_a_gpu(compiled: Compile):
    _, spec, pods = compiled(
        "cluster.cpu=6",
        "cluster.memory=20Gi",
        "cluster.shm=4Gi",
        "cluster.node_selector=[gpu=h100]",
        'cluster.tolerations=["nvidia.com/gpu:NoSchedule"]',
    )
    for name, container in containers(spec).items():
        light = name in ("train", "finish")
        resources = container["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == (
            ("1", "4Gi") if light else ("6", "20Gi")
        )
        reserved = ("100m", "1Gi") if light else ("6", "20Gi")  # a step that waits for its job leaves the cores to it
        assert (resources["resourceCpuRequest"], resources["resourceMemoryRequest"]) == reserved
        assert ("accelerator" in resources) == (name in ("evaluate", "predict", "benchmark"))
        assert ("nodeSelector" in pods[name]) == ("tolerations" in pods[name]) == (not light)
        shm = [mount["sizeLimit"] for mount in pods[name].get("emptyDirMounts", [])]
        assert shm == ([] if light else ["4Gi"])


def test_without_gpus_no_step_asks_for_one(compiled: Compile):
    spec = compiled("cluster.gpus_per_node=0").spec
    assert not any("accelerator" in container["resources"] for container in containers(spec).values())


def test_secrets_are_references_and_no_password_is_in_the_file(compiled: Compile):
    text, spec, pods = compiled(
        "tracking.uri=https://me:hunter2@mlflow.example",
        "cluster.secrets=[MLFLOW_TRACKING_PASSWORD=mlflow/password]",
        "cluster.image_pull_secret=registry",
    )
    assert "hunter2" not in text
    for container in containers(spec).values():
        assert "MLFLOW_TRACKING_PASSWORD" not in env(container)
        assert env(container)["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for pod in pods.values():
        (secret,) = pod["secretAsEnv"]
        assert secret["secretName"] == "mlflow"
        assert secret["keyToEnv"] == [{"secretKey": "password", "envVar": "MLFLOW_TRACKING_PASSWORD"}]
        assert pod["imagePullSecret"][0]["secretName"] == "registry"


def test_a_password_of_the_parameter_file_stays_out_too(params: Path, pipeline_command: Command):
    params.write_text(params.read_text() + "tracking: {uri: 'https://me:hunter2@mlflow.example'}\n")
    assert pipeline_command("compile", "--output", "pipeline.yaml") == 0
    assert "hunter2" not in Path("pipeline.yaml").read_text()


def test_a_run_may_change_params_and_overrides(params: Path, compiled: Compile):
    # cluster.context is one of a kubeconfig, which pods have not.
    spec = compiled("train.seed=7", "cluster.nodes=4", "cluster.context=laptop").spec
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["overrides"]["defaultValue"] == ["train.seed=7"]
    changed = parse_config(inputs["params"]["defaultValue"], ["train.seed=8"])
    assert changed == load_config(params, ["cluster.nodes=4", "train.seed=8", "tracking.uri=http://mlflow:5000"])


@pytest.mark.parametrize("pipeline", STEPS)
def test_both_parameters_reach_every_step(pipeline: str, compiled: Compile):
    spec = compiled(pipeline=pipeline).spec
    for name, task in tasks(spec).items():
        inputs = task["inputs"]["parameters"]
        for parameter in ("params", "overrides"):
            assert inputs[parameter]["componentInputParameter"].removeprefix("pipelinechannel--") == parameter, name


def test_the_steps_of_one_run_go_one_after_another(compiled: Compile):
    spec = compiled().spec
    order = ["download", "prepare", "train", "evaluate", "predict", "benchmark", "register"]
    for before, after in pairwise(order):
        assert before in tasks(spec)[after]["dependentTasks"]


@pytest.mark.parametrize("pipeline", ["training", "stability"])
def test_a_step_has_a_seed_of_its_own_in_a_study_alone(pipeline: str, compiled: Compile):
    spec = compiled(pipeline=pipeline).spec
    defaults = {
        name: inputs["seed"]["defaultValue"]
        for name, component in spec["components"].items()
        if "executorLabel" in component and "seed" in (inputs := component["inputDefinitions"].get("parameters", {}))
    }
    assert set(defaults) == {"comp-train", "comp-evaluate"}
    assert set(defaults.values()) == {-1}  # see kubeflow.context.configured
    given = {name for name, task in tasks(spec).items() if "seed" in task.get("inputs", {}).get("parameters", {})}
    assert given == (set() if pipeline == "training" else {"train", "evaluate"})


def test_the_exit_handler_runs_whatever_came_before(compiled: Compile):
    spec = compiled().spec
    finish = tasks(spec)["finish"]
    assert finish["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in finish["inputs"]["parameters"]["status"]


def test_as_many_seeds_run_at_a_time_as_configured(compiled: Compile):
    spec = compiled("stability.parallel=4", pipeline="stability").spec
    (loop,) = [
        task
        for c in spec["components"].values()
        if "dag" in c
        for task in c["dag"]["tasks"].values()
        if "parameterIterator" in task
    ]
    assert loop["iteratorPolicy"]["parallelismLimit"] == 4
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--seeds-Output"}


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("cluster.image=", "cluster.image"),
        ("data.raw_dir=/elsewhere", "data.raw_dir: must lie on a volume, got /elsewhere"),
        ("train.output_dir=/elsewhere", "train.output_dir: must lie on a volume"),
        ("train.batch_size=3", "train.batch_size"),
        ("data.base_url=http://me:pw@host", "data.base_url: must hold no password"),
        ("cluster.imag=x", "did you mean cluster.image?"),
    ],
)
def test_a_pipeline_that_could_not_run_is_not_compiled(
    word: str, reason: str, params: Path, pipeline_command: Command, capsys: Capture
):
    assert pipeline_command("compile", "--output", "pipeline.yaml", word) == 2
    assert reason in capsys.readouterr().err
    assert not Path("pipeline.yaml").exists()


def test_manifest_is_the_training_job_of_the_pipeline(params: Path, capsys: Capture):
    from components import pytorchjob

    main(["manifest", "--params", str(params)])
    printed = capsys.readouterr().out
    pytorchjob.main(["--params", str(params), "--dry-run", "--skip-test"])
    assert printed == capsys.readouterr().out
    assert "kind: PyTorchJob" in printed


@pytest.mark.parametrize("action", ["compile", "submit", "run-local", "manifest"])
def test_every_action_has_its_own_help(action: str, pipeline_command: Command, capsys: Capture):
    assert pipeline_command(action, "--help") == 0
    assert f"usage: maskrcnn pipeline {action}" in capsys.readouterr().out


def test_an_unknown_action_is_reported(pipeline_command: Command, capsys: Capture):
    assert pipeline_command("run") == 2
    assert "must be one of compile, submit, run-local, manifest" in capsys.readouterr().err
