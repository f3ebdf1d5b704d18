"""The compiled library: what is in it, and which implementation serves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cuda_ops
from cuda_ops import library, operators
from cuda_ops.__main__ import main
from cuda_ops.declaration import Kernel, Operator

CSRC = Path(library.__file__).parent / "csrc"
needs_library = pytest.mark.skipif(
    not library.HAS_CPU and not os.environ.get("CI"), reason="needs the compiled operators"
)
needs_cuda_kernels = pytest.mark.skipif(
    not library.HAS_CUDA and not os.environ.get("CI"),
    reason="needs the CUDA kernels, which FORCE_CUDA=1 builds, without a GPU too",
)
OPERATORS = {operator.name: operator for operator in operators.ALL}


@pytest.fixture(autouse=True)
def backend() -> None:
    """In place of the one that runs every test twice: these choose for themselves."""


@needs_cuda_kernels
def test_every_operator_has_kernels_for_both_devices() -> None:
    for operator in operators.ALL:
        for kernel in operator.kernels:
            for key in ("CPU", "CUDA") if operator.has_cuda_kernel else ("CPU",):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cuda_ops::{kernel.name}", key), kernel.name


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


def test_backend_is_restored_after_an_error() -> None:
    before = library.serves(torch.device("cpu"))
    with pytest.raises(ValueError, match="box_iou"), cuda_ops.backend("reference"):
        cuda_ops.box_iou(torch.zeros(3), torch.zeros(3))
    assert library.serves(torch.device("cpu")) == before


def test_unknown_backend_is_named() -> None:
    wrong: Any = "fast"
    with pytest.raises(ValueError, match="backend must be compiled or reference, got fast"), cuda_ops.backend(wrong):
        pass


def test_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_OPS_BACKEND", "reference")
    assert not library.serves(torch.device("cpu"))
    if library.HAS_CPU:
        with library.backend("compiled"):
            assert library.serves(torch.device("cpu"))
    monkeypatch.setenv("CUDA_OPS_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend must be compiled or reference, got fast"):
        library.serves(torch.device("cpu"))


def test_a_library_serves_the_devices_that_it_has_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_OPS_BACKEND", raising=False)
    monkeypatch.setattr(library, "_has_warned", True)
    for has_cpu, has_cuda in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(library, "HAS_CPU", has_cpu)
        monkeypatch.setattr(library, "HAS_CUDA", has_cuda)
        served = [library.serves(torch.device(name)) for name in ("cpu", "cuda:0", "meta")]
        assert served == [has_cpu, has_cuda, False]


# Computes twice, asks for the compiled operators, and is `python -m cuda_ops` then.
SCRIPT = """
import runpy, torch, cuda_ops
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
print(*[cuda_ops.box_iou(boxes, boxes).item() for _ in range(2)])
try:
    with cuda_ops.backend("compiled"):
        pass
except cuda_ops.LibraryError as error:
    print(error)
runpy.run_module("cuda_ops", run_name="__main__")
"""


def copy_package(folder: Path, *patterns: str) -> Path:
    """A copy of those files of the package, in a folder of its own."""
    package = folder / "cuda_ops"
    for path in (path for pattern in patterns for path in CSRC.parent.rglob(pattern)):
        (package / path.relative_to(CSRC.parent)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, package / path.relative_to(CSRC.parent))
    return package


def run_script(package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=package.parent)


def test_without_the_library_the_references_serve_with_one_warning(tmp_path: Path) -> None:
    """As on a machine without a compiler."""
    done = run_script(copy_package(tmp_path, "*.py"))
    absent = "cuda_ops: the compiled operators were not built; install a C++ compiler and run `pip install"
    numbers, error, reason = done.stdout.splitlines()
    assert (numbers, done.returncode) == ("1.0 1.0", 0)
    assert error.startswith(absent)
    assert reason.startswith(absent)
    assert done.stderr.count("no compiled operators for cpu, so plain torch serves") == 1


@needs_library
def test_a_library_of_older_sources_is_not_used_and_the_message_says_to_rebuild_it(tmp_path: Path) -> None:
    """Its operator takes other arguments than those that it would be called with."""
    package = copy_package(tmp_path, "*.py", "_C*.so")
    operator = package / "operators" / "box_iou.py"
    operator.write_text(operator.read_text().replace("boxes2) -> Tensor", "boxes2, float eps) -> Tensor"))
    done = run_script(package)
    stale = (
        "was built from older sources, run `pip install --no-build-isolation -e .` to rebuild it: it has "
        "cuda_ops::box_iou(Tensor boxes1, Tensor boxes2) -> Tensor, "
        "not cuda_ops::box_iou(Tensor boxes1, Tensor boxes2, float eps) -> Tensor"
    )
    numbers, error, reason = done.stdout.splitlines()
    assert (numbers, done.returncode) == ("1.0 1.0", 1)
    assert stale in error
    assert stale in reason
    assert done.stderr.count(stale) == 1


@needs_library
def test_schemas_that_the_library_lacks_are_named() -> None:
    assert library.PATH is not None
    own = [kernel.schema for operator in operators.ALL for kernel in operator.kernels]
    assert library.fault(library.PATH, own) is None
    reason = library.fault(library.PATH, [*own, "of_tomorrow(Tensor x) -> Tensor", "box_iou(Tensor boxes1) -> Tensor"])
    assert reason is not None
    assert re.search(
        "built from older sources, run `pip install.*: it lacks of_tomorrow; it has cuda_ops::box_iou", reason
    )


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "_C.abi3.so").write_text("no library")
    reason = library.fault(tmp_path / "_C.abi3.so", [])
    assert reason is not None
    assert re.match("_C.abi3.so does not load, run `pip install.* to rebuild it: ", reason)


@needs_library
def test_module_tells_what_is_built_and_that_each_operator_equals_its_reference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = main()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"cuda_ops: {library.PATH}\n  C++ " in printed
    assert all(re.search(rf"{name} +cpu +equals its reference", printed) for name in OPERATORS)


@needs_library
def test_module_tells_which_operator_differs_from_its_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: Operator = Operator(
        function=lambda x: wrong.on(x.device)(x),
        reference=lambda x: x,
        compiled=lambda x: x + 1,
        kernels=(Kernel("off_by_one(Tensor x) -> Tensor", fake=torch.empty_like),),
        example=lambda device: {"x": torch.zeros(2, device=device)},
    )
    monkeypatch.setattr(operators, "ALL", (wrong,))
    assert main() == 1
    assert re.search("off_by_one +cpu +Tensor-likes are not close!", capsys.readouterr().out)
