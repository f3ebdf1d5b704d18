"""Layout of each data source below `data.raw_dir`: folders of images and annotation files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import DataConfig

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

_IMAGES = {
    "shapes": "{split}",
    "coco2014": "{split}2014",
    "coco2017": "{split}2017",
    "custom": "images_{split}",
}
_ANNOTATIONS = {
    "shapes": "annotations/instances_{split}.json",
    "coco2014": "annotations/instances_{split}2014.json",
    "coco2017": "annotations/instances_{split}2017.json",
    "custom": "instances_{split}.json",
}


@dataclass(frozen=True)
class SplitPaths:
    """Paths of one split of a COCO data set, each relative to raw_dir or absolute."""

    images: Path
    annotations: Path


def split_paths(data: DataConfig, split: Split) -> SplitPaths:
    """Paths of a split: the source's own layout, unless `data.<split>_images` or `data.<split>_annotations` is set.

    With `data.val_fraction` both splits have the paths of train.
    """
    split = "train" if data.val_fraction else split
    images = {"train": data.train_images, "val": data.val_images}[split]
    annotations = {"train": data.train_annotations, "val": data.val_annotations}[split]
    return SplitPaths(
        images=Path(images or _IMAGES[data.source].format(split=split)),
        annotations=Path(annotations or _ANNOTATIONS[data.source].format(split=split)),
    )
