"""The declaration at the end of each file of `cuda_ops/operators/`, by which they are loaded, checked and tested."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from cuda_ops import library

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kernel:
    """An operator of the compiled library, `torch.ops.cuda_ops.<name>`, and what torch must know of it besides.

    With output shapes and gradients it works under autograd, torch.compile, torch.export and FakeTensorMode.
    """

    schema: str  # the definition in csrc/<operator>.cpp
    fake: Callable[..., Any]  # outputs without data, from inputs without data
    setup_context: Callable[..., None] | None = None  # keeps what the backward pass needs
    backward: Callable[..., Any] | None = None  # the gradients of all inputs

    @property
    def name(self) -> str:
        """Name in `torch.ops.cuda_ops`."""
        return self.schema.partition("(")[0]

    def register(self) -> None:
        """Tell torch of the fake kernel and of the gradient; the library must be loaded."""
        torch.library.register_fake(f"cuda_ops::{self.name}", self.fake)
        if self.backward is not None:
            torch.library.register_autograd(f"cuda_ops::{self.name}", self.backward, setup_context=self.setup_context)


@dataclass(frozen=True)
class Operator(Generic[P, R]):
    """One operator: its public function checks the arguments, then calls one of the two implementations."""

    function: Callable[..., Any]
    reference: Callable[P, R]  # in plain torch: specification, fallback, and oracle of the kernels
    compiled: Callable[P, R]  # calls the kernels, with the same signature
    kernels: tuple[Kernel, ...]  # the first has the operator's name
    example: Callable[[torch.device], dict[str, Any]]  # keyword arguments of `function`, small enough for a check
    has_cuda_kernel: bool = True
    waits: bool = False  # the host waits for the device in it

    @property
    def name(self) -> str:
        """Name of the operator: that of its file, its public function and its first kernel."""
        return self.kernels[0].name

    def on(self, device: torch.device) -> Callable[P, R]:
        """The implementation that computes on this device; see `library.serves`."""
        return self.compiled if library.serves(device) else self.reference

    def of_example(self, device: torch.device) -> Any:
        """The result for the example."""
        return self.function(**self.example(device))
