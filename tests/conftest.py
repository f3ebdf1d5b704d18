"""Fixtures that every floor shares."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]


def load_helper(name: str) -> ModuleType:
    """A module that lies beside this file: under importmode=importlib tests cannot import one another."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """80 + 80 real COCO images with annotations; absent outside the team's machines, where such tests skip."""
    path = REPOSITORY.parent / "shared" / "data" / "coco_tiny"
    if not path.is_dir():
        reason = f"real COCO images are not at {path}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def no_sync() -> type[TorchDispatchMode]:
    """`with no_sync(): …` fails where the host would wait for the device; see tests/no_sync.py."""
    return load_helper("no_sync").NoSync


@pytest.fixture(scope="session")
def kubernetes_schema() -> ModuleType:
    """tests/kubernetes_schema.py: manifests against the types of the API. Skips where those are not installed."""
    for package in ("kubernetes", "kubeflow.training", "kubeflow_trainer_api"):
        pytest.importorskip(package, reason=f"{package}, of the extra `dev`, has the types of the API")
    return load_helper("kubernetes_schema")
