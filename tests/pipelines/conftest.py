"""What the tests of the pipelines share."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def kfp() -> Any:
    """Skips where Kubeflow's packages, of the extra `pipelines`, are not installed."""
    pytest.importorskip("kfp.kubernetes", reason="needs kfp-kubernetes, of the extra `pipelines`")
    return pytest.importorskip("kfp", reason="needs kfp, of the extra `pipelines`")


def exit_status(words: tuple[str, ...]) -> int | str | None:
    from pipelines.pipeline import main

    with pytest.raises(SystemExit) as exit_:
        main(words)
    return exit_.value.code


@pytest.fixture(scope="session")
def pipeline_command(kfp: Any) -> Iterator[Callable[..., int | str | None]]:
    """Runs `maskrcnn pipeline …` in a thread and returns the exit status.

    kfp inspects the whole call stack for each setting of a task. On pytest's deep stack compiling takes ten times
    longer.
    """
    with ThreadPoolExecutor(1) as thread:
        yield lambda *words: thread.submit(exit_status, words).result()


@pytest.fixture(scope="session")
def pipelines_stub(kfp: Any) -> ModuleType:
    """pipelines_stub.py; under importmode=importlib tests cannot import one another."""
    spec = importlib.util.spec_from_file_location("pipelines_stub", Path(__file__).with_name("pipelines_stub.py"))
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = stub
    spec.loader.exec_module(stub)
    return stub


@pytest.fixture
def kubeflow(pipelines_stub: ModuleType) -> Iterator[Any]:
    """The state of a server of Kubeflow Pipelines on loopback."""
    with pipelines_stub.serve(pipelines_stub.Kubeflow()) as state:
        yield state


@pytest.fixture
def secure_kubeflow(pipelines_stub: ModuleType, tls: ModuleType, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """The same over https, and the file of the private CA that signed its certificate."""
    ca_file, context = tls.authority(tmp_path)
    with pipelines_stub.serve(pipelines_stub.Kubeflow(), lambda server: tls.secure(server, context)) as state:
        yield state, ca_file


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A parameter file for a cluster, in the current directory. Nothing of the environment speaks of servers."""
    for name in (
        "KF_PIPELINES_ENDPOINT",
        "KF_PIPELINES_UI_ENDPOINT",
        "KF_PIPELINES_TOKEN",
        "KF_PIPELINES_SA_TOKEN_PATH",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        *("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"),
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_EXPERIMENT_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(
        "train: {output_dir: runs/demo, batch_size: 8}\n"
        "stability: {output_dir: runs/study}\n"
        "cluster: {image: registry/maskrcnn:1, gpus_per_node: 2}\n"
    )
    return path
