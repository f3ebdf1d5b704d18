"""`python -m cuda_ops`: what is built, for what, and whether it computes what the references compute."""

import sys

import torch

from cuda_ops import library, operators
from cuda_ops.selfcheck import differences


def main() -> int:
    """Print a table of operators; exit status 1: one differs from its reference, or the library cannot be used."""
    if not library.HAS_CPU:
        print(f"cuda_ops: {library.REASON}; until then plain torch serves, slower")
        return int(library.find() is not None)
    print(f"cuda_ops: {library.PATH}\n  {torch.ops.cuda_ops.build_info()}; running on torch {torch.__version__}")
    devices = ["cpu"] + (["cuda"] if library.HAS_CUDA and torch.cuda.is_available() else [])
    has_failed = False
    for operator in operators.ALL:
        for device in devices:
            found = differences(operator, torch.device(device))
            has_failed |= found is not None
            print(f"  {operator.name:22} {device:5} {found or 'equals its reference'}")
    if len(devices) == 1:
        print(f"  no GPU to try; CUDA kernels are {'there' if library.HAS_CUDA else 'not built'}")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
