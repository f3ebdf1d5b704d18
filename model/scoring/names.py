"""What is scored, and under which names. Imports nothing, so that who reads scores need not load what computes them."""

from typing import Literal

Task = Literal["bbox", "segm"]
TASKS: tuple[Task, ...] = ("bbox", "segm")
Kind = Literal["bbox", "segm", "proposals"]
# What is scored, by model.task.
KINDS: dict[str, tuple[Kind, ...]] = {"mask": ("bbox", "segm"), "box": ("bbox",), "proposals": ("proposals",)}
TITLES: dict[str, str] = {"bbox": "box", "segm": "mask", "proposals": "proposals"}  # in tables and sentences
# pycocotools' own order of its twelve numbers.
SCORE_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# Average recall at 100 and 1000 proposals an image: of objects of any size, then small, medium and large ones.
RECALL_NAMES = ("AR100", "ARs100", "ARm100", "ARl100", "AR1000", "ARs1000", "ARm1000", "ARl1000")
