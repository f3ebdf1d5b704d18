"""The register stage against a real MLflow database; what it registered is loaded and served by processes that know
nothing of us.
"""

import ast
import base64
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model
from ruamel.yaml import YAML

from components import download, evaluate, predict, prepare, register
from components.config import Config
from components.inference.networks import load_network
from components.params import load_config
from components.register import RegisterResult
from components.tracking.client import TrackingError
from components.tracking.registry import CHAMPION, REQUIREMENTS, Version
from components.tracking.scores import Scored, beats
from model.data.index import CocoIndex
from model.engine.checkpoint import save_checkpoint
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN

TINY = Path(__file__).with_name("tiny.yaml")
START_S = 120


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An untrained network with its evaluation, as a run that no MLflow knows yet. Unsure heads:
    everything is written.
    """
    root = tmp_path_factory.mktemp("register")
    config = load_config(
        TINY,
        [
            "data.source=shapes",
            f"data.raw_dir={root}/raw",
            f"data.prepared_dir={root}/prepared",
            f"train.output_dir={root}/run",
            "train.device=cpu",
            "model.score_threshold=0.01",
            "predict.score_threshold=0.0",
        ],
    )
    download.run(config)
    prepare.run(config)
    index = CocoIndex.open(config.data.prepared_dir, "train")
    torch.manual_seed(0)
    state = {
        "model": MaskRCNN(config.model, len(index.class_names)).state_dict(),
        "optimizer": {"state": torch.zeros(1_000_000)},  # which using a model does not need
        "config": config.model_dump(mode="json"),
        "class_names": list(index.class_names),
        "category_ids": list(index.category_ids),
        "data_hash": index.data_hash,
    }
    save_checkpoint(config.train.output_dir, 7, state)
    evaluate.run(config)
    return config


@pytest.fixture
def config(evaluated: Config, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """That run alone in a folder, with a database of its own."""
    return alone_in(tmp_path, evaluated, empty_database, monkeypatch)


@pytest.fixture(scope="module")
def registered(
    evaluated: Config, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, RegisterResult]:
    """The run of another folder and database, registered. Only to be read."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = alone_in(tmp_path_factory.mktemp("registered"), evaluated, empty_database, monkeypatch)
        return config, register.run(config)


