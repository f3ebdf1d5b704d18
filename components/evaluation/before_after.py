"""Detections of the untrained network in a few images, to be drawn beside those of the trained one.

Training writes before.json into its run's folder before its first step; evaluation draws plots/before_after.jpg from
it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, PositiveInt

from components.evaluation.plots import DRAWN_SCORE
from model.data.dataset import read_indexed
from model.data.index import CocoIndex, spread
from model.data.transforms import Pixels
from model.files import read_json
from model.inference.predictor import Object, Predictor

FILE_NAME = "before.json"
IMAGES = 4


class BeforeObject(BaseModel):
    """An object, as it is drawn."""

    label: PositiveInt
    score: float
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    segmentation: dict[str, Any] | None = None


class Before(BaseModel):
    """Content of before.json."""

    data_hash: str
    objects: dict[str, list[BeforeObject]]  # image id → objects


def detect_before(untrained: Predictor, index: CocoIndex) -> str:
    """Content of before.json: the network's current detections in IMAGES images, spread over a split."""
    found = untrained.objects(_images(index), batch_size=1, score_threshold=DRAWN_SCORE)
    content = {
        "data_hash": index.data_hash,
        "objects": {str(index.image_ids[i]): objects for i, objects in found},
    }
    return json.dumps(content) + "\n"


def read_before(run_dir: Path, index: CocoIndex) -> dict[int, list[Object]]:
    """Read objects by index of the image in a split; empty if before.json is missing or belongs to other data.

    Raises:
        UserError: if it is damaged.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():  # a run of an older version
        return {}
    content = read_json(path, Before, "delete it to evaluate without before_after.jpg")
    if content["data_hash"] != index.data_hash:  # another split, or prepared anew
        return {}
    found = ((i, content["objects"].get(str(index.image_ids[i]))) for i in spread(len(index), IMAGES))
    return {i: objects for i, objects in found if objects is not None}


def _images(index: CocoIndex) -> Iterator[tuple[int, Pixels]]:
    for i in spread(len(index), IMAGES):
        yield i, read_indexed(index, i)
