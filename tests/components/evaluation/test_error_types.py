"""Kinds of error and scores of images, on a scene that is counted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.evaluation.error_types import ErrorAnalysis, ImageScore, extremes
from model.errors import UserError

# (image, category, [x, y, width, height], crowd)
OBJECTS = [
    (1, 1, [0, 0, 10, 10], 0),
    (1, 2, [50, 50, 20, 20], 0),
    (2, 1, [0, 0, 10, 10], 0),
    (2, 1, [30, 30, 10, 10], 0),  # nobody finds it
    (2, 1, [60, 60, 30, 30], 1),
]
DETECTIONS = [
    (1, 1, [0, 0, 10, 10], 0.9),  # a hit
    (1, 1, [0, 0, 10, 10], 0.8),  # the same object again
    (1, 2, [0, 0, 10, 10], 0.7),  # the place of an object of the other class
    (1, 2, [50, 50, 20, 8], 0.6),  # IoU 0.4
    (1, 1, [50, 50, 20, 8], 0.55),  # IoU 0.4 with an object of the other class
    (1, 1, [80, 0, 10, 10], 0.5),  # nothing there
    (2, 1, [0, 0, 10, 10], 0.9),  # a hit
    (2, 1, [65, 65, 10, 10], 0.6),  # in the crowd: no error
    (2, 1, [90, 0, 5, 5], 0.2),  # nothing there, but unsure
]


def polygon(box: list[int]) -> list[list[int]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture
def scene(tmp_path: Path) -> tuple[ErrorAnalysis, Path]:
    """The analysis of OBJECTS, and DETECTIONS as a file of results that serves boxes and masks."""
    annotations = [
        {"id": k, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd,
         "segmentation": polygon(box)}
        for k, (image, category, box, crowd) in enumerate(OBJECTS)
    ]  # fmt: skip
    images = [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.jpg"} for i in (1, 2, 3)]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    truth: dict[str, Any] = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    results = [
        {"image_id": image, "category_id": category, "bbox": box, "segmentation": polygon(box), "score": score}
        for image, category, box, score in DETECTIONS
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return ErrorAnalysis(tmp_path / "truth.json"), tmp_path / "results.json"


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_each_kind_is_counted_as_by_hand(scene: tuple[ErrorAnalysis, Path], task: Any) -> None:
    analysis, results = scene
    found = {error.name: error.count for error in analysis.error_types(results, task).errors}
    assert found == {"class": 1, "localisation": 1, "both": 1, "duplicate": 1, "background": 2, "missed": 1}


def test_what_mending_a_kind_would_bring(scene: tuple[ErrorAnalysis, Path]) -> None:
    """Class a: 2 of 3 objects, both before any error: precision 1 at recalls 0 … 0.66, 67 of 101. Class
    b: none of 1.
    """
    analysis, results = scene
    types = analysis.error_types(results, "bbox")
    assert types.ap50 == pytest.approx(67 / 101 / 2)
    gain = {error.name: error.delta_ap for error in types.errors}
    # Mended, b's object is found, but behind a false alarm: precision 1/2. The missed object of a gone, a is perfect.
    assert gain["localisation"] == pytest.approx(0.5 / 2)
    assert gain["missed"] == pytest.approx((1 - 67 / 101) / 2)
    assert gain["duplicate"] == gain["background"] == 0  # false alarms behind the last hit cost nothing


def test_damaged_files_are_an_error(scene: tuple[ErrorAnalysis, Path], tmp_path: Path) -> None:
    analysis, results = scene
    for content in ("{}", "3", '[{"image_id": 1}]', '[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [1]}]'):
        results.write_text(content)
        for read in (analysis.error_types, analysis.image_scores):
            with pytest.raises(UserError, match=r"results\.json: .*; `maskrcnn evaluate` writes it anew"):
                read(results, "bbox")
    for content in ("[]", '{"images": [], "annotations": [{}], "categories": []}'):
        (tmp_path / "truth.json").write_text(content)
        with pytest.raises(UserError, match=r"truth\.json: .*; `maskrcnn prepare` writes it anew"):
            ErrorAnalysis(tmp_path / "truth.json")


def test_no_detection_at_all_misses_everything(scene: tuple[ErrorAnalysis, Path], tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    types = scene[0].error_types(tmp_path / "none.json", "segm")
    assert types.ap50 == 0
    assert {error.name: error.count for error in types.errors if error.count} == {"missed": 4}
    assert [score.missed for score in scene[0].image_scores(tmp_path / "none.json", "bbox")] == [2, 2]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_images_are_scored_by_their_sure_detections_worst_first(scene: tuple[ErrorAnalysis, Path], task: Any) -> None:
    """An image with neither object nor detection is no case."""
    first, second = scene[0].image_scores(scene[1], task)
    assert (first.image_id, first.hits, first.false_alarms, first.missed) == (1, 1, 5, 1)
    assert first.f1 == pytest.approx(2 / 8)
    assert (second.image_id, second.hits, second.false_alarms, second.missed) == (2, 1, 0, 1)
    assert second.f1 == pytest.approx(2 / 3)


def test_no_image_is_both_worst_and_best() -> None:
    scores = [
        ImageScore(1, 0.0, 0, 1, 1),
        ImageScore(2, 0.5, 1, 1, 1),
        ImageScore(3, 1.0, 1, 0, 0),
        ImageScore(4, 1.0, 5, 0, 0),
    ]
    worst, best = extremes(scores, 3)
    assert [score.image_id for score in worst] == [1, 2, 3]
    assert [score.image_id for score in best] == [4]
    worst, best = extremes(scores, 1)
    assert [score.image_id for score in worst] == [1]
    assert [score.image_id for score in best] == [4]  # of equal F1 the one with more objects
