"""Detectors that torchvision publishes: their files, the settings that they need, and the classes that they know.

These are torchvision's own constants (torchvision/models/detection, torchvision/models/_meta.py), kept here since to
import them takes more than a second.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.weights.file import WeightsError

_BASE = "https://download.pytorch.org/models/"
# Keys are COCO's ids, which have gaps: of the predictors' 91 rows, row 0 is the background, and 10 belong to no class.
COCO_CLASSES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
COCO_ROWS = 91  # rows of torchvision's predictors


@dataclass(frozen=True)
class Published:
    """A file of weights at a URL, which ends in the first digits of the file's SHA-256."""

    name: str
    url: str

    def __str__(self) -> str:
        return self.name

    @property
    def cache(self) -> Path:
        """The place of the file on this machine, torch's own."""
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(self.url).name


_DETECTORS = {
    ("coco", "mask"): Published(
        "MaskRCNN_ResNet50_FPN_Weights.COCO_V1", f"{_BASE}maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    ),
    ("coco", "box"): Published(
        "FasterRCNN_ResNet50_FPN_Weights.COCO_V1", f"{_BASE}fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    ),
    ("coco_v2", "mask"): Published(
        "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1", f"{_BASE}maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"
    ),
    ("coco_v2", "box"): Published(
        "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", f"{_BASE}fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth"
    ),
}


class FetchError(WeightsError):
    """A published file cannot be fetched."""


def published_detector(weights: str, task: str) -> Published:
    """The file of `model.weights` coco or coco_v2; each detector was trained separately, proposals are the boxes'."""
    return _DETECTORS[weights, "mask" if task == "mask" else "box"]


def published_config(weights: str) -> ModelConfig:
    """The network of torchvision's Mask R-CNN with weights coco or coco_v2, for prediction."""
    settings: dict[str, Any] = {"weights": weights, "conventions": "torchvision"}
    if weights == "coco_v2":
        settings |= {"head_norm": "frozen_batch_norm", "box_head": "conv", "rpn_convs": 2}
    return ModelConfig(**settings)


def fetch(published: Published) -> dict[str, Tensor]:
    """Tensors of a published file, from torch's cache or downloaded; a download is checked against its hash.

    Raises:
        FetchError: if it cannot be fetched, has another hash, or does not load safely.
    """
    try:
        return torch.hub.load_state_dict_from_url(
            published.url, check_hash=True, map_location="cpu", weights_only=True, progress=False
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # UnpicklingError: code in the file
        digits = Path(published.url).stem.rpartition("-")[2]
        raise FetchError(
            f"{published}: cannot be fetched from {published.url} ({error}); fetch it elsewhere (its SHA-256 begins "
            f"with {digits}) and put it at {published.cache}, or give the path of weights that you have"
        ) from error
