"""What a network finds in a few images before it learns and after: one picture that says what training was good for.

Training writes before.json into its run's folder ahead of its first step; evaluation draws plots/before_after.jpg from it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from components.journal import write_atomically
from components.plots import DRAWN_SCORE, draw_comparison, spread
from model.data.index import CocoIndex
from model.data.transforms import Pixels, read_image
from model.predictor import Object, Predictor
from model.visualize import stacked

FILE_NAME = "before.json"
IMAGES = 4


def look_before(untrained: Predictor, index: CocoIndex, run_dir: Path) -> None:
    """Write what a network finds in IMAGES images of a split, from all over it, as it is now."""
    found = untrained.objects(_images(index), batch_size=1, score_threshold=DRAWN_SCORE)
    content = {
        "data_hash": index.data_hash,
        "objects": {str(index.image_ids[i]): objects for i, objects in found},
    }
    write_atomically(run_dir / FILE_NAME, json.dumps(content) + "\n")


def draw_before_after(
    path: Path,
    run_dir: Path,
    index: CocoIndex,
    ground_truth: COCO,
    *,
    bbox_results: Sequence[dict[str, Any]],
    segm_results: Sequence[dict[str, Any]],
    class_names: Sequence[str],
) -> None:
    """Draw a row an image: annotated, as the network saw it before training, and its results. Not drawn if before.json is of other data.

    Args:
        bbox_results, segm_results: of the whole split; masks in the order of boxes, or none.
    """
    before = _read_before(run_dir / FILE_NAME, index)
    if before is None:
        return
    rows = []
    for i in spread(len(index), IMAGES):
        image_id = int(index.image_ids[i])
        places = [k for k, result in enumerate(bbox_results) if result["image_id"] == image_id]
        rows.append(
            draw_comparison(
                index,
                i,
                ground_truth,
                bbox_results=[bbox_results[k] for k in places],
                segm_results=[segm_results[k] for k in places] if segm_results else [],
                class_names=class_names,
                before=before[str(image_id)],
            )
        )
    stacked(rows).save(path, quality=90)


def _images(index: CocoIndex) -> Iterator[tuple[int, Pixels]]:
    for i in spread(len(index), IMAGES):
        yield i, read_image(index.image_path(i), apply_exif=bool(index.apply_exif[i]))


def _read_before(path: Path, index: CocoIndex) -> dict[str, list[Object]] | None:
    if not path.is_file():  # the run is of an older version
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["data_hash"] != index.data_hash:  # another split, or prepared anew
        return None
    objects: dict[str, list[Object]] = content["objects"]
    return objects
