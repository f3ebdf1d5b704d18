"""Every operator of cuda_ops/operators/, by its own example: complete, known to torch, and without a wait of the host."""

import ast
import re
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_ops
from cuda_ops import operators, reference

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "cuda_ops" / "csrc"
OPERATORS = {operator.name: operator for operator in operators.ALL}
CPU = torch.device("cpu")
each_operator = pytest.mark.parametrize("name", OPERATORS)
each_that_never_waits = pytest.mark.parametrize("name", [name for name, one in OPERATORS.items() if not one.waits])
compiled_only = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
reference_only = pytest.mark.parametrize("backend", ["reference"], indirect=True)


def moved(value, move):
    """The same with its tensors moved, in lists and dataclasses too."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if is_dataclass(value):
        return replace(value, **{name: moved(field, move) for name, field in vars(value).items()})
    return [moved(entry, move) for entry in value] if isinstance(value, list) else value


def tensors_of(result):
    return list(result) if isinstance(result, tuple | list) else [result]


@reference_only
def test_an_operator_has_a_file_of_everything_and_stands_where_its_callers_look():
    for name, operator in OPERATORS.items():
        assert (REPOSITORY / f"cuda_ops/operators/{name}.py").is_file(), name
        assert f'm.def("{name}(' in re.sub(r'm\.def\(\s*"', 'm.def("', (CSRC / f"{name}.cpp").read_text()), name
        kernels = CSRC / "cuda" / f"{name}.cu"
        assert kernels.is_file() == operator.has_cuda_kernel, name
        assert not operator.has_cuda_kernel or f'm.impl("{name}"' in kernels.read_text(), name
        tests = ast.parse((REPOSITORY / f"tests/cuda_ops/test_{name}.py").read_text())
        assert any(getattr(node, "name", "").startswith("test_") for node in tests.body), name
        benchmark = ast.parse((REPOSITORY / f"cuda_ops/benchmark/{name}.py").read_text())
        assert "cases" in [getattr(node, "name", None) for node in benchmark.body], name
        assert getattr(cuda_ops, name) is operator.function
        assert getattr(reference, name) is operator.reference


@reference_only
def test_what_the_sources_define_is_declared():
    sources = "".join(path.read_text() for path in CSRC.glob("*.cpp"))
    defined = set(re.findall(r'm\.def\(\s*"(\w+)\(', sources)) - {"build_info"}
    assert defined == {kernel.name for operator in OPERATORS.values() for kernel in operator.kernels}


@each_that_never_waits
def test_the_host_never_waits(name, no_waiting):
    """Under the mode that refuses what waits, each operator still computes what it computes without it."""
    operator = OPERATORS[name]
    arguments = operator.example(CPU)
    expected = tensors_of(operator.function(**arguments))
    with no_waiting(CPU):
        results = tensors_of(operator.function(**arguments))
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


@reference_only
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 1),
        lambda x: x.cpu(),
        lambda x: bool((x > 1).any()),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_the_mode_that_proves_it_refuses_what_waits(wait, no_sync):
    with pytest.raises(AssertionError, match="wait"), no_sync():
        wait(torch.arange(3.0))


@each_operator
def test_on_cuda_the_results_are_the_same_and_the_host_never_waits(name, cuda, no_waiting):
    operator = OPERATORS[name]
    with cuda_ops.backend("reference"):
        expected = tensors_of(operator.of_example(CPU))
    arguments = operator.example(cuda)
    with nullcontext() if operator.waits else no_waiting(cuda):
        results = tensors_of(operator.function(**arguments))
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            assert result.device.type == cuda.type
            torch.testing.assert_close(result.cpu(), wanted)
        else:
            assert result == wanted


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
@compiled_only
@each_that_never_waits
def test_on_a_gpu_without_values_results_are_laid_out_as_on_the_cpu(name, fake_gpu):
    operator = OPERATORS[name]
    arguments = operator.example(CPU)
    expected = tensors_of(operator.function(**arguments))
    with fake_gpu() as gpu:
        there = {key: moved(value, gpu.fake) for key, value in arguments.items()}
        there |= {"device": torch.device("cuda", 0)} if "device" in there else {}
        results = tensors_of(operator.function(**there))
    for result, wanted in zip(results, expected, strict=True):
        assert result.device.type == "cuda"
        assert (result.shape, result.dtype, result.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


class Calls(TorchDispatchMode):
    """Notes the calls of compiled operators."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cuda_ops":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


@compiled_only
@each_operator
def test_torch_knows_the_compiled_operator(name):
    with Calls() as calls:
        OPERATORS[name].of_example(CPU)
    assert name in {func._schema.name.removeprefix("cuda_ops::") for func, _ in calls.made}
    for func, args in calls.made:
        assert set(torch.library.opcheck(func, args).values()) == {"SUCCESS"}


@reference_only
@each_operator
def test_tensors_of_two_devices_are_named(name):
    """A kernel that was handed memory of another device would crash, at best."""
    operator = OPERATORS[name]
    arguments = operator.example(CPU)
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor)]
    alone = len(tensors) == 1 and not any(isinstance(value, list) for value in arguments.values())
    for key in [] if alone else tensors:
        with pytest.raises(ValueError, match=rf"{name}: .* must be on one device, got .*('cpu'.*'meta'|'meta'.*'cpu')"):
            operator.function(**arguments | {key: arguments[key].to("meta")})
