"""The compiled library: what is in it, and which implementation serves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_ops
from cuda_ops import library
from cuda_ops.selfcheck import CHECKS, differences

CSRC = Path(library.__file__).parent / "csrc"
needs_library = pytest.mark.skipif(
    not library.HAS_CPU and not os.environ.get("CI"), reason="needs the compiled operators"
)
needs_cuda_kernels = pytest.mark.skipif(
    not library.HAS_CUDA and not os.environ.get("CI"),
    reason="needs the CUDA kernels, which FORCE_CUDA=1 builds, without a GPU too",
)
ON_THE_HOST = {"enlarge_bilinear"}  # images are loaded there


def test_every_operator_is_checked() -> None:
    assert set(CHECKS) == set(library.OPERATORS)


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=CSRC.parents[1],
    )


@pytest.fixture(autouse=True)
def backend() -> None:
    """In place of the one that runs every test twice: these choose for themselves."""


@needs_cuda_kernels
@pytest.mark.parametrize("name", library.OPERATORS)
def test_every_operator_has_a_kernel_for_both_devices(name: str) -> None:
    for key in ("CPU",) if name in ON_THE_HOST else ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cuda_ops::{name}", key)


@needs_cuda_kernels
def test_every_cuda_kernel_of_the_sources_is_in_the_library() -> None:
    assert library.PATH is not None
    content = library.PATH.read_bytes()  # kernels are registered under their mangled names
    kernels = {
        name
        for path in CSRC.glob("cuda/*.cu")
        for name in re.findall(r"__global__ void\s+(?:__launch_bounds__\(\w+\)\s+)?(\w+)\(", path.read_text())
    }
    assert {"match_boxes_kernel", "pool_kernel", "count_changes"} <= kernels
    assert {name for name in kernels if name.encode() not in content} == set()


@needs_library
@pytest.mark.parametrize("name", CHECKS)
def test_selfcheck_finds_no_difference(name: str) -> None:
    assert differences(name, torch.device("cpu")) is None


def test_backend_is_restored_after_an_error() -> None:
    before = library.serves(torch.device("cpu"))
    with pytest.raises(ValueError, match="box_iou"), cuda_ops.backend("reference"):
        cuda_ops.box_iou(torch.zeros(3), torch.zeros(3))
    assert library.serves(torch.device("cpu")) == before


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend must be compiled or reference, got fast"), cuda_ops.backend("fast"):  # type: ignore[arg-type]
        pass


def test_environment_chooses_the_backend() -> None:
    asked = "import torch; from cuda_ops import library; print(library.serves(torch.device('cpu')))"
    assert python("-c", asked, CUDA_OPS_BACKEND="reference").stdout == "False\n"


def test_without_the_library_the_references_serve_with_one_warning(tmp_path: Path) -> None:
    """A copy of the package without the compiled file, as on a machine without a compiler."""
    package = tmp_path / "cuda_ops"
    for path in CSRC.parent.rglob("*.py"):
        (package / path.relative_to(CSRC.parent)).parent.mkdir(parents=True, exist_ok=True)
        (package / path.relative_to(CSRC.parent)).write_text(path.read_text())
    script = "import torch, cuda_ops; b = torch.tensor([[0., 0., 2., 2.]]); [print(cuda_ops.box_iou(b, b).item()) for _ in '12']"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "1.0\n1.0\n"
    assert done.stderr.count("no compiled operators for cpu, so plain torch serves") == 1
    done = subprocess.run([sys.executable, "-m", "cuda_ops"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "not compiled" in done.stdout


@needs_library
def test_a_library_of_older_sources_is_passed_over_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "OPERATORS", (*library.OPERATORS, "of_tomorrow"))
    with pytest.warns(UserWarning, match=r"built from older sources, without of_tomorrow, .*run `pip install"):
        assert library._load() is None


@needs_library
def test_module_tells_what_is_built() -> None:
    done = python("-m", "cuda_ops")
    assert done.returncode == 0, done.stdout
    assert all(name in done.stdout for name in CHECKS)
