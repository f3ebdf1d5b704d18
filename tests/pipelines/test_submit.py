"""`maskrcnn pipeline submit` against a server of Kubeflow Pipelines on loopback, with kfp's own client."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

Command = Callable[..., int | str | None]  # returns the exit status
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("params", "kfp")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, kfp: Any) -> None:
    """Time limits and pauses of parts of a second."""
    from pipelines import server, submit

    monkeypatch.setattr(server, "_TIMES_S", (1, 1))
    monkeypatch.setattr(server, "_PAUSE_S", 0.1)
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    monkeypatch.setattr(submit, "_PATIENCE_S", 0.5)


@pytest.fixture
def submit(kubeflow: Any, pipeline_command: Command) -> Command:
    """`maskrcnn pipeline submit` to the server of `kubeflow`."""
    return lambda *words: pipeline_command("submit", "--endpoint", kubeflow.url, *words)


def test_a_pipeline_is_uploaded_and_run_with_its_overrides(kubeflow: Any, submit: Command, capsys: Capture):
    assert submit("train.base_lr=0.01", "cluster.nodes=2", "tracking.experiment=mine") == 0
    assert [pipeline["display_name"] for pipeline in kubeflow.pipelines] == ["maskrcnn-training"]
    (run,) = kubeflow.runs
    assert run["display_name"] == "training demo"
    assert run["runtime_config"] == {"parameters": {"overrides": ["train.base_lr=0.01", "tracking.experiment=mine"]}}
    version = run["pipeline_version_reference"]
    assert version["pipeline_id"] == "p0"
    assert "nodes: 2" in kubeflow.texts[version["pipeline_version_id"]]  # of `cluster`, so in the version's `params`
    assert kubeflow.experiments == [{"display_name": "mine", "experiment_id": run["experiment_id"]}]
    output = capsys.readouterr().out
    assert f"{kubeflow.url}/#/runs/details/r0" in output
    assert "MLflow: experiment mine at http://mlflow:5000" in output


def test_the_steps_get_mlflows_experiment_of_the_environment(
    kubeflow: Any, submit: Command, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    assert submit() == 0
    assert "MLflow: experiment of id 7 at http://mlflow:5000" in capsys.readouterr().out
    text = kubeflow.texts[kubeflow.runs[0]["pipeline_version_reference"]["pipeline_version_id"]]
    executors = next(YAML(typ="safe").load_all(text))["deploymentSpec"]["executors"].values()
    variables = [{one["name"]: one["value"] for one in executor["container"]["env"]} for executor in executors]
    assert {env["MLFLOW_EXPERIMENT_ID"] for env in variables} == {"7"}


def test_a_pipeline_gets_a_version_only_where_it_is_new_or_has_changed(kubeflow: Any, submit: Command, capsys: Capture):
    submit()
    assert "pipeline maskrcnn-training is new" in capsys.readouterr().out
    submit("train.base_lr=0.01")
    first, same = kubeflow.runs
    assert first["pipeline_version_reference"] == same["pipeline_version_reference"]
    assert first["experiment_id"] == same["experiment_id"]
    assert len(kubeflow.versions) == 2  # the pipeline's first, which the server makes, and that of the digest
    assert "pipeline maskrcnn-training" not in capsys.readouterr().out

    submit("cluster.image=registry/maskrcnn:2")
    one, other = (kubeflow.runs[number]["pipeline_version_reference"] for number in (0, 2))
    assert one["pipeline_id"] == other["pipeline_id"]
    assert one["pipeline_version_id"] != other["pipeline_version_id"]
    assert "image: registry/maskrcnn:2" in kubeflow.texts[other["pipeline_version_id"]]
    assert "pipeline maskrcnn-training has changed" in capsys.readouterr().out

    submit("--pipeline", "stability")
    assert [pipeline["display_name"] for pipeline in kubeflow.pipelines] == ["maskrcnn-training", "maskrcnn-stability"]
    assert kubeflow.runs[3]["display_name"] == "stability study"


def test_namespace_experiment_and_account_are_passed_on(kubeflow: Any, submit: Command):
    kubeflow.namespaces = {"team"}
    words = ["--namespace", "team", "--experiment", "trial", "--service-account", "launcher", "cluster.namespace=team"]
    assert submit(*words) == 0
    assert kubeflow.experiments[0] == {"display_name": "trial", "namespace": "team", "experiment_id": "e0"}
    assert kubeflow.runs[0]["service_account"] == "launcher"
    namespaces = {
        query.get("namespace") for _, path, query in kubeflow.requests if path.endswith(("/pipelines", "/upload"))
    }
    assert namespaces == {"team"}


def test_a_missing_namespace_is_reported(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.namespaces = {"team"}
    assert submit("--namespace", "temp", "cluster.namespace=temp") == 2
    error = capsys.readouterr().err
    assert "404" in error
    assert "namespace not found" in error
    assert "--namespace must be there" in error


def test_steps_and_training_share_a_namespace(kubeflow: Any, submit: Command, capsys: Capture):
    assert submit("--namespace", "team") == 2
    assert "--namespace: must be cluster.namespace, maskrcnn, got team" in capsys.readouterr().err
    assert not kubeflow.requests


@pytest.mark.parametrize("way", ["variable", "file", "mounted"])
def test_the_token_comes_from_the_environment_or_a_file(
    kubeflow: Any, submit: Command, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    kubeflow.token = "s3cret"
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    words = ["--token-file", str(file)] if way == "file" else []
    if way == "variable":
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cret")
    if way == "mounted":
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert submit(*words) == 0
    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err
    assert all("s3cret" not in text for text in kubeflow.texts.values())


def ask(url: str, **options: Any) -> Any:
    """One question to a server, as `submit` asks it."""
    from pipelines.server import Server

    server = Server(url, options.pop("token_file", None), "", **options)
    return server.ask("look at the run", server.runs.run_service_get_run, "r0")


def refusal(url: str, **options: Any) -> str:
    from pipelines.server import PipelinesError

    with pytest.raises(PipelinesError) as error:
        ask(url, **options)
    return str(error.value)


def test_a_token_may_have_space_around_it_or_its_prefix(kubeflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kubeflow.token = "s3cret"
    file = tmp_path / "token"
    for text in ("s3cret\n", " s3cret\r\n", "\ufeffs3cret", "Bearer s3cret\n"):
        file.write_text(text)
        assert ask(kubeflow.url, token_file=file).run_id == "r0", text
        monkeypatch.setenv("KF_PIPELINES_TOKEN", text.removeprefix("\ufeff"))
        assert ask(kubeflow.url).run_id == "r0", text
        monkeypatch.delenv("KF_PIPELINES_TOKEN")


def test_what_is_no_token_is_refused_and_not_shown(kubeflow: Any, tmp_path: Path):
    file = tmp_path / "token"
    for data in (
        b"",
        b"\n",
        b"s3cret\ns3cond",
        b"s3cret s3cond",
        "s3cret\u00e9".encode(),
        b"s3cret\x00",
        b"s3cret\xff",
    ):
        file.write_bytes(data)
        error = refusal(kubeflow.url, token_file=file)
        assert error.startswith("--token-file or KF_PIPELINES_SA_TOKEN_PATH: "), error
        assert "s3c" not in error
    assert kubeflow.requests == []


def test_a_server_with_a_certificate_by_a_private_ca(
    secure_kubeflow: tuple[Any, Path], pipeline_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kubeflow, ca_file = secure_kubeflow
    error = refusal(kubeflow.url)
    assert error.startswith(f"{kubeflow.url}: look at the run: ")
    assert "name the file of the CA's certificate by --ca-file or SSL_CERT_FILE" in error
    assert kubeflow.requests == []

    assert pipeline_command("submit", "--endpoint", kubeflow.url, "--ca-file", str(ca_file)) == 0
    folder, empty = tmp_path / "authorities", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    (folder / "ca.crt").write_bytes("# größer\n".encode() + ca_file.read_bytes())  # no name that OpenSSL would look for
    (folder / "readme").write_bytes(b"\xff")
    (folder / "..data").symlink_to(empty)  # as Kubernetes mounts a secret
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        for path in (ca_file, folder) if variable != "SSL_CERT_DIR" else (folder, f"{empty}:{folder}"):
            monkeypatch.setenv(variable, str(path))
            assert ask(kubeflow.url).run_id == "r0", (variable, path)
        monkeypatch.setenv(variable, str(tmp_path / "absent"))
        assert ask(kubeflow.url, ca_file=ca_file).run_id == "r0", "the option goes first"
        assert refusal(kubeflow.url).startswith(f"{variable}: must be a file or folder of certificates in PEM format")
        monkeypatch.delenv(variable)

    (tmp_path / "text.pem").write_text("no certificate")
    for path in (tmp_path / "text.pem", tmp_path / "absent", empty):
        error = refusal(kubeflow.url, ca_file=path)
        assert f"--ca-file: must be a file or folder of certificates in PEM format, got {path}" in error


def test_a_proxy_of_the_environment_is_asked(kubeflow: Any, monkeypatch: pytest.MonkeyPatch):
    endpoint, proxy = "http://pipelines.invalid", kubeflow.url
    for url, words in (
        (proxy, None),
        (proxy.removeprefix("http://"), None),
        (proxy.replace("http://", "http://me:pa%20ss@"), "Basic bWU6cGEgc3M="),
    ):
        monkeypatch.setenv("HTTP_PROXY", url)
        assert ask(endpoint).run_id == "r0"
        assert kubeflow.headers[-1].get("Proxy-Authorization") == words
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
    assert "HTTPS_PROXY: must be the URL of an HTTP proxy, http(s)://…, got one of socks5" in refusal(endpoint)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask(kubeflow.url).run_id == "r0", "a forwarded port"
    monkeypatch.setenv("NO_PROXY", "pipelines.invalid")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    asked = len(kubeflow.requests)
    refusal(endpoint)
    assert len(kubeflow.requests) == asked


def test_a_ca_file_without_https_is_refused(kubeflow: Any, monkeypatch: pytest.MonkeyPatch):
    assert "--ca-file: must go with an endpoint of https" in refusal(kubeflow.url, ca_file=Path("ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", "absent")
    assert ask(kubeflow.url).run_id == "r0", "a setting of other programs"


def test_a_page_in_place_of_an_answer_is_reported(kubeflow: Any):
    pages = {
        b"<!doctype html><title>Log in</title>": "must answer with JSON, got a page that begins with '<!doctype html>",
        b"<title>502: caf\xe9</title>": "text that is not UTF-8",
        b"": "must answer with JSON, got a page that begins with ''",
    }
    for page, words in pages.items():
        kubeflow.faults = [("text/html", page)]
        error = refusal(kubeflow.url)
        assert error.startswith(f"{kubeflow.url}: ")
        assert words in error


def test_two_submits_at_a_time_share_what_the_first_makes(kubeflow: Any, submit: Command, capsys: Capture):
    def race(method: str, path: str) -> None:
        """Another submit, whose request arrives just before each of ours."""
        if method == "POST" and path == "/pipelines/upload":
            kubeflow.answer(method, path, {"name": "maskrcnn-training"}, "another text")
        elif method == "POST" and path == "/pipelines/upload_version":
            name = kubeflow.requests[-1][2]["name"]
            kubeflow.answer(method, path, {"name": name, "pipelineid": "p0"}, "the same text")
        elif method == "POST" and path == "/experiments":
            kubeflow.answer(method, path, {}, {"display_name": "maskrcnn"})

    kubeflow.before = race
    assert submit() == 0
    assert len(kubeflow.pipelines) == len(kubeflow.experiments) == len(kubeflow.runs) == 1
    assert len(kubeflow.versions) == 2
    assert kubeflow.runs[0]["pipeline_version_reference"]["pipeline_version_id"] == "v1"
    assert "pipeline maskrcnn-training" not in capsys.readouterr().out, "the other one says so"


def test_a_conflict_that_does_not_pass_is_reported(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.before = lambda method, path: (
        kubeflow.faults.append(409) if method == "GET" and not kubeflow.pipelines else None
    )
    assert submit() == 2
    assert f"{kubeflow.url}: upload the pipeline: 409" in capsys.readouterr().err


def test_a_token_that_is_renewed_while_waiting_is_taken(kubeflow: Any, submit: Command, tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("old")
    kubeflow.token = "old"
    look = kubeflow._look

    def renew(run_id: str) -> Any:
        kubeflow.token = "new"
        file.write_text("new")
        return look(run_id)

    kubeflow._look = renew
    assert submit("--token-file", str(file), "--wait") == 0


def test_a_missing_token_is_reported(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.token = "s3cret"
    assert submit() == 2
    error = capsys.readouterr().err
    assert "401" in error
    assert "give a token by KF_PIPELINES_TOKEN or --token-file" in error


def test_an_expired_token_is_reported_but_not_shown(
    kubeflow: Any, submit: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    kubeflow.token = "s3cret"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "stale-one")
    assert submit() == 2
    error = capsys.readouterr().err
    assert "is invalid or has expired" in error
    assert "stale-one" not in error


def test_an_absent_token_file_is_reported(submit: Command, capsys: Capture):
    assert submit("--token-file", "nowhere") == 2
    assert "--token-file or KF_PIPELINES_SA_TOKEN_PATH: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (403, "must have the right"),
        (404, "root of Kubeflow Pipelines"),
        (500, "500"),
        ("hang", "timed out"),
        ("cut", "is it up?"),
    ],
)
def test_a_refusal_or_silence_is_reported(
    kubeflow: Any, submit: Command, fault: int | str, reason: str, capsys: Capture
):
    kubeflow.faults = [fault]
    assert submit() == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.startswith(f"error: {kubeflow.url}: ")
    assert "find the pipeline" in error
    assert not kubeflow.runs


def test_a_run_is_not_requested_twice_when_the_answer_is_lost(kubeflow: Any, submit: Command):
    create = kubeflow.answer

    def lose(method: str, path: str, query: Any, body: Any) -> Any:
        status, content = create(method, path, query, body)
        return (503, {"message": "overloaded"}) if (method, path) == ("POST", "/runs") else (status, content)

    kubeflow.answer = lose
    assert submit() == 2
    assert len(kubeflow.runs) == 1


def test_a_server_that_is_away_is_reported(pipeline_command: Command, capsys: Capture):
    with socket.socket() as free:  # bound until the end, so that nobody else listens there
        free.bind(("127.0.0.1", 0))
        assert pipeline_command("submit", "--endpoint", f"http://127.0.0.1:{free.getsockname()[1]}") == 2
    error = capsys.readouterr().err
    assert "Connection refused" in error
    assert "is it up?" in error


def test_endpoint_and_links_are_taken_from_the_environment(
    kubeflow: Any, pipeline_command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url + "/")
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example/pipeline/")
    assert pipeline_command("submit") == 0
    assert "run: https://kubeflow.example/pipeline/#/runs/details/r0" in capsys.readouterr().out


def test_a_missing_endpoint_is_reported(pipeline_command: Command, capsys: Capture):
    assert pipeline_command("submit") == 2
    assert "port-forward" in capsys.readouterr().err


def task(name: str, state: str | None, number: int = 0) -> dict[str, Any]:
    return {"task_id": f"{name} {number}", "display_name": name, "state": state, "start_time": None}


def node(number: int, name: str, kind: str, phase: str, boundary: int = 0, message: str = "") -> dict[str, Any]:
    """One node of a workflow, as Argo Workflows 4.0 writes it."""
    facts = {"id": f"wf-{number}", "displayName": name, "type": kind, "phase": phase, "templateName": "impl"}
    return facts | {"boundaryID": f"wf-{boundary}"} | ({"message": message} if message else {})


# A step whose pod failed: its retry and executor, each with its tries.
FAILED_STEP = [
    node(1, "train", "Retry", "Failed"),
    node(2, "train(0)", "DAG", "Failed"),
    node(3, "executor", "Retry", "Failed", 2),
    node(4, "executor(0)", "Pod", "Failed", 2, "main: Error (exit code 2)"),
    node(5, "evaluate", "Skipped", "Omitted", message="omitted: depends condition not met"),
]


def test_waiting_reports_each_change_of_a_step_once_and_nothing_of_the_engine(
    kubeflow: Any, submit: Command, capsys: Capture
):
    kubeflow.tasks = [
        task("maskrcnn-training-x7k2p", "RUNNING"),
        task("root-driver(0)", "SUCCEEDED"),
        task("train-driver", "SUCCEEDED"),
        task("train", "RUNNING"),
        task("train(0)", "RUNNING"),
        task("executor(0)", "PENDING"),
        task("evaluate", None),
    ]
    assert submit("--wait") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["train: RUNNING", "the run has ended: SUCCEEDED"]


def test_steps_of_several_seeds_are_numbered(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.tasks = [task("train", "SUCCEEDED", 0), task("train", "RUNNING", 1)]
    assert submit("--wait", "--pipeline", "stability") == 0
    assert "\ntrain: SUCCEEDED\ntrain 2: RUNNING\n" in capsys.readouterr().out


def test_the_reason_why_a_step_waits_is_reported_once(
    kubeflow: Any, submit: Command, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    from pipelines import progress

    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    kubeflow.states = ["RUNNING"] * 4 + ["SUCCEEDED"]
    kubeflow.tasks = [task("train-driver(0)", "PENDING")]
    kubeflow.nodes = [
        node(1, "train-driver(0)", "Pod", "Pending", 0, "Unschedulable: 1 Insufficient cpu."),
        node(2, "evaluate-driver(0)", "Pod", "Pending", 0, "PodInitializing"),
    ]
    assert submit("--wait") == 0
    output = capsys.readouterr().out
    assert output.count("train waits: Unschedulable: 1 Insufficient cpu.") == 1
    assert "evaluate waits" not in output


@pytest.mark.parametrize(
    ("state", "is_ui"), [("FAILED", False), ("FAILED", True), ("CANCELED", False), ("SKIPPED", False)]
)
def test_the_status_is_1_when_the_run_did_not_succeed(
    kubeflow: Any, submit: Command, state: str, is_ui: bool, capsys: Capture
):
    kubeflow.states, kubeflow.is_ui = ["RUNNING", state], is_ui
    kubeflow.nodes = FAILED_STEP
    noise = ["I1129 11:22:59.091520      17 launcher_v2.go:800] noise", "[KFP Executor 2026-11-29 INFO]: noise"]
    noise += ["{", '    "noise": {', "    ]", "}"]
    log = [*(f"line {number}" for number in range(28)), *noise, '  File "a.py"', "[PyTorchJob] job created"]
    kubeflow.logs["wf-impl-4"] = "\n".join([*log, "error: out of memory", 'time=2026 level=INFO msg="exited"'])
    assert submit("--wait") == 1
    output = capsys.readouterr().out
    assert f"the run has ended: {state}\ntrain failed: main: Error (exit code 2)\n" in output
    end = ["line 27", '  File "a.py"', "[PyTorchJob] job created", "error: out of memory"]
    assert "".join(f"\n  {line}" for line in end) + "\nlogs: " in output
    assert "  line 10\n" not in output
    assert "noise" not in output
    assert f"{kubeflow.url}/#/runs/details/r0" in output


def test_a_cancelled_run_is_reported_as_such(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.states, kubeflow.was_cancelled = ["RUNNING", "FAILED"], True
    kubeflow.nodes = [node(1, "executor(0)", "Pod", "Failed", 0, "Step exceeded its deadline")]
    assert submit("--wait") == 1
    assert "the run has ended: FAILED (it was cancelled)\nexecutor(0) failed: Step exc" in capsys.readouterr().out


@pytest.mark.parametrize("has_nodes", [True, False])
def test_a_failure_is_reported_without_what_the_server_does_not_serve(
    kubeflow: Any, submit: Command, capsys: Capture, has_nodes: bool
):
    kubeflow.states = ["FAILED"]
    kubeflow.nodes = FAILED_STEP if has_nodes else []
    assert submit("--wait") == 1
    failed = "train failed: main: Error (exit code 2)\n" if has_nodes else ""
    assert f"the run has ended: FAILED\n{failed}logs: " in capsys.readouterr().out


def test_waiting_has_its_own_time_limit(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow.states = ["RUNNING"]
    assert submit("--wait", "--timeout", "0.1") == 2
    assert "did not end within --timeout 0.1 s and is RUNNING; it continues" in capsys.readouterr().err


def test_waiting_outlives_failures_of_the_server(kubeflow: Any, submit: Command, monkeypatch: pytest.MonkeyPatch):
    from pipelines import submit as module

    monkeypatch.setattr(module, "_PATIENCE_S", 60.0)
    look, seen = kubeflow._look, []

    def stumble(run_id: str) -> Any:
        seen.append(run_id)
        return (503, {"message": "restarting"}) if len(seen) in (2, 3) else look(run_id)

    kubeflow._look = stumble
    assert submit("--wait") == 0
    assert len(seen) == 5


def test_waiting_does_not_outlive_a_server_that_stays_away(kubeflow: Any, submit: Command, capsys: Capture):
    kubeflow._look = lambda _: (500, {"message": "broken"})
    assert submit("--wait") == 2
    assert "look at the run" in capsys.readouterr().err


def test_an_impossible_configuration_is_reported_before_anything_is_sent(
    kubeflow: Any, submit: Command, capsys: Capture
):
    assert submit("cluster.image=") == 2
    assert "cluster.image" in capsys.readouterr().err
    assert not kubeflow.requests


def test_a_time_limit_without_waiting_is_refused(kubeflow: Any, submit: Command, capsys: Capture):
    assert submit("--timeout", "60") == 2
    assert "--timeout: must go with --wait" in capsys.readouterr().err
    for value in ("-1", "nan", "inf", "soon"):
        assert submit("--wait", f"--timeout={value}") == 2
        assert f"--timeout: must be 0 or more seconds, got {value}" in capsys.readouterr().err
    assert kubeflow.runs == []
