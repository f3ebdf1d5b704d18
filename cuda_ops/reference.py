"""The operators in plain torch, `cuda_ops.reference.<operator>`: specification, fallback, and oracle of the compiled
ones.

All but `encode_masks` have output shapes that follow from input shapes, never wait for the device, and run the same
code on CPU and GPU. They stand in `cuda_ops/operators/`, each beside the public function, which checks the arguments:
these do not.
"""

from cuda_ops import operators
from cuda_ops.boxes import decode_boxes, encode_boxes
from cuda_ops.operators.match_boxes import BACKGROUND, IGNORE

_twins = {operator.name: operator.reference for operator in operators.ALL}
globals().update(_twins)

__all__ = ["BACKGROUND", "IGNORE", "decode_boxes", "encode_boxes", *_twins]