def alone_in(folder: Path, evaluated: Config, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(evaluated.train.output_dir, folder / "run")
    shutil.copy(empty_database, folder)
    return with_values(evaluated, f"sqlite:///{folder}/mlflow.db", train={"output_dir": folder / "run"})


def with_values(config: Config, uri: str = "", **sections: dict[str, Any]) -> Config:
    if uri:
        sections["tracking"] = {"enabled": True, "uri": uri}
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def rescored(config: Config, **changes: Any) -> Config:
    """The same run as if its evaluation had come out otherwise: mask and box AP, data_hash."""
    path = config.train.output_dir / "evaluation.json"
    document = json.loads(path.read_text())
    for task in ("bbox", "segm"):
        document[task]["AP"] = changes.get(task, document[task]["AP"])
    document["data_hash"] = changes.get("data_hash", document["data_hash"])
    path.write_text(json.dumps(document))
    return config


def another_run(config: Config, name: str) -> Config:
    """A copy of a run under another name, which MLflow does not know."""
    folder = config.train.output_dir.with_name(name)
    shutil.copytree(config.train.output_dir, folder, ignore=shutil.ignore_patterns("mlflow_run.json"))
    return with_values(config, train={"output_dir": folder})


def versions(config: Config) -> list[str]:
    client = MlflowClient(tracking_uri=config.tracking.uri)
    return [str(found.version) for found in client.search_model_versions("name = 'maskrcnn'")]


def champion(config: Config) -> str:
    client = MlflowClient(tracking_uri=config.tracking.uri)
    return str(client.get_model_version_by_alias("maskrcnn", CHAMPION).version)


def predicted(config: Config, images: list[Path], output: Path) -> list[dict[str, Any]]:
    """What `maskrcnn predict` writes of images, less its paths."""
    predict.run(config, images, output=output)
    entries = json.loads((output / "predictions.json").read_text())["images"]
    return [{"size": entry["size"], "detections": entry["detections"]} for entry in entries]


def val_images(config: Config) -> list[Path]:
    index = CocoIndex.open(config.data.prepared_dir, "val")
    return [index.image_path(i) for i in range(len(index))]


def strange_environment(uri: str) -> dict[str, str]:
    """Of a process that finds the packages, but not this repository."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": uri}


LOADED = """
import base64, json, sys
from pathlib import Path
import mlflow
from mlflow.pyfunc.scoring_server import invocations
served = mlflow.pyfunc.load_model(sys.argv[1])
found = served.predict([Path(name).read_bytes() for name in sys.argv[2:]])
import cuda_ops.library, model.inference.predictor
assert "components" not in sys.modules
alone = served.predict([Path(sys.argv[2]).read_bytes()])
url = "data:image/png;base64," + base64.b64encode(Path(sys.argv[2]).read_bytes()).decode()
schema = served.metadata.get_input_schema()
ask = lambda **body: invocations(json.dumps(body), "application/json", served, schema).response
for body in ({"inputs": [url]}, {"dataframe_split": {"data": [[url]]}}, {"dataframe_records": [{"image": url}]}):
    assert json.loads(ask(**body))["predictions"] == alone, sorted(body)
for threshold in (7, float("nan"), "0.5", True):
    try:
        assert not ask(inputs=[url], params={"score_threshold": threshold}), threshold
    except mlflow.MlflowException as error:
        assert error.get_http_status_code() == 400 and "score_threshold" in str(error), error
json.dump({"found": found, "code": [model.inference.predictor.__file__, cuda_ops.library.__file__]}, sys.stdout)
"""


def test_a_registered_model_loads_without_us_and_finds_what_predict_finds(
    registered: tuple[Config, RegisterResult], tmp_path: Path
) -> None:
    config, result = registered
    assert result == RegisterResult(
        "1", True, "maskrcnn version 1: the champion, as the first version", "models:/maskrcnn/1"
    )
    images = val_images(config)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOADED, f"models:/maskrcnn@{CHAMPION}", *map(str, images)],
        cwd=outside,
        env=strange_environment(config.tracking.uri),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded["found"] == predicted(config, images, tmp_path / "out")
    assert sum(len(image["detections"]) for image in loaded["found"]) > 0
    repository = Path(__file__).resolve().parents[2]
    assert not any(Path(file).is_relative_to(repository) for file in loaded["code"])


def test_a_version_says_where_it_is_from(registered: tuple[Config, RegisterResult]) -> None:
    config, _ = registered
    client = MlflowClient(tracking_uri=config.tracking.uri)
    version = client.get_model_version("maskrcnn", "1")
    run_id = json.loads((config.train.output_dir / "mlflow_run.json").read_text())["run_id"]
    evaluation = json.loads((config.train.output_dir / "evaluation.json").read_text())
    assert version.run_id == run_id
    assert version.tags["checkpoint"] == "checkpoints/step_0000007.pt"
    assert version.tags["evaluation.data_hash"] == evaluation["data_hash"]
    assert float(version.tags["ap/segm"]) == evaluation["segm"]["AP"]
    (output,) = client.get_run(run_id).outputs.model_outputs
    assert (f"models:/{output.model_id}", output.step) == (version.source, 7)
    files = Path(client.get_logged_model(output.model_id).artifact_location.removeprefix("file://"))
    trained = config.train.output_dir / version.tags["checkpoint"]
    assert (files / "artifacts" / "model.pt").stat().st_size < trained.stat().st_size - 3_900_000  # 4 MB of optimizer
    assert not list(files.rglob("*.cpp"))
    assert "best_threshold" not in version.tags  # an untrained network has no hit to choose it by


def test_a_version_has_the_best_thresholds_that_evaluate_found(config: Config) -> None:
    path = config.train.output_dir / "analysis.json"
    analysis = json.loads(path.read_text())
    analysis["best"]["all"]["threshold"] = 0.4
    analysis["best"]["per_class"]["circle"]["threshold"] = 0.3
    analysis["test_time"]["soft_nms"] = "linear"
    path.write_text(json.dumps(analysis))
    register.run(with_values(config, predict={"score_threshold": "best"}))
    client = MlflowClient(tracking_uri=config.tracking.uri)
    version = client.get_model_version("maskrcnn", "1")
    assert version.tags["best_threshold"] == "0.4"
    logged = client.get_logged_model(version.source.rpartition("/")[2])
    files = Path(logged.artifact_location.removeprefix("file://"))
    kept = json.loads((files / "artifacts" / "thresholds.json").read_text())
    assert kept["of_all"] == 0.4
    assert (kept["per_class"]["circle"], kept["per_class"]["star"]) == (0.3, 0.4)
    assert Model.load(files).signature.params.params[0].default == 0.4
    network = load_network(config, f"models:/maskrcnn@{CHAMPION}")
    assert "evaluate.soft_nms=linear" in network.caution("best", in_tiles=False)
    lowest = network.lowest_scores("best")
    assert (lowest["circle"], lowest["star"]) == (0.3, 0.4)
    analysis["best"]["all"]["threshold"] = 0.5
    path.write_text(json.dumps(analysis))
    register.run(config)
    again = client.get_model_version("maskrcnn", "1").tags["best_threshold"]
    assert again == repr(load_network(config, "models:/maskrcnn/1").registered.of_all) == "0.4", "tag and file agree"


def test_a_version_requires_every_package_that_its_code_imports() -> None:
    repository = Path(__file__).resolve().parents[2]
    files = [*(repository / "model").rglob("*.py"), *(repository / "cuda_ops").rglob("*.py")]
    imported = {"mlflow"}
    for statement in (s for file in files for s in ast.parse(file.read_text()).body):
        if isinstance(statement, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            imported.add((statement.module or "").partition(".")[0])
    outside = {"pillow" if name == "PIL" else name for name in imported - sys.stdlib_module_names}
    of_exports = {"onnx_ir", "onnxscript"}  # a version needs no other format
    assert outside - of_exports - {"model", "cuda_ops", "mlflow"} <= set(REQUIREMENTS)


def test_registering_twice_is_one_version(registered: tuple[Config, RegisterResult]) -> None:
    config, first = registered
    second = register.run(config)
    assert (first.version, second.version, versions(config)) == ("1", "1", ["1"])
    assert second.is_champion


def test_the_alias_moves_to_what_is_better_on_the_same_data_alone(config: Config) -> None:
    register.run(rescored(config, bbox=0.5, segm=0.4))
    worse = register.run(rescored(another_run(config, "worse"), bbox=0.6, segm=0.3))
    assert (worse.version, worse.is_champion, champion(config)) == ("2", False, "1")
    assert "mask AP 0.3000 against 0.4000 of version 1" in worse.reason
    strange = register.run(rescored(another_run(config, "strange"), segm=0.9, data_hash="other"))
    assert (strange.version, strange.is_champion, champion(config)) == ("3", False, "1")
    assert "other data" in strange.reason
    better = register.run(rescored(another_run(config, "better"), segm=0.41))
    assert (better.version, better.is_champion, champion(config)) == ("4", True, "4")


def test_a_champion_evaluated_on_new_data_can_be_compared_again(config: Config) -> None:
    register.run(rescored(config, segm=0.4))
    assert register.run(rescored(config, segm=0.2, data_hash="new")).version == "1"
    assert register.run(rescored(another_run(config, "next"), segm=0.3, data_hash="new")).is_champion


def test_a_model_below_the_threshold_is_not_registered(config: Config) -> None:
    strict = with_values(rescored(config, bbox=0.5, segm=0.3), registry={"min_bbox_ap": 0.4, "min_segm_ap": 0.35})
    result = register.run(strict)
    assert result.version is None
    assert result.reason == "not registered: mask AP 0.3000 is below registry.min_segm_ap 0.3500"
    assert versions(config) == []


def test_an_equal_ap_leaves_the_champion_where_it_is() -> None:
    champion = Version("1", Scored({"bbox": 0.5, "segm": 0.4}, "d").tags())
    for boxes in (0.4, 0.5, 0.6):
        wins, reason = beats(Version("2", Scored({"bbox": boxes, "segm": 0.4}, "d").tags()), champion)
        assert not wins
        assert reason == "not the champion: mask AP 0.4000 against 0.4000 of version 1"
    assert beats(Version("2", Scored({"bbox": 0.4, "segm": math.nextafter(0.4, 1)}, "d").tags()), champion)[0]


def test_without_masks_boxes_decide() -> None:
    masks = Version("1", Scored({"bbox": 0.5, "segm": 0.4}, "d").tags())
    assert beats(Version("2", Scored({"bbox": 0.6}, "d").tags()), masks)[0]
    assert not beats(Version("2", Scored({"bbox": 0.4}, "d").tags()), masks)[0]


@pytest.mark.parametrize(
    ("evaluation", "reason"), [(None, "maskrcnn evaluate"), ({"bbox": None, "segm": None}, "must have AP")]
)
def test_a_run_without_scores_is_refused(config: Config, evaluation: dict[str, Any] | None, reason: str) -> None:
    path = config.train.output_dir / "evaluation.json"
    path.unlink()
    if evaluation is not None:
        path.write_text(json.dumps({**evaluation, "checkpoint": "checkpoints/step_0000007.pt", "data_hash": "d"}))
    with pytest.raises(UserError, match=reason):
        register.run(config)


def test_without_a_server_there_is_no_registering(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        away = with_values(config, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(TrackingError, match="must be reachable"):
            register.run(away)


def test_a_server_of_mlflow_2_is_refused_before_anything_is_sent(config: Config, fake_store: ModuleType) -> None:
    with fake_store.FakeServer(version="2.22.1") as server:
        with pytest.raises(
            TrackingError, match=r"must be of version 3\.0 or later to register a model, got 2\.22\.1; upg"
        ):
            register.run(with_values(config, server.url))
        assert server.runs == {}


def test_without_tracking_there_is_no_registering(config: Config) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.enabled"):
        register.run(with_values(config, tracking={"enabled": False}))


def test_the_command_takes_the_folder_of_a_run(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    register.main(
        [
            str(config.train.output_dir),
            "--params",
            str(TINY),
            "tracking.enabled=true",
            f"tracking.uri={config.tracking.uri}",
        ]
    )
    assert "maskrcnn version 1: the champion, as the first" in capsys.readouterr().out


@contextmanager
def served(uri: str, tracking_uri: str, log: Path) -> Iterator[str]:
    """The address of `mlflow models serve`, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri", uri]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=log.parent, env=strange_environment(tracking_uri), stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def ask(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


@contextmanager
def as_pod(tracking_uri: str, folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address and the process of a pod's second container of k8s/overlays/serving, after its first has ended."""
    text = (Path(__file__).parents[2] / "k8s" / "overlays" / "serving" / "server.yaml").read_text()
    (spec,) = (d["spec"] for d in YAML(typ="safe").load_all(text) if d["kind"] == "Deployment")
    commands, environments = [], []
    for container in [*spec["template"]["spec"]["initContainers"], *spec["template"]["spec"]["containers"]]:
        after_tini = container["command"][container["command"].index("--") + 1 :]
        commands.append([part.replace("/model", str(folder)) for part in after_tini])
        own = {v["name"]: v["value"].replace("/model", str(folder)) for v in container["env"] if "value" in v}
        environments.append({**strange_environment(tracking_uri), **own, "MLFLOW_TRACKING_URI": tracking_uri})
    fetching = subprocess.run(commands[0], env=environments[0], cwd=folder.parent, capture_output=True, check=True)
    assert fetching.stdout.decode().splitlines()[-1] == "model_version: 1", "the end of the log names the version"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with folder.with_suffix(".log").open("w") as log:
        command = [part.replace("0.0.0.0", "127.0.0.1").replace("8080", str(port)) for part in commands[1]]
        server = subprocess.Popen(command, env=environments[1], cwd=folder.parent, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
def test_the_server_of_a_pod_answers_what_it_has_accepted_before_it_ends(config: Config, tmp_path: Path) -> None:
    register.run(config)
    image = base64.b64encode(val_images(config)[0].read_bytes()).decode()
    with as_pod(config.tracking.uri, tmp_path / "model") as (address, server), ThreadPoolExecutor() as pool:
        deadline = time.monotonic() + START_S
        while not answers(address):
            assert server.poll() is None, (tmp_path / "model.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for _ in range(2):  # the first one is slow
            began = time.monotonic()
            ask(address, {"inputs": [image]})
        count = 1 + round(2 / (time.monotonic() - began))  # images of about two seconds
        asked = [pool.submit(ask, address, {"inputs": [image] * count}) for _ in range(3)]
        time.sleep(0.5)
        assert not any(request.done() for request in asked)
        server.terminate()
        server.wait(60)
        assert all(request.done() or request.result(0.2) for request in asked), "none is left to a child of it"
        assert [len(request.result()) for request in asked] == [count] * 3
        assert not answers(address)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/ping", timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_server_of_the_model_answers_as_predict_does(config: Config, tmp_path: Path) -> None:
    result = register.run(config)
    images = val_images(config)
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in images]
    expected = predicted(config, images, tmp_path / "out")
    sure = max(found["score"] for image in expected for found in image["detections"])
    with served(result.model_uri, config.tracking.uri, tmp_path / "serve.log") as address:
        assert ask(address, {"inputs": encoded}) == expected
        assert ask(address, {"dataframe_split": {"data": [[file] for file in encoded]}}) == expected
        few = ask(address, {"inputs": encoded, "params": {"score_threshold": sure}})
        assert sum(len(image["detections"]) for image in few) == 1
        assert ask(address, {"inputs": [f"data:image/jpeg;base64,{file}" for file in encoded]}) == expected
        no_image = {"inputs": [base64.b64encode(b"no image").decode()]}
        too_high = {"inputs": encoded, "params": {"score_threshold": 7}}
        for body, why in ((no_image, "cannot be decoded"), (too_high, "score_threshold")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(address, body)
            assert refused.value.code == 400
            assert why in refused.value.read().decode()


def test_predict_takes_a_registered_model_by_its_name(
    registered: tuple[Config, RegisterResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = registered
    monkeypatch.chdir(tmp_path)
    tracking = f"tracking.uri={config.tracking.uri}"
    image = val_images(config)[0]
    for word in (f"models:/maskrcnn@{CHAMPION}", result.model_uri):
        predict.main([str(image), "--weights", word, "--threshold", "0", "--output", str(tmp_path / "out"), tracking])
        document = json.loads((tmp_path / "out" / "predictions.json").read_text())
        assert document["checkpoint"] == word
        assert document["images"][0]["detections"] == predicted(config, [image], tmp_path / "expected")[0]["detections"]
    for word, says in (("models:/maskrcnn@nobody", "nobody"), ("models:/nothing/1", "nothing")):
        with pytest.raises(TrackingError, match=f"MLflow at .*{says}"):
            predict.run(config, [image], weights=word, output=tmp_path / "out")


def test_a_name_where_there_is_no_registry_is_an_error_and_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"models:/maskrcnn@champion: must be in MLflow's registry, but sqlite:"):
        load_network(Config(), "models:/maskrcnn@champion")
    assert list(tmp_path.iterdir()) == []
