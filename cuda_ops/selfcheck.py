"""A compiled operator beside its reference on its example: what `python -m cuda_ops` runs on a user's machine."""

import torch
from torch import Tensor

from cuda_ops.declaration import Operator
from cuda_ops.library import backend

TOLERANCE = 1e-5


def differences(operator: Operator, device: torch.device) -> str | None:
    """Compare the compiled operator's result with the reference's on this device: the difference, or None."""
    results = []
    for implementation in ("compiled", "reference"):
        with backend(implementation):
            results.append(operator.of_example(device))
    compiled, reference = results
    if not isinstance(compiled, Tensor | tuple):
        return None if compiled == reference else "differs from its reference"
    try:
        torch.testing.assert_close(compiled, reference, rtol=TOLERANCE, atol=TOLERANCE)
    except AssertionError as error:
        return str(error).splitlines()[0]
    return None
