"""Every operator of cuda_ops/operators/, by its own example: complete, known to torch, and without a
wait of the host.
"""

import ast
import re
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from itertools import product
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


def cut_to_one(value, size, num_dims):
    """The same, but of the first num_dims dimensions each of this size is cut to its first entry."""

    def cut(tensor):
        is_cut = [side == size and dim < num_dims for dim, side in enumerate(tensor.shape)]
        return tensor[tuple(slice(1 if one else None) for one in is_cut)]

    return moved(value, cut)


def shapes_of(arguments):
    shapes = []
    moved([*arguments.values()], lambda tensor: shapes.append(tuple(tensor.shape)))
    return shapes


def cases_of_one(arguments):
    """The arguments with dimensions of each of their sizes cut to 1: only the first ones, then all; each case once."""
    seen = [shapes_of(arguments)]
    for size, num_dims in product(sorted({side for shape in seen[0] for side in shape}), (1, 4)):
        cut = {key: cut_to_one(value, size, num_dims) for key, value in arguments.items()}
        if (shapes := shapes_of(cut)) not in seen:
            seen.append(shapes)
            yield shapes, cut


def strided(tensor, odd, is_reversed):
    """The same values, where dimensions of size 1 have an odd stride; the others from last to first if asked."""
    order = range(tensor.dim())[::-1] if is_reversed else range(tensor.dim())
    dense = tensor.permute(*order).clone(memory_format=torch.contiguous_format).permute(*order)
    strides = [odd if side == 1 else stride for side, stride in zip(tensor.shape, dense.stride(), strict=True)]
    return dense.as_strided(tensor.shape, strides)


def results_and_gradients(operator, arguments, place):
    """Results with tensors placed in memory by `place`, and the gradients of those that have one."""
    leaves = []

    def placed(tensor):
        leaf = place(tensor).requires_grad_(tensor.is_floating_point())
        leaves.append(leaf)
        return leaf

    results = tensors_of(operator.function(**{key: moved(value, placed) for key, value in arguments.items()}))
    learned = [result for result in results if isinstance(result, torch.Tensor) and result.requires_grad]
    if not learned:
        return results
    directions = [
        torch.linspace(-1, 1, one.numel(), dtype=one.dtype, device=one.device).view(one.shape) for one in learned
    ]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    return [*results, *torch.autograd.grad(learned, inputs, directions, allow_unused=True)]


def test_strides_of_dimensions_of_size_1_do_not_matter(cuda_or_cpu):
    """torch leaves them to chance, and calls a tensor contiguous whatever they are."""
    counts = dict.fromkeys(OPERATORS, 0)
    for name, operator in OPERATORS.items():
        for shapes, arguments in cases_of_one(operator.example(cuda_or_cpu)):
            try:
                expected = results_and_gradients(operator, arguments, lambda tensor: strided(tensor, 1, False))
            except ValueError:  # what was cut must not be 1
                continue
            counts[name] += 1
            for how in ((2**33, False), (1, True)):
                results = results_and_gradients(operator, arguments, lambda tensor, how=how: strided(tensor, *how))
                assert_close(results, expected, f"{name}, {shapes}, strides {how}")
    assert {name for name, count in counts.items() if not count} == {"generate_anchors", "enlarge_bilinear"}
    assert counts["multilevel_roi_align"] > 5  # channels, rows and columns among them


def assert_close(results, expected, what):
    for result, wanted in zip(results, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")
        else:
            assert result == wanted, what


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
