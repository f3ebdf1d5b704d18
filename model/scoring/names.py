"""Names of scores, in a module that imports nothing heavy: readers of scores need not load what computes them."""

from typing import Literal

IouType = Literal["bbox", "segm"]
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
COCO_MAX_DETECTIONS = 100  # per image and class, in the AP that COCO publishes
ResultType = Literal["bbox", "segm", "proposals"]
# Scored results of each model.task.
RESULT_TYPES: dict[str, tuple[ResultType, ...]] = {
    "mask": ("bbox", "segm"),
    "box": ("bbox",),
    "proposals": ("proposals",),
}
TITLES: dict[str, str] = {"bbox": "box", "segm": "mask", "proposals": "proposals"}  # names in tables and text
# The order is that of pycocotools' twelve numbers.
SCORE_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# Average recall of 100 and 1000 proposals per image: for objects of any size, then small, medium and large ones.
RECALL_NAMES = ("AR100", "ARs100", "ARm100", "ARl100", "AR1000", "ARs1000", "ARm1000", "ARl1000")
