"""Both evaluators against pycocotools called by hand: every precision and recall equal, bit for bit, and all twelve
scores.
"""

import contextlib
import copy
import io
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.data.rle import rle_runs
from model.errors import UserError
from model.scoring.backends import Backend, choose_backend, open_evaluator
from model.scoring.coco import evaluate_proposals, evaluate_results, load_ground_truth, summarize
from model.scoring.names import SCORE_NAMES, IouType

Results = list[dict[str, Any]]
BACKENDS: tuple[Backend, ...] = ("pycocotools", "hotcoco")
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")
CATEGORY_IDS = (1, 3, 44, 90, 7)  # not in order; 90 never has ground truth
SEEDS = range(32)
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_iou_type = pytest.mark.parametrize("iou_type", IOU_TYPES)


@dataclass(frozen=True)
class Case:
    """A ground truth and results of both iou_types."""

    dataset: dict[str, Any]
    results: dict[str, Results]


def random_case(seed: int) -> Case:
    """Some images, some without objects, some without detections; every eighth case has no detections, or no objects,
    at all.
    """
    rng = np.random.default_rng(seed)
    sizes = {int(i): (int(rng.integers(60, 400)), int(rng.integers(60, 400))) for i in rng.choice(1000, 8, False)}
    images = [{"id": i, "height": height, "width": width} for i, (height, width) in sizes.items()]
    annotations: Results = []
    found: dict[str, Results] = {"bbox": [], "segm": []}
    for image_id, size in sizes.items():
        objects = 0 if seed % 8 == 6 else rng.choice([0, 2, 5, 12])
        own = [random_annotation(rng, image_id, size) for _ in range(objects)]
        annotations += own
        repeats = 0 if seed % 8 == 7 else rng.choice([0, 1, 3, 40])
        for _ in range(repeats):
            for annotation in [*own, random_annotation(rng, image_id, size)]:
                add_result(rng, annotation, size, found)
    numbered = [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)]
    categories = [{"id": category_id, "name": f"class {category_id}"} for category_id in CATEGORY_IDS]
    return Case({"images": images, "annotations": numbered, "categories": categories}, found)


def random_annotation(rng: Generator, image_id: int, size: tuple[int, int]) -> dict[str, Any]:
    """An ellipse of any size, as polygon, or as crowd an RLE, packed or not; some say `ignore`."""
    width, height = (float(side) for side in np.exp(rng.uniform(np.log(4), np.log(400), 2)))
    x, y = float(rng.uniform(-5, size[1] - 5)), float(rng.uniform(-5, size[0] - 5))
    polygon = ellipse(x, y, width, height)
    rle = coco_mask.merge(coco_mask.frPyObjects([polygon], *size))
    is_crowd = bool(rng.random() < 0.15)
    text = rle["counts"].decode()
    crowd = {"size": list(size), "counts": text if rng.random() < 0.5 else rle_runs(text).tolist()}
    annotation = {
        "image_id": image_id,
        "category_id": int(rng.choice([c for c in CATEGORY_IDS if c != 90])),
        "bbox": [x, y, width, height],
        "area": float(coco_mask.area(rle)) if rng.random() < 0.7 else width * height,
        "iscrowd": int(is_crowd),
        "segmentation": crowd if is_crowd else [polygon],
    }
    return annotation | ({"ignore": 1} if rng.random() < 0.1 else {})


def add_result(rng: Generator, annotation: dict[str, Any], size: tuple[int, int], found: dict[str, Results]) -> None:
    """The object again, moved a little, its class sometimes wrong or unknown; of eleven scores, so that many tie."""
    x, y, width, height = annotation["bbox"]
    box = [x + rng.normal(0, 0.1) * width, y + rng.normal(0, 0.1) * height, width * rng.uniform(0.8, 1.2), height]
    common = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
    if rng.random() < 0.1:
        common["category_id"] = int(rng.choice([*CATEGORY_IDS, 5]))
    common["score"] = float(rng.integers(0, 11)) / 10
    rle = coco_mask.merge(coco_mask.frPyObjects([ellipse(*box)], *size))
    found["bbox"].append(common | {"bbox": [float(side) for side in box]})
    found["segm"].append(common | {"segmentation": {"size": list(size), "counts": rle["counts"].decode()}})


