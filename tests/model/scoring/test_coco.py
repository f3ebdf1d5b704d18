"""Our evaluation against pycocotools called by hand, on perturbed ground truth of images like COCO's."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.scoring.backends import AnyBackend, index_dataset
from model.scoring.coco import CocoEvaluation, evaluate_proposals, evaluate_results, load_ground_truth
from model.scoring.names import SCORE_NAMES

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ground_truth(coco_like: Path) -> Path:
    return coco_like / "annotations" / "instances_val2017.json"


@pytest.fixture(scope="module")
def results(ground_truth: Path) -> tuple[Results, Results]:
    return perturbed(load_ground_truth(ground_truth), seed=0)


@pytest.fixture(scope="module")
def evaluation(ground_truth: Path, results: tuple[Results, Results]) -> CocoEvaluation:
    return evaluate_results(ground_truth, *results)


def perturbed(coco: COCO, *, seed: int) -> tuple[Results, Results]:
    """Shifted and relabelled ground truth, crowds too, some of it many times over; scores of one digit, so that many
    tie.
    """
    rng = random.Random(seed)
    bbox, segm = [], []
    category_ids = coco.getCatIds()
    for annotation in coco.anns.values():
        for _ in range(rng.choice([0, 1, 1, 2, 12])):
            x, y, width, height = annotation["bbox"]
            box = [x + rng.uniform(-0.2, 0.2) * width, y + rng.uniform(-0.2, 0.2) * height, width, height]
            category_id = annotation["category_id"] if rng.random() < 0.8 else rng.choice(category_ids)
            common = {"image_id": annotation["image_id"], "category_id": category_id, "score": rng.randint(0, 9) / 10}
            rle = coco.annToRLE(annotation)
            counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
            bbox.append({**common, "bbox": box})
            segm.append({**common, "segmentation": {"size": list(rle["size"]), "counts": counts}})
    return bbox, segm


def by_hand(path: Path, results: Results, task: str) -> COCOeval:
    coco = COCO(str(path))
    evaluator = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), task)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores_are_those_of_pycocotools(
    ground_truth: Path, results: tuple[Results, Results], evaluation: CocoEvaluation, task: str
) -> None:
    expected = by_hand(ground_truth, results[task == "segm"], task)
    ours = getattr(evaluation, task)
    assert list(ours) == list(SCORE_NAMES)
    assert list(ours.values()) == expected.stats.tolist()
    assert ours["AP"] == pytest.approx(evaluation.precision[task].mean())
    assert evaluation.precision[task][0].mean() == pytest.approx(ours["AP50"])


def test_case_has_crowds_ties_and_more_than_100_detections(
    ground_truth: Path, results: tuple[Results, Results]
) -> None:
    coco = load_ground_truth(ground_truth)
    assert any(annotation["iscrowd"] for annotation in coco.anns.values())
    per_image = np.unique([result["image_id"] for result in results[0]], return_counts=True)[1]
    assert per_image.max() > 100


def test_per_class_ap_is_that_of_the_class_evaluated_alone(
    ground_truth: Path, results: tuple[Results, Results], evaluation: CocoEvaluation
) -> None:
    coco = load_ground_truth(ground_truth)
    person = COCOeval(coco, coco.loadRes(copy.deepcopy(results[1])), "segm")
    person.params.catIds = coco.getCatIds(catNms=["person"])
    person.evaluate()
    person.accumulate()
    person.summarize()
    assert evaluation.per_class["person"]["segm"] == pytest.approx(person.stats[0])
    assert set(evaluation.per_class) == {category["name"] for category in coco.cats.values()}


def test_perfect_boxes_score_1(ground_truth: Path) -> None:
    coco = load_ground_truth(ground_truth)
    real = [annotation for annotation in coco.anns.values() if not annotation["iscrowd"]]
    bbox = [{**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 1.0} for a in real]
    assert evaluate_results(coco, bbox, []).bbox["AP"] == pytest.approx(1.0)


def test_no_results_score_0(ground_truth: Path) -> None:
    coco = load_ground_truth(ground_truth)
    evaluation = evaluate_results(coco, [], [])
    assert evaluation.bbox["AP"] == evaluation.segm["AP"] == evaluation.segm["AR100"] == 0.0
    assert (evaluation.num_images, evaluation.num_detections) == (len(coco.imgs), 0)


def test_absent_sizes_and_classes_have_no_score(tmp_path: Path) -> None:
    square = [0.0, 0.0, 100.0, 0.0, 100.0, 100.0, 0.0, 100.0]
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 100, 100], "area": 10000, "iscrowd": 0}
    path = tmp_path / "gt.json"
    images = [{"id": 1, "height": 120, "width": 120, "file_name": "a.jpg"}]
    dataset = {"images": images, "categories": [{"id": 7, "name": "box"}, {"id": 9, "name": "none"}]}
    path.write_text(json.dumps({**dataset, "annotations": [{**annotation, "segmentation": [square]}]}))
    result = {"image_id": 1, "category_id": 7, "score": 0.9, "bbox": [0, 0, 100, 100]}
    evaluation = evaluate_results(path, [result], [])
    assert evaluation.bbox["APl"] == pytest.approx(1.0)
    assert evaluation.bbox["APs"] is None
    assert evaluation.bbox["AP"] == pytest.approx(1.0)
    assert evaluation.per_class["none"] == {"bbox": None, "segm": None}


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_ap_counts_as_many_detections_as_asked_and_the_named_recalls_stay(backend: Any) -> None:
    """120 objects of a class, each found exactly: 100 of them give a recall of 100/120."""
    boxes = [[i % 12 * 8, i // 12 * 6, 6, 4] for i in range(120)]
    image = {"id": 1, "height": 100, "width": 100, "file_name": "a.jpg"}
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 24}
    annotations = [common | {"id": i, "bbox": one} for i, one in enumerate(boxes, 1)]
    coco = index_dataset({"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]})
    found = [{"image_id": 1, "category_id": 1, "bbox": one, "score": 0.9} for one in boxes]
    scores = {
        limit: evaluate_results(coco, found, None, backend=backend, max_detections=limit) for limit in (50, 100, 120)
    }
    assert {limit: of_limit.bbox["ARs"] for limit, of_limit in scores.items()} == pytest.approx(
        {50: 50 / 120, 100: 100 / 120, 120: 1.0}
    )
    assert {limit: of_limit.bbox["AP"] for limit, of_limit in scores.items()} == pytest.approx(
        {50: 42 / 101, 100: 84 / 101, 120: 1.0}
    )
    assert scores[120].per_class["a"]["bbox"] == pytest.approx(1.0)
    assert scores[120].precision["bbox"].min() == pytest.approx(1.0)
    for of_limit in scores.values():
        named = [of_limit.bbox[name] for name in ("AR1", "AR10", "AR100")]
        assert named == pytest.approx([1 / 120, 10 / 120, 100 / 120])


def test_result_of_an_unknown_image_is_refused(ground_truth: Path) -> None:
    stray = {"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    with pytest.raises(ValueError, match=r"got others: \[5\]"):
        evaluate_results(ground_truth, [stray], [])


def box(x: float, side: float, score: float = 0.5, category: int = 1) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": [x, 0.0, side, side], "score": score}


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
def test_recall_of_proposals_by_hand(tmp_path: Path, backend: AnyBackend) -> None:
    """Two objects, small and medium. The first is found whole, by the 151st best box and whatever its class; the second
    to an IoU of 0.75.
    """
    objects = [box(0, 10), box(100, 40, category=2)]
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": o["category_id"],
            "bbox": o["bbox"],
            "area": o["bbox"][2] ** 2,
            "iscrowd": 0,
        }
        for i, o in enumerate(objects, 1)
    ]
    classes = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    images = [{"id": 1, "width": 1000, "height": 1000}]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": classes}))
    found = [box(500 + i, 20, 0.9) for i in range(149)] + [box(0, 10, 0.5, category=2)]
    found.append({**box(100, 40, 0.95), "bbox": [100.0, 0.0, 40.0, 30.5]})  # IoU 0.7625: at 0.50, 0.55, … 0.75
    evaluation = evaluate_proposals(path, found, backend=backend)
    assert list(evaluation.scores) == ["proposals"]
    scores = evaluation.scores["proposals"]
    assert scores == pytest.approx(
        {
            "AR100": 0.3, "ARs100": 0.0, "ARm100": 0.6, "ARl100": None,
            "AR1000": 0.8, "ARs1000": 1.0, "ARm1000": 0.6, "ARl1000": None,
        }
    )  # fmt: skip
    assert evaluation.main_score == pytest.approx(0.8)


def test_boxes_alone_are_scored_without_masks(ground_truth: Path, results: tuple[Results, Results]) -> None:
    both, alone = evaluate_results(ground_truth, *results), evaluate_results(ground_truth, results[0], None)
    assert alone.bbox == both.bbox
    assert list(alone.scores) == list(alone.precision) == ["bbox"]
    assert {name: scores["bbox"] for name, scores in both.per_class.items()} == {
        name: scores["bbox"] for name, scores in alone.per_class.items()
    }
    assert (alone.main_score, both.main_score) == (both.bbox["AP"], both.segm["AP"])
