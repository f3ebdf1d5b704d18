"""A GPU without values: whole training steps and detections on fake CUDA tensors (shapes, strides, dtypes, devices), on
a machine that has none.

Torch's own kernels and ours are asked what they would give, by their fake kernels, so this sees all that does not
depend on values: a tensor on the wrong device, a dtype that does not fit, a host that waits (tests/no_sync.py), a
gradient whose strides are not its parameter's. Streams and graphs are those of tests/cuda_stand_ins.py.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import cuda_ops

CUDA = torch.device("cuda", 0)
CAPABILITY = (9, 0)  # Hopper's
COPIES = frozenset({"_to_copy", "copy_", "_copy_from", "_foreach_copy_"})
UPDATES = {"_fused_sgd_": 2, "_fused_adamw_": 3}  # lists of the parameters' shapes: gradients, momentum; and squares
PRODUCTS = frozenset({"convolution", "mm", "addmm", "bmm", "conv2d", "linear", "matmul"})


class FakeGpu:
    """The present fake GPU: puts networks and batches on it, and counts what is asked of it."""

    def __init__(self, mode: FakeTensorMode, answer: int) -> None:
        self.mode, self.answer = mode, answer
        self.questions = 0  # how often the host has asked for a number, and waited
        self.dtypes: set[torch.dtype] = set()  # of what convolutions and products gave
        self.updated = 0  # parameters, by the optimizer
        self.launched = 0  # operators
        self.waits: list[int] = []  # for events: how many operators were launched since, and are waited for by nobody

    def fake(self, tensor: Tensor, device: torch.device = CUDA) -> Tensor:
        """A tensor of the same shape, strides and dtype, there."""
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def move(self, model: nn.Module) -> nn.Module:
        """Put a network on the GPU, in place, whatever its own device is; `meta` costs nothing."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(self.fake(parameter), parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                is_persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, self.fake(buffer), persistent=is_persistent)
        return model


@contextmanager
def fake_gpu(
    no_sync: ModuleType, stand_ins: ModuleType, answer: int = 3, *, may_wait: bool = False
) -> Iterator[FakeGpu]:
    """The machine has a fake GPU for as long as the context lasts.

    Args: no_sync: tests/no_sync.py. stand_ins: tests/cuda_stand_ins.py. answer: what the GPU says to whoever asks for a
    whole number, as detection does for the number of boxes; training must not ask. may_wait: the host may wait for
    other things too.
    """
    mode = FakeTensorMode(allow_fallback_kernels=False)
    gpu = FakeGpu(mode, answer)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)
        for context in (stand_ins.stand_ins(), cuda_ops.backend("compiled"), mode):
            stack.enter_context(context)
        patch.setattr(stand_ins.Stream, "record_event", lambda _: _noted(stand_ins.Event(), gpu))
        if not may_wait:
            stack.enter_context(no_sync.NoSync())
        stack.enter_context(_Launches(gpu))
        stack.enter_context(_Methods(gpu))
        yield gpu


def _noted(event: Any, gpu: FakeGpu) -> Any:
    launched = gpu.launched
    event.synchronize = lambda: gpu.waits.append(gpu.launched - launched)
    return event


class _Launches(TorchDispatchMode):
    """Looks at each operator: all its tensors on one device, and the optimizer's alike in strides."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._gpu.launched += 1
        name = func._schema.name.split("::")[-1]
        tensors = _tensors((args, kwargs))
        devices = {tensor.device for tensor in tensors}
        if name not in COPIES and len(devices) > 1:
            raise AssertionError(f"{func}: all tensors must be on one device, got {sorted(map(str, devices))}")
        if name in UPDATES:  # torch has no fake kernels for all of them
            parameters, count = args[0], UPDATES[name]
            for tensor, parameter in zip(chain(*args[1 : 1 + count]), parameters * count, strict=True):
                _check_strides(tensor, parameter)
            self._gpu.updated += len(parameters)
            return None
        if name in ("convolution", "convolution_backward") and args[0].dtype == torch.bfloat16:
            # Which kernel bfloat16 gets, torch asks the driver. On GPUs of today it gets what float16 gets.
            output = _viewed(func(*_viewed(args, torch.float16), **kwargs), torch.bfloat16)
        else:
            output = func(*args, **kwargs)
        if name in PRODUCTS:
            self._gpu.dtypes.add(output.dtype)
        return output


class _Methods(TorchFunctionMode):
    """What of Python's side must be otherwise where there are no values, and no autograd engine for a GPU that is not
    there.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.backward:
            return run_backward(args[0])
        if func is torch.Tensor.__int__:
            self._gpu.questions += 1
            return self._gpu.answer
        if func is torch.Tensor.item and args[0].device.type == "cpu":  # nobody waits for what the host has
            return 0
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def run_backward(loss: Tensor) -> None:
    """What loss.backward() does, node by node; torch's own engine wants streams of a real GPU.

    Raises: AssertionError: if a gradient is not on the device of what it is the gradient of, or comes to a parameter in
    other strides than its own.
    """
    root = loss.grad_fn
    assert root is not None
    waits, found = {root: 0}, [root]
    for node in found:  # grows meanwhile
        for following in _following(node):
            if following not in waits:
                waits[following] = 0
                found.append(following)
            waits[following] += 1
    gradients: dict[Node, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    while ready:
        node = ready.pop()
        outputs = _apply(node, gradients.pop(node, {}))
        for (following, slot), gradient in zip(node.next_functions, outputs, strict=False):
            if following is None:
                continue
            if gradient is not None:
                sums = gradients.setdefault(following, {})
                sums[slot] = sums[slot] + gradient if slot in sums else gradient
            waits[following] -= 1
            if not waits[following]:
                ready.append(following)


def _following(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]


def _apply(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs; None where there is none."""
    if not gradients:
        return (None,) * len(node.next_functions)
    given: list[Tensor | None] = []
    for slot, wanted in enumerate(node._input_metadata):
        gradient = gradients.get(slot)
        if gradient is not None:
            if gradient.device != wanted.device:
                raise AssertionError(f"{node}: the gradient must be on {wanted.device}, got {gradient.device}")
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
        given.append(gradient)
    if hasattr(node, "variable") and given[0] is not None:
        _check_strides(given[0], node.variable)
    outputs = node.apply(*given) if hasattr(node, "apply") else node(*given)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _check_strides(tensor: Tensor, parameter: Tensor) -> None:
    """Strides of sides of one cell do not count. Where others differ, torch copies the gradient, or updates slowly."""
    ours, theirs = (
        [stride for stride, side in zip(t.stride(), t.shape, strict=True) if side > 1] for t in (tensor, parameter)
    )
    if tensor.shape != parameter.shape or ours != theirs:
        raise AssertionError(
            f"gradient and momentum must have their parameter's strides, got "
            f"{tensor.stride()} of {tuple(tensor.shape)} for "
            f"{parameter.stride()} of {tuple(parameter.shape)}"
        )


def _viewed(tree: Any, dtype: torch.dtype) -> Any:
    """The same with its tensors of two bytes a value taken for another such dtype."""
    return tree_map_only(Tensor, lambda tensor: tensor.view(dtype) if tensor.itemsize == 2 else tensor, tree)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
