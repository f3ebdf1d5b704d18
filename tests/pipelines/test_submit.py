"""`maskrcnn pipeline submit` against a server of Kubeflow Pipelines on loopback, with kfp's own client."""

import socket
from pathlib import Path
from typing import Any

import pytest

from pipelines.pipeline import main

pytestmark = pytest.mark.usefixtures("params", "kfp")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, kfp: Any) -> None:
    """Time limits of parts of a second."""
    from pipelines import server, submit

    monkeypatch.setattr(server, "_TIMES_S", (1, 1))
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    monkeypatch.setattr(submit, "_PATIENCE_S", 1.0)


def submit(kubeflow: Any, *words: str) -> int | str | None:
    """The status that the command ends with."""
    with pytest.raises(SystemExit) as exit_:
        main(["submit", "--endpoint", kubeflow.url, *words])
    return exit_.value.code


def test_a_pipeline_is_uploaded_and_run_with_its_overrides(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    assert submit(kubeflow, "train.base_lr=0.01", "cluster.nodes=2", "tracking.experiment=mine") == 0
    assert [pipeline["display_name"] for pipeline in kubeflow.pipelines] == ["maskrcnn-training"]
    (run,) = kubeflow.runs
    assert run["display_name"] == "training demo"
    assert run["runtime_config"] == {"parameters": {"overrides": ["train.base_lr=0.01", "tracking.experiment=mine"]}}
    version = run["pipeline_version_reference"]
    assert version["pipeline_id"] == "p0"
    assert "nodes: 2" in kubeflow.texts[version["pipeline_version_id"]]  # of `cluster`, so in the version's `params`
    assert kubeflow.experiments == [{"display_name": "mine", "experiment_id": run["experiment_id"]}]
    told = capsys.readouterr().out
    assert f"{kubeflow.url}/#/runs/details/r0" in told
    assert "MLflow: experiment mine at http://mlflow:5000" in told


def test_the_same_again_is_the_same_version_and_experiment(kubeflow: Any):
    submit(kubeflow)
    submit(kubeflow, "train.base_lr=0.01")
    one, other = kubeflow.runs
    assert one["pipeline_version_reference"] == other["pipeline_version_reference"]
    assert one["experiment_id"] == other["experiment_id"]
    assert len(kubeflow.versions) == 2  # the pipeline's first, which the server makes, and that of the digest


def test_a_pipeline_that_has_changed_gets_a_new_version(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    submit(kubeflow)
    submit(kubeflow, "cluster.image=registry/maskrcnn:2")
    one, other = (run["pipeline_version_reference"] for run in kubeflow.runs)
    assert one["pipeline_id"] == other["pipeline_id"]
    assert one["pipeline_version_id"] != other["pipeline_version_id"]
    assert "image: registry/maskrcnn:2" in kubeflow.texts[other["pipeline_version_id"]]
    told = capsys.readouterr().out
    assert "pipeline maskrcnn-training is new" in told
    assert "pipeline maskrcnn-training has changed" in told


def test_the_stability_pipeline_is_another_pipeline(kubeflow: Any):
    submit(kubeflow)
    submit(kubeflow, "--pipeline", "stability")
    assert [pipeline["display_name"] for pipeline in kubeflow.pipelines] == ["maskrcnn-training", "maskrcnn-stability"]
    assert kubeflow.runs[1]["display_name"] == "stability study"


def test_namespace_experiment_and_account_are_passed_on(kubeflow: Any):
    kubeflow.namespaces = {"team"}
    assert (
        submit(
            kubeflow,
            "--namespace",
            "team",
            "cluster.namespace=team",
            "--experiment",
            "trial",
            "--service-account",
            "launcher",
        )
        == 0
    )
    assert kubeflow.experiments[0] == {"display_name": "trial", "namespace": "team", "experiment_id": "e0"}
    assert kubeflow.runs[0]["service_account"] == "launcher"
    namespaces = {
        query.get("namespace") for _, path, query in kubeflow.requests if path.endswith(("/pipelines", "/upload"))
    }
    assert namespaces == {"team"}


def test_a_missing_namespace_is_told(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    kubeflow.namespaces = {"team"}
    assert submit(kubeflow, "--namespace", "temp", "cluster.namespace=temp") == 2
    assert "404" in (told := capsys.readouterr().err)
    assert "namespace not found" in told
    assert "--namespace must be there" in told


def test_steps_and_training_share_a_namespace(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    assert submit(kubeflow, "--namespace", "team") == 2
    assert "--namespace: must be cluster.namespace, maskrcnn, got team" in capsys.readouterr().err
    assert not kubeflow.requests


@pytest.mark.parametrize("way", ["variable", "file", "mounted"])
def test_the_token_comes_from_the_environment_or_a_file(
    kubeflow: Any, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kubeflow.token = "s3cret"
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    words = ["--token-file", str(file)] if way == "file" else []
    if way == "variable":
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cret")
    if way == "mounted":
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert submit(kubeflow, *words) == 0
    told = capsys.readouterr()
    assert "s3cret" not in told.out + told.err
    assert all("s3cret" not in text for text in kubeflow.texts.values())


def test_a_token_that_is_renewed_while_waiting_is_taken(kubeflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "token"
    file.write_text("old")
    kubeflow.token = "old"
    look = kubeflow._look

    def renew(run_id: str) -> Any:
        kubeflow.token = "new"
        file.write_text("new")
        return look(run_id)

    kubeflow._look = renew
    assert submit(kubeflow, "--token-file", str(file), "--wait") == 0


def test_no_token_is_told(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    kubeflow.token = "s3cret"
    assert submit(kubeflow) == 2
    told = capsys.readouterr().err
    assert "401" in told
    assert "give a token by KF_PIPELINES_TOKEN or --token-file" in told


def test_a_token_that_is_over_is_told_but_not_shown(
    kubeflow: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kubeflow.token = "s3cret"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale-one")
    assert submit(kubeflow) == 2
    told = capsys.readouterr().err
    assert "must be valid still" in told
    assert "stale-one" not in told


def test_a_token_file_that_is_absent_is_told(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    assert submit(kubeflow, "--token-file", "nowhere") == 2
    assert "--token-file or KF_PIPELINES_SA_TOKEN_PATH: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (403, "must have the right"),
        (404, "root of Kubeflow Pipelines"),
        (500, "500"),
        ("hang", "timed out"),
        ("cut", "is it up?"),
    ],
)
def test_a_refusal_or_silence_is_told(kubeflow: Any, fault: int | str, told: str, capsys: pytest.CaptureFixture[str]):
    kubeflow.faults = [fault]
    assert submit(kubeflow) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.startswith(f"error: {kubeflow.url}: ")
    assert "find the pipeline" in message
    assert not kubeflow.runs


def test_a_run_is_not_asked_for_twice_when_the_answer_is_lost(kubeflow: Any):
    create = kubeflow.answer

    def lose(method: str, path: str, query: Any, body: Any) -> Any:
        status, content = create(method, path, query, body)
        return (503, {"message": "overloaded"}) if (method, path) == ("POST", "/runs") else (status, content)

    kubeflow.answer = lose
    assert submit(kubeflow) == 2
    assert len(kubeflow.runs) == 1


def test_a_server_that_is_away_is_told(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(SystemExit) as exit_:
        main(["submit", "--endpoint", url])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "Connection refused" in told
    assert "is it up?" in told


def test_the_endpoint_is_taken_from_the_environment(kubeflow: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url + "/")
    with pytest.raises(SystemExit) as exit_:
        main(["submit"])
    assert exit_.value.code == 0


def test_no_endpoint_is_told(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["submit"])
    assert exit_.value.code == 2
    assert "port-forward" in capsys.readouterr().err


def test_waiting_tells_what_becomes_of_the_steps(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    kubeflow.tasks = [{"task_id": "t", "display_name": "train", "state": "RUNNING"}]
    assert submit(kubeflow, "--wait") == 0
    told = capsys.readouterr().out
    assert told.count("train: RUNNING") == 1
    assert "the run has ended: SUCCEEDED" in told


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_the_status_is_1_when_the_run_did_not_succeed(kubeflow: Any, state: str, capsys: pytest.CaptureFixture[str]):
    kubeflow.states = ["RUNNING", state]
    kubeflow.tasks = [
        {"task_id": "t", "display_name": "train", "state": "FAILED", "error": {"message": "out of memory"}}
    ]
    assert submit(kubeflow, "--wait") == 1
    told = capsys.readouterr().out
    assert f"the run has ended: {state}" in told
    assert "train failed: out of memory" in told
    assert f"{kubeflow.url}/#/runs/details/r0" in told


def test_waiting_has_its_own_time_limit(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    kubeflow.states = ["RUNNING"]
    assert submit(kubeflow, "--wait", "--timeout", "0.1") == 2
    assert "must end in --timeout 0.1 s, is RUNNING still; it goes on" in capsys.readouterr().err


def test_waiting_outlives_a_server_that_is_in_trouble_for_a_while(kubeflow: Any, monkeypatch: pytest.MonkeyPatch):
    from pipelines import server

    monkeypatch.setattr(server.time, "sleep", lambda _: None)
    look, seen = kubeflow._look, []

    def stumble(run_id: str) -> Any:
        seen.append(run_id)
        return (503, {"message": "restarting"}) if len(seen) in (2, 3) else look(run_id)

    kubeflow._look = stumble
    assert submit(kubeflow, "--wait") == 0
    assert len(seen) == 5


def test_waiting_does_not_outlive_a_server_that_stays_away(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    kubeflow._look = lambda _: (500, {"message": "broken"})
    assert submit(kubeflow, "--wait") == 2
    assert "look at the run" in capsys.readouterr().err


def test_what_could_not_run_is_told_before_anything_is_sent(kubeflow: Any, capsys: pytest.CaptureFixture[str]):
    assert submit(kubeflow, "cluster.image=") == 2
    assert "cluster.image" in capsys.readouterr().err
    assert not kubeflow.requests
