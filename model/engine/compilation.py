"""torch.compile of the network's dense parts (`train.compile`): what is convolutions, products and the arithmetic between them.

What stands between the parts (anchors, matching, sampling, RoIAlign, mask targets) are operators of `cuda_ops` already, so there is nothing to fuse.
Parts keep their names, so that checkpoints of compiled and plain networks are the same.
"""

import torch

from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN

DENSE_PARTS = (
    "backbone",
    "rpn.head",
    "roi_heads.res5",
    "roi_heads.box_head",
    "roi_heads.box_predictor",
    "roi_heads.mask_head",
)  # those of them that a network has


def compile_parts(model: MaskRCNN, device: torch.device) -> None:
    """Have the dense parts compiled when they first run, in each of the shapes they meet. Changes the model in place.

    Raises:
        UserError: if torch.compile does not work here, for want of a C++ compiler (CPU) or of Triton (CUDA) say.
    """
    try:
        torch.compile(_probe)(torch.ones(64, device=device))
    except Exception as error:  # Inductor's own kinds of error are private
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"train.compile=true: torch.compile must work on {device.type}, but compiling one line failed ({type(error).__name__}: {reason}); "
            "it needs a C++ compiler, and Triton for CUDA. Or set train.compile to false"
        ) from error
    for name, part in model.named_modules():
        if name in DENSE_PARTS:
            part.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