def ellipse(x: float, y: float, width: float, height: float) -> list[float]:
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    points = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], 1)
    return points.ravel().tolist()


def by_hand(dataset: dict[str, Any], results: Results, iou_type: IouType) -> COCOeval:
    """pycocotools alone, on copies of everything."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(dataset)
        coco.createIndex()
        found = coco.loadRes(copy.deepcopy(results)) if results else COCO()
        if not results:
            found.dataset = {**coco.dataset, "annotations": []}
            found.createIndex()
        evaluator = COCOeval(coco, found, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def assert_equal_to_pycocotools(path: Path, results: Results, iou_type: IouType, case: str) -> None:
    expected = by_hand(json.loads(path.read_text()), results, iou_type)
    scores = {name: None if value < 0 else value for name, value in zip(SCORE_NAMES, expected.stats, strict=True)}
    for backend in BACKENDS:
        evaluator = open_evaluator(backend, load_ground_truth(path))
        curves = evaluator.score(evaluator.load(results), iou_type)
        message = f"{case}, {iou_type}, {backend}"
        assert curves.precision.shape == expected.eval["precision"].shape, message
        assert np.array_equal(curves.precision, expected.eval["precision"]), message
        assert np.array_equal(curves.recall, expected.eval["recall"]), message
        assert summarize(curves) == scores, message


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [random_case(seed) for seed in SEEDS]


@by_iou_type
def test_random_cases_are_scored_as_by_pycocotools(cases: list[Case], tmp_path: Path, iou_type: IouType) -> None:
    path = tmp_path / "gt.json"
    for seed, case in enumerate(cases):
        path.write_text(json.dumps(case.dataset))
        assert_equal_to_pycocotools(path, case.results[iou_type], iou_type, f"seed {seed}")


def test_random_cases_hold_all_that_is_hard(cases: list[Case]) -> None:
    annotations = [annotation for case in cases for annotation in case.dataset["annotations"]]
    areas = np.array([annotation["area"] for annotation in annotations])
    assert all(part.sum() > 50 for part in (areas < 32**2, (areas > 32**2) & (areas < 96**2), areas > 96**2))
    forms = {type(a["segmentation"]["counts"]) for a in annotations if a["iscrowd"]}
    assert forms == {str, list}
    assert any("ignore" in annotation for annotation in annotations)
    assert sum(not case.results["bbox"] for case in cases) >= 4
    assert sum(not case.dataset["annotations"] for case in cases) >= 4
    assert {5, 90} < {result["category_id"] for case in cases for result in case.results["bbox"]}
    many, empty, undetected = 0, 0, 0
    for case in cases:
        found = Counter((result["image_id"], result["category_id"]) for result in case.results["bbox"])
        many += max(found.values(), default=0) > 100
        with_objects = {annotation["image_id"] for annotation in case.dataset["annotations"]}
        with_results = {image_id for image_id, _ in found}
        empty += bool(with_results - with_objects)
        undetected += bool(with_objects - with_results)
    assert min(many, empty, undetected) > 5


def test_annotations_of_coco_are_scored_as_by_pycocotools(either_coco: Path) -> None:
    path = either_coco / "annotations" / "instances_val2017.json"
    rng = np.random.default_rng(0)
    coco = load_ground_truth(path)
    found: dict[str, Results] = {"bbox": [], "segm": []}
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        for _ in range(rng.choice([0, 1, 2, 12])):
            add_result(rng, annotation, (image["height"], image["width"]), found)
    for result, annotation in zip(found["segm"], list(coco.anns.values())[::2], strict=False):
        shape = coco_mask.encode(coco.annToMask(annotation))  # COCO's outlines too, in their own image
        result |= {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        result["segmentation"] = {"size": list(shape["size"]), "counts": shape["counts"].decode()}
    assert any(annotation["iscrowd"] for annotation in coco.anns.values())
    for iou_type in IOU_TYPES:
        assert_equal_to_pycocotools(path, found[iou_type], iou_type, str(path))


@by_backend
def test_annotation_of_id_0_can_be_found(tmp_path: Path, backend: Backend) -> None:
    """pycocotools by itself takes a match with it for none."""
    box = {"image_id": 0, "category_id": 0, "bbox": [0, 0, 50, 50]}
    annotation = {**box, "id": 0, "area": 2500, "iscrowd": 0, "segmentation": [[0, 0, 50, 0, 50, 50]]}
    images, categories = [{"id": 0, "height": 60, "width": 60}], [{"id": 0, "name": "box"}]
    dataset = {"images": images, "annotations": [annotation], "categories": categories}
    assert by_hand(dataset, [{**box, "score": 0.9}], "bbox").stats[0] == 0.0
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(dataset))
    assert evaluate_results(path, [{**box, "score": 0.9}], [], backend=backend).bbox["AP"] == pytest.approx(1.0)


@by_backend
def test_results_are_not_changed_and_nothing_is_printed(
    cases: list[Case], capfd: pytest.CaptureFixture[str], tmp_path: Path, backend: Backend
) -> None:
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(cases[0].dataset))
    before = copy.deepcopy(cases[0].results)
    evaluate_results(path, cases[0].results["bbox"], cases[0].results["segm"], backend=backend)
    assert cases[0].results == before
    assert capfd.readouterr().out == ""


def test_one_ground_truth_serves_one_evaluator_after_the_other(cases: list[Case], tmp_path: Path) -> None:
    """pycocotools writes masks and flags into it."""
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(cases[1].dataset))
    results = cases[1].results
    fresh = evaluate_results(path, results["bbox"], results["segm"], backend="hotcoco")
    coco = load_ground_truth(path)
    for backend in ("pycocotools", "hotcoco", "pycocotools"):
        again = evaluate_results(coco, results["bbox"], results["segm"], backend=backend)
        assert (again.bbox, again.segm, again.per_class) == (fresh.bbox, fresh.segm, fresh.per_class)


def test_auto_is_hotcoco_where_it_is_installed() -> None:
    assert choose_backend("auto") == choose_backend("hotcoco") == "hotcoco"
    assert choose_backend("pycocotools") == "pycocotools"


def test_without_hotcoco_pycocotools_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an import of an absent package meets
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto") == choose_backend("auto") == "pycocotools"
    assert ["using pycocotools" in record.message for record in caplog.records] == [True]


def test_hotcoco_asked_for_and_absent_is_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(UserError, match=r"evaluate.backend.*pip install hotcoco.*auto or pycocotools"):
        choose_backend("hotcoco")


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposals_are_scored_as_pycocotools_does_without_categories(backend: Any, cases: list[Case]) -> None:
    for case in cases:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = copy.deepcopy(case.dataset)
            coco.createIndex()
        found = evaluate_proposals(coco, case.results["bbox"], backend=backend).scores["proposals"]
        if not case.results["bbox"]:
            assert set(found.values()) <= {0.0, None}
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            oracle = COCOeval(coco, coco.loadRes(copy.deepcopy(case.results["bbox"])), "bbox")
            oracle.params.useCats = 0
            oracle.params.maxDets = [100, 1000]
            oracle.evaluate()
            oracle.accumulate()
        recall = oracle.eval["recall"]  # [T, 1, A, M]
        expected = [recall[:, 0, area, limit].mean() for limit in (0, 1) for area in range(4)]
        assert list(found.values()) == [None if value < 0 else pytest.approx(value, abs=0) for value in expected]
