"""Fixtures that every floor shares."""

import fcntl
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:  # tests of the build and of words need no torch, which takes seconds to import
    from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]

# A job that a shell started in the background ignores SIGINT, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files with such tests are read: a machine with a GPU may lack what the others import, MLflow
    say.
    """
    if config.option.markexpr != "gpu" or (collection_path.is_file() and collection_path.suffix != ".py"):
        return None
    tests = [collection_path] if collection_path.is_file() else list(collection_path.rglob("test_*.py"))
    sources = {*tests, *(test.with_name("conftest.py") for test in tests)} - {
        Path(__file__)
    }  # a fixture may set the mark
    return None if any(file.is_file() and "pytest.mark.gpu" in file.read_text() for file in sources) else True


@pytest.fixture(scope="session")
def without() -> Callable[[Path], AbstractContextManager[None]]:
    """A context within which a file is gone."""

    @contextmanager
    def moved(path: Path) -> Iterator[None]:
        aside = path.with_name(f"{path.name}.aside")
        path.rename(aside)
        try:
            yield
        finally:
            aside.replace(path)

    return moved


@pytest.fixture
def leased() -> Callable[[Path], AbstractContextManager[None]]:
    """A context within which whatever opens a file waits, for 45 s or for the context's end: a disk that hangs."""

    @contextmanager
    def held(path: Path) -> Iterator[None]:
        before = signal.signal(signal.SIGIO, lambda *_: None)  # sent to the holder of a lease
        with path.open("r+b") as file:
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError:
                pytest.skip("needs a file system with leases")
            yield
        signal.signal(signal.SIGIO, before)

    return held


def load_helper(name: str) -> ModuleType:
    """A module that lies beside this file: under importmode=importlib tests cannot import one another."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytest_terminal_summary = load_helper("missing_programs").pytest_terminal_summary


def photographs() -> Path | None:
    """The real COCO images of recipes/coco_tiny.yaml, where somebody has them."""
    source = REPOSITORY / "recipes" / "coco_tiny.yaml"
    if not source.is_file():  # a copy with the operators alone, as .ci/sanitize and .ci/floor make
        return None
    from ruamel.yaml import YAML

    recipe = YAML(typ="safe").load(source.read_text())
    path = (REPOSITORY / recipe["data"]["raw_dir"]).resolve()
    return path if path.is_dir() else None


PHOTOGRAPHS = photographs()


@pytest.fixture(scope="session")
def tls() -> ModuleType:
    """tests/tls.py, which makes a private CA; skips where `cryptography`, which MLflow brings, is not installed."""
    pytest.importorskip("cryptography", reason="needs cryptography, which MLflow brings")
    return load_helper("tls")


@pytest.fixture(scope="session")
def coco_like_module() -> ModuleType:
    """tests/coco_like.py, which draws the set below."""
    return load_helper("coco_like")


@pytest.fixture(scope="session")
def coco_like(coco_like_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 32 drawn images in the form and layout of COCO 2017; see tests/coco_like.py. Only to be read.

    With pytest-xdist one process draws them for all.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    root: Path = folder / "coco_like" / "coco"
    with FileLock(folder / "coco_like.lock"):
        if not root.exists():
            part = tmp_path_factory.mktemp("coco_like_part") / "coco_like"
            coco_like_module.write(part / "coco")
            part.replace(root.parent)
    return root


@pytest.fixture(params=["drawn"] if PHOTOGRAPHS is None else ["drawn", "photographs"])
def either_coco(request: pytest.FixtureRequest, coco_like: Path) -> Path:
    """The drawn images, and where photographs lie they too, for tests that are quick enough to run on both."""
    return PHOTOGRAPHS if PHOTOGRAPHS is not None and request.param == "photographs" else coco_like


@pytest.fixture(scope="session")
def best_coco(request: pytest.FixtureRequest) -> Path:
    """Photographs where they lie, else the drawn images: for tests that are too slow to run on both."""
    return PHOTOGRAPHS or request.getfixturevalue("coco_like")


@pytest.fixture(scope="session")
def no_sync() -> "type[TorchDispatchMode]":
    """`with no_sync(): …` fails where the host would wait for the device; see tests/no_sync.py."""
    return load_helper("no_sync").NoSync


@pytest.fixture
def cuda_stand_ins() -> Iterator[Any]:
    """Streams and graphs of torch.cuda as a CPU can have them; see tests/cuda_stand_ins.py. Set its `refused` to make
    captures fail.
    """
    with load_helper("cuda_stand_ins").stand_ins() as capture:
        yield capture


@pytest.fixture(scope="session")
def fake_gpu() -> Callable[..., AbstractContextManager[Any]]:
    """`with fake_gpu() as gpu: …` has a GPU without values that refuses to be waited for; see tests/fake_cuda.py."""
    return partial(load_helper("fake_cuda").fake_gpu, load_helper("no_sync"), load_helper("cuda_stand_ins"))


@pytest.fixture(scope="session")
def kubernetes_schema() -> ModuleType:
    """tests/kubernetes_schema.py: manifests against the types of the API. Skips where those are not installed."""
    for package in ("kubernetes", "kubeflow.training", "kubeflow_trainer_api"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra `dev`, which has the types of the API")
    return load_helper("kubernetes_schema")


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
        "stability/pipeline.yaml",
    ):
        (tmp_path / "repo" / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / "repo" / name)
    return tmp_path / "repo"
