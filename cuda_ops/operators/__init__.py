"""The operators, a file each: public function, plain-torch twin, call of the kernels with fakes and gradients, example.

A file that is added here is loaded, checked (`python -m cuda_ops`), tested (tests/cuda_ops/test_operators.py) and
exported by `cuda_ops` without being named anywhere. Its kernels lie in csrc/<operator>.cpp and csrc/cuda/<operator>.cu,
its tests in tests/cuda_ops/test_<operator>.py, its benchmark in benchmark/<operator>.py. It ends with its declaration,
OPERATOR.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from cuda_ops import library
from cuda_ops.declaration import Operator

_modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
ALL: tuple[Operator, ...] = tuple(module.OPERATOR for module in _modules)  # sorted by name
PUBLIC: dict[str, Any] = {name: getattr(module, name) for module in _modules for name in module.__all__}

library.load([kernel.schema for operator in ALL for kernel in operator.kernels])
if library.HAS_CPU:
    for operator in ALL:
        for kernel in operator.kernels:
            kernel.register()
