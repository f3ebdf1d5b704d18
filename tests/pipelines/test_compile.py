"""What `maskrcnn pipeline compile` writes: what a pod is made of, what a run may change, and nothing secret."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from components.params import load_config, parse_config
from pipelines.pipeline import main

Json = dict[str, Any]
STEPS = {
    "training": {"download", "prepare", "train", "evaluate", "predict", "benchmark", "register", "finish"},
    "stability": {"download", "prepare", "seeds", "train", "evaluate", "summarise", "finish"},
}
COMPILED: dict[tuple[str, tuple[str, ...]], str] = {}
pytestmark = pytest.mark.usefixtures("kfp")


def compile_(params: Path, *words: str, pipeline: str = "training") -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["compile", "--pipeline", pipeline, "--params", str(params), "--output", "out/pipeline.yaml", *words])
    assert exit_.value.code == 0
    return Path("out/pipeline.yaml").read_text()


def documents(params: Path, *words: str, pipeline: str = "training") -> tuple[Json, Json]:
    """The pipeline, and what it says of Kubernetes: by step. Compiled once for the same words."""
    key = (pipeline, words)
    if key not in COMPILED:
        COMPILED[key] = compile_(params, *words, pipeline=pipeline)
    spec, platform = YAML(typ="safe").load_all(COMPILED[key])
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return spec, {name.removeprefix("exec-"): executor for name, executor in executors.items()}


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


@pytest.mark.parametrize("pipeline", STEPS)
def test_the_same_bytes_come_from_any_process(pipeline: str, params: Path):
    here = compile_(params, "train.seed=3", "cluster.nodes=2", pipeline=pipeline)
    words = [
        "compile",
        "--pipeline",
        pipeline,
        "--params",
        str(params),
        "--output",
        "there.yaml",
        "train.seed=3",
        "cluster.nodes=2",
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.cli", "pipeline", *words]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert Path("there.yaml").read_text() == here
    assert hash("here") != int(subprocess.check_output([sys.executable, "-c", "print(hash('here'))"], env=environment))


@pytest.mark.parametrize("pipeline", STEPS)
def test_kfp_reads_it_back(pipeline: str, params: Path):
    from kfp.components import load_component_from_text

    text = compile_(params, pipeline=pipeline)
    component = load_component_from_text(text)
    assert component.pipeline_spec.pipeline_info.name == f"maskrcnn-{pipeline}"
    assert set(component.pipeline_spec.root.input_definitions.parameters) == {"params", "overrides"}


@pytest.mark.parametrize("pipeline", STEPS)
def test_every_step_runs_in_the_one_image_and_installs_nothing(pipeline: str, params: Path):
    spec, _ = documents(params, pipeline=pipeline)
    assert set(containers(spec)) == STEPS[pipeline]
    for container in containers(spec).values():
        assert container["image"] == "registry/maskrcnn:1"
        assert "pip install" not in json.dumps(container["command"])


@pytest.mark.parametrize("pipeline", STEPS)
def test_nothing_is_cached_since_no_step_depends_on_its_arguments_alone(pipeline: str, params: Path):
    spec, _ = documents(params, pipeline=pipeline)
    assert set(tasks(spec)) == STEPS[pipeline]
    assert not any(task.get("cachingOptions", {}).get("enableCache") for task in tasks(spec).values())


@pytest.mark.parametrize("pipeline", STEPS)
def test_a_pod_that_is_lost_is_begun_again_but_that_of_the_exit_handler(pipeline: str, params: Path):
    spec, _ = documents(params, pipeline=pipeline)
    retries = {name: task.get("retryPolicy", {}).get("maxRetryCount", 0) for name, task in tasks(spec).items()}
    assert retries.pop("finish") == 0
    assert retries.pop("download") == 3
    assert set(retries.values()) == {1}


@pytest.mark.parametrize("pipeline", STEPS)
def test_every_pod_has_volumes_labels_user_and_time_limit(pipeline: str, params: Path):
    _, pods = documents(params, 'cluster.volumes=["d:/workspace/data", "r:/workspace/runs:ro"]', "cluster.run_timeout_s=400", "cluster.pending_timeout_s=100", "train.output_dir=data/runs", "stability.output_dir=data/study", pipeline=pipeline)  # fmt: skip
    assert set(pods) == STEPS[pipeline]
    for pod in pods.values():
        assert [(mount["constant"], mount["mountPath"]) for mount in pod["pvcMount"]] == [
            ("d", "/workspace/data"),
            ("r", "/workspace/runs"),
        ]
        assert pod["podMetadata"]["labels"] == {
            "app.kubernetes.io/name": "maskrcnn",
            "app.kubernetes.io/component": "launcher",
        }
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert pod["activeDeadlineSeconds"] == "500"


def test_the_network_policies_know_the_labels_of_the_steps(params: Path):
    policies = list(
        YAML(typ="safe").load_all((Path(__file__).parents[2] / "k8s" / "base" / "network.yaml").read_text())
    )
    selected = {policy["metadata"]["name"]: policy["spec"]["podSelector"].get("matchLabels") for policy in policies}
    labels = documents(params)[1]["train"]["podMetadata"]["labels"].items()
    for name in ("launcher", "tracking"):
        assert selected[name].items() <= labels


def test_steps_that_compute_have_the_nodes_size_and_those_that_use_the_model_a_gpu(params: Path):
    spec, pods = documents(params, "cluster.cpu=6", "cluster.memory=20Gi", "cluster.shm=4Gi", "cluster.node_selector=[gpu=h100]", 'cluster.tolerations=["nvidia.com/gpu:NoSchedule"]')  # fmt: skip
    for name, container in containers(spec).items():
        light = name in ("train", "finish")
        resources = container["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == (
            ("1", "4Gi") if light else ("6", "20Gi")
        )
        assert ("accelerator" in resources) == (name in ("evaluate", "predict", "benchmark"))
        assert ("nodeSelector" in pods[name]) == ("tolerations" in pods[name]) == (not light)
        shm = [mount["sizeLimit"] for mount in pods[name].get("emptyDirMounts", [])]
        assert shm == ([] if light else ["4Gi"])


def test_without_gpus_no_step_asks_for_one(params: Path):
    spec, _ = documents(params, "cluster.gpus_per_node=0")
    assert not any("accelerator" in container["resources"] for container in containers(spec).values())


def test_secrets_are_references_and_no_password_is_in_the_file(params: Path):
    text = compile_(params, "tracking.uri=https://me:hunter2@mlflow.example", "cluster.secrets=[MLFLOW_TRACKING_PASSWORD=mlflow/password]", "cluster.image_pull_secret=registry")  # fmt: skip
    assert "hunter2" not in text
    spec, platform = YAML(typ="safe").load_all(text)
    for container in containers(spec).values():
        assert "MLFLOW_TRACKING_PASSWORD" not in env(container)
        assert env(container)["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        (secret,) = pod["secretAsEnv"]
        assert secret["secretName"] == "mlflow"
        assert secret["keyToEnv"] == [{"secretKey": "password", "envVar": "MLFLOW_TRACKING_PASSWORD"}]
        assert pod["imagePullSecret"][0]["secretName"] == "registry"


def test_a_password_of_the_parameter_file_stays_out_too(params: Path):
    params.write_text(params.read_text() + "tracking: {uri: 'https://me:hunter2@mlflow.example'}\n")
    assert "hunter2" not in compile_(params)


def test_a_run_may_change_params_and_overrides(params: Path):
    spec, _ = documents(
        params, "train.seed=7", "cluster.nodes=4", "cluster.context=laptop"
    )  # of a kubeconfig, not the pods'
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["overrides"]["defaultValue"] == ["train.seed=7"]
    told = parse_config(inputs["params"]["defaultValue"], ["train.seed=8"])
    wanted = load_config(params, ["cluster.nodes=4", "train.seed=8", "tracking.uri=http://mlflow:5000"])
    assert told == wanted


@pytest.mark.parametrize("pipeline", STEPS)
def test_both_parameters_reach_every_step(pipeline: str, params: Path):
    spec, _ = documents(params, pipeline=pipeline)
    for name, task in tasks(spec).items():
        inputs = task["inputs"]["parameters"]
        for parameter in ("params", "overrides"):
            assert inputs[parameter]["componentInputParameter"].removeprefix("pipelinechannel--") == parameter, name


def test_the_steps_of_one_run_go_one_after_another(params: Path):
    spec, _ = documents(params)
    order = ["download", "prepare", "train", "evaluate", "predict", "benchmark", "register"]
    for before, after in pairwise(order):
        assert before in tasks(spec)[after]["dependentTasks"]


def test_the_exit_handler_runs_whatever_came_before(params: Path):
    spec, _ = documents(params)
    finish = tasks(spec)["finish"]
    assert finish["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in finish["inputs"]["parameters"]["status"]


def test_seeds_run_as_many_at_a_time_as_told(params: Path):
    spec, _ = documents(params, "stability.parallel=4", pipeline="stability")
    (loop,) = [task for c in spec["components"].values() if "dag" in c for task in c["dag"]["tasks"].values() if "parameterIterator" in task]  # fmt: skip
    assert loop["iteratorPolicy"]["parallelismLimit"] == 4
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--seeds-Output"}


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("cluster.image=", "cluster.image"),
        ("data.raw_dir=/elsewhere", "data.raw_dir: must lie on a volume, got /elsewhere"),
        ("train.output_dir=/elsewhere", "train.output_dir: must lie on a volume"),
        ("train.batch_size=3", "train.batch_size"),
        ("data.base_url=http://me:pw@host", "data.base_url: must hold no password"),
        ("cluster.imag=x", "did you mean cluster.image?"),
    ],
)
def test_what_could_not_run_is_not_compiled(word: str, told: str, params: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["compile", "--params", str(params), "--output", "pipeline.yaml", word])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
    assert not Path("pipeline.yaml").exists()


def test_manifest_is_the_training_job_of_the_pipeline(params: Path, capsys: pytest.CaptureFixture[str]):
    from components import pytorchjob

    main(["manifest", "--params", str(params)])
    printed = capsys.readouterr().out
    pytorchjob.main(["--params", str(params), "--dry-run", "--skip-test"])
    assert printed == capsys.readouterr().out
    assert "kind: PyTorchJob" in printed


@pytest.mark.parametrize("action", ["compile", "submit", "run-local", "manifest"])
def test_every_action_has_its_own_help(action: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main([action, "--help"])
    assert exit_.value.code == 0
    assert f"usage: maskrcnn pipeline {action}" in capsys.readouterr().out


def test_an_unknown_action_is_told(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["run"])
    assert exit_.value.code == 2
    assert "must be one of compile, submit, run-local, manifest" in capsys.readouterr().err
