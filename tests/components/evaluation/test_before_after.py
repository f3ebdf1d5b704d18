"""What a run found before it learnt and after, side by side."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.config import Config
from components.evaluation.before_after import FILE_NAME, detect_before, read_before
from components.evaluation.detect import Results, detect
from components.evaluation.files import write_plots
from components.runs.trained import load_trained
from model.data.index import CocoIndex
from model.errors import UserError
from model.inference.predictor import Predictor
from model.scoring.coco import load_ground_truth


def draw(config: Config, run_dir: Path) -> Path:
    """The picture of a run whose network finds all boxes of the ground truth, and no mask."""
    index = CocoIndex.open(config.data.prepared_dir, "val")
    ground_truth = load_ground_truth(index.ground_truth_path)
    found = [annotation | {"score": 0.9} for annotation in ground_truth.anns.values()]
    write_plots(run_dir, Results(found, [], []), None, index, ground_truth, drawn_images=1)
    return run_dir / "plots" / "before_after.jpg"


def before(config: Config, *, finds: bool) -> dict[str, object]:
    """before.json of a network that finds the boxes of the ground truth, or nothing."""
    index = CocoIndex.open(config.data.prepared_dir, "val")
    objects: dict[str, list[dict[str, object]]] = {str(image_id): [] for image_id in index.image_ids}
    for annotation in load_ground_truth(index.ground_truth_path).anns.values() if finds else ():
        x, y, width, height = annotation["bbox"]
        label = index.category_ids.index(annotation["category_id"]) + 1
        objects[str(annotation["image_id"])].append(
            {"label": label, "score": 0.9, "bbox": [x, y, x + width, y + height]}
        )
    return {"data_hash": index.data_hash, "objects": objects}


def differing_columns(one: Path, other: bytes) -> tuple[int, int]:
    """The first and the last column in which two pictures differ by more than JPEG's noise."""
    pixels = [np.asarray(Image.open(picture).convert("L")).astype(int) for picture in (one, io.BytesIO(other))]
    columns = np.flatnonzero((np.abs(pixels[0] - pixels[1]) > 60).any(axis=0))
    return int(columns[0]), int(columns[-1])


def test_objects_are_those_of_the_network(trained_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.evaluation.before_after.DRAWN_SCORE", 0.0)  # untrained, none is surer than a half
    loaded = load_trained(trained_run, "last").loaded
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    objects = json.loads(detect_before(Predictor.of(loaded), index))["objects"]
    with torch.inference_mode():
        results = detect(loaded.model, index, trained_run.data, trained_run.evaluate)
    assert results is not None
    for image_id, found in objects.items():
        expected = [result["score"] for result in results.bbox if result["image_id"] == int(image_id)]
        assert [one["score"] for one in found] == pytest.approx(expected, abs=1e-5)
    assert any(objects.values())


def test_the_middle_panel_shows_what_was_found_before(trained_run: Config, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(before(trained_run, finds=False)))
    nothing = draw(trained_run, tmp_path).read_bytes()
    (tmp_path / FILE_NAME).write_text(json.dumps(before(trained_run, finds=True)))
    path = draw(trained_run, tmp_path)
    first, last = differing_columns(path, nothing)
    panel, gap = 512, 8
    assert panel + gap <= first
    assert last <= 2 * panel + gap


def test_rows_of_images_of_any_size_have_one_size(trained_run: Config, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(before(trained_run, finds=True)))
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    assert len({tuple(size) for size in index.sizes.tolist()}) > 1
    with Image.open(draw(trained_run, tmp_path)) as picture:
        assert picture.width == 3 * 512 + 2 * 8
        assert picture.height < 4 * (512 + 8) + 60


@pytest.mark.parametrize("content", [None, {"data_hash": "another", "objects": {}}])
def test_nothing_is_drawn_of_other_data(trained_run: Config, tmp_path: Path, content: dict[str, object] | None) -> None:
    if content is not None:
        (tmp_path / FILE_NAME).write_text(json.dumps(content))
    assert not draw(trained_run, tmp_path).exists()


def test_a_damaged_file_is_an_error(trained_run: Config, tmp_path: Path) -> None:
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    object_ = {"label": 1, "score": 0.9, "bbox": [0, 0, 9, 9]}
    for damage in ({"label": 0}, {"bbox": [1]}, {"score": None}):
        content = {"data_hash": index.data_hash, "objects": {"1": [object_ | damage]}}
        (tmp_path / FILE_NAME).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"before\.json: objects\.1\.0\.{next(iter(damage))}.*; delete it"):
            read_before(tmp_path, index)
    (tmp_path / FILE_NAME).write_text(json.dumps(content | {"objects": {"1": [object_]}}))
    assert read_before(tmp_path, index) == {}  # none of the images that are drawn
