"""torch.compile of the network's dense parts (`train.compile`): convolutions, products and the arithmetic between them.

The steps between these parts (anchors, matching, sampling, RoIAlign, mask targets) are operators of `cuda_ops` already,
so there is nothing to fuse. Modules keep their names, so checkpoints of compiled and plain networks are the same.
"""

import torch

from model.errors import UserError
from model.network.batch_norm import exclude_from_compilation
from model.network.mask_rcnn import MaskRCNN

DENSE_PARTS = (
    "backbone",
    "rpn.head",
    "roi_heads.res5",
    "roi_heads.box_head",
    "roi_heads.box_predictor",
    "roi_heads.mask_head",
)  # a network may have only some of them


def compile_parts(model: MaskRCNN, device: torch.device) -> None:
    """Compile the dense parts in place; each is compiled at its first run with each input shape.

    Raises:
        UserError: if torch.compile does not work here, for example without a C++ compiler (CPU) or Triton (CUDA).
    """
    try:
        torch.compile(_probe)(torch.ones(64, device=device))
    except Exception as error:  # Inductor's own exception classes are private
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile=true: torch.compile must work on {device.type}, but compiling one line failed "
            f"({type(error).__name__}: {reason}); "
            "install a C++ compiler (and Triton for CUDA), or set train.compile to false"
        ) from error
    exclude_from_compilation(model)
    for name, part in model.named_modules():
        if name in DENSE_PARTS:
            part.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
