"""What torch must know of the compiled operators besides their kernels: output shapes without data, gradients, autocast.

With it they work under torch.compile, torch.export and FakeTensorMode. Imported by compiled.py once the library is loaded.
"""

import torch
from torch import Tensor


@torch.library.register_fake("cuda_ops::box_iou")
def _box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])
