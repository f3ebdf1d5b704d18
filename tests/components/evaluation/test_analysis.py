"""Analysis of detections: by hand on a small scene, and against pycocotools and plain NumPy on generated results."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from components.benchmarks.synthetic_coco import ground_truth, place_objects, synthetic_results
from components.evaluation.analysis import analyse, best_point, curves
from components.evaluation.detect import Results
from model.scoring.backends import open_evaluator
from model.scoring.coco import load_ground_truth

# (given id, image, category, [x, y, width, height], crowd)
OBJECTS = [
    (70, 1, 1, [0, 0, 10, 10], 0),
    (71, 1, 2, [50, 50, 20, 20], 0),  # found as class a
    (72, 2, 1, [0, 0, 40, 40], 0),
    (73, 2, 1, [60, 60, 30, 30], 1),
]
DETECTIONS = [
    (1, 1, [0, 0, 10, 10], 0.9),  # a hit
    (1, 1, [50, 50, 20, 18], 0.8),  # the place of an object of class b, IoU 0.9
    (2, 1, [0, 0, 40, 40], 0.7),  # a hit
    (2, 1, [65, 65, 10, 10], 0.95),  # in the crowd: does not count
    (2, 1, [90, 0, 5, 5], 0.6),  # nothing there
    (3, 2, [20, 20, 9, 9], 0.3),  # nothing there, but unsure
]
IMAGES = 30


def polygon(box: list[int]) -> list[list[int]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture(scope="module", params=["box", "mask"])
def by_hand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    annotations = [
        {"id": given, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
         "iscrowd": crowd, "segmentation": polygon(box)}
        for given, image, category, box, crowd in OBJECTS
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("scene") / "truth.json"
    images = [{"id": i, "width": 100, "height": 100} for i in (1, 2, 3)]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    found = [
        {"image_id": image, "category_id": category, "bbox": box, "segmentation": polygon(box), "score": score}
        for image, category, box, score in DETECTIONS
    ]
    return analyse(load_ground_truth(path), Results(found, found, [], request.param), 100)


def test_the_best_threshold_lies_between_the_last_that_is_kept_and_the_first_that_is_not(by_hand: dict[str, Any]):
    """Class a in falling order: hit, miss, hit, miss; 2 objects. F1: 2/3, 1/2, 4/5, 4/6."""
    best = by_hand["best"]
    assert best["per_class"]["a"] == pytest.approx({"threshold": 0.65, "precision": 2 / 3, "recall": 1, "f1": 0.8})
    assert best["per_class"]["b"] == {"threshold": None, "precision": None, "recall": 0, "f1": 0}
    # Of 3 objects: F1 2/4, 2/5, 4/6, 4/7.
    assert best["all"] == pytest.approx({"threshold": 0.65, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})


def test_the_confusion_matrix_has_what_was_annotated_in_rows_and_what_was_found_in_columns(by_hand: dict[str, Any]):
    """Without what lies below the thresholds, and without the detection in the crowd."""
    assert by_hand["confusion"]["classes"] == ["a", "b"]
    assert by_hand["confusion"]["matrix"] == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_likely_label_errors_have_the_ids_of_the_users_file(by_hand: dict[str, Any]):
    found = by_hand["label_errors"]
    assert found["count"] == 2
    wrong, missing = found["likeliest"]
    assert (wrong["kind"], wrong["annotation_id"], wrong["class"], wrong["annotated_class"]) == (
        "wrong_label",
        71,
        "a",
        "b",
    )
    assert (wrong["image_id"], wrong["score"], wrong["iou"], wrong["detection"]) == (1, 0.8, 0.9, 1)
    assert (missing["kind"], missing["annotation_id"], missing["image_id"], missing["score"]) == (
        "missing_annotation", None, 2, 0.6,
    )  # fmt: skip


def test_slices_count_objects_and_images(by_hand: dict[str, Any]):
    crowding = {one["slice"]: one for one in by_hand["slices"]["crowding"]}
    assert {name: (one["images"], one["objects"]) for name, one in crowding.items()} == {"0": (1, 0), "1 to 2": (2, 3)}
    assert crowding["0"]["AP"] is crowding["0"]["recall"] is crowding["0"]["precision"] is None
    assert crowding["1 to 2"]["precision"] == crowding["1 to 2"]["recall"] == pytest.approx(2 / 3)
    assert [(one["slice"], one["objects"]) for one in by_hand["slices"]["size"]] == [
        ("small", 2), ("medium", 1), ("large", 0),
    ]  # fmt: skip


def test_a_bin_without_detections_has_no_share_of_hits(by_hand: dict[str, Any]):
    bins = by_hand["calibration"]["bins"]
    assert [(one["detections"], one["confidence"], one["hits"]) for one in (bins[2], bins[3], bins[9])] == [
        (0, None, None), (1, 0.3, 0), (1, 0.9, 1),
    ]  # fmt: skip


def test_without_detections_there_is_no_threshold(by_hand: dict[str, Any], tmp_path: Path):
    truth = {"images": [{"id": 1, "width": 9, "height": 9}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = analyse(load_ground_truth(tmp_path / "truth.json"), Results([], [], [], "box"), 100)
    assert found["best"]["all"] == {"threshold": None, "precision": None, "recall": None, "f1": None}
    assert found["calibration"]["ece"] is None
    assert found["confusion"]["matrix"] == [[0, 0], [0, 0]]
    assert set(found["curves"]["all"]["f1"]) == {None}
    json.dumps(found, allow_nan=False)
    assert found.keys() == by_hand.keys()


def test_equal_scores_are_kept_or_dropped_together():
    scores, is_hit = np.array([0.5, 0.5, 0.5, 0.2]), np.array([True, False, False, True])
    # Not F1 2/3 of the first alone: 1 of 3 kept, F1 2/5; all 4: 4/6.
    assert best_point(scores, is_hit, 2) == pytest.approx(
        {"threshold": 0.2, "precision": 0.5, "recall": 1, "f1": 2 / 3}
    )


def test_curves_count_detections_that_score_exactly_the_confidence():
    found = curves(np.array([0.5, 0.25]), np.array([True, False]), 2)
    assert [found["precision"][k] for k in (0, 25, 26, 50, 51)] == [0.5, 0.5, 1, 1, None]
    assert [found["recall"][k] for k in (0, 50, 51)] == [0.5, 0.5, 0]
    assert [found["f1"][k] for k in (0, 50, 51)] == [0.5, 0.6667, 0]


@pytest.fixture(scope="module", params=["bbox", "segm"])
def generated(request: pytest.FixtureRequest) -> tuple[str, COCO, list[dict[str, Any]], dict[str, Any], COCOeval]:
    """Ground truth with crowds, results, their analysis, and pycocotools' matches of them."""
    rng = np.random.default_rng(3)
    objects = place_objects(rng, IMAGES)
    dataset = ground_truth(rng, objects, IMAGES)
    for annotation in dataset["annotations"]:
        annotation["given_id"] = annotation["id"]
    dataset["annotations"][0]["iscrowd"] = 1
    dataset["annotations"][0]["segmentation"] = coco_mask.merge(
        coco_mask.frPyObjects(dataset["annotations"][0]["segmentation"], 480, 640)
    )
    results = synthetic_results(rng, objects, request.param, 20)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        oracle = COCOeval(truth, open_evaluator("pycocotools", truth).load(results), request.param)
        oracle.evaluate()
    kept = Results(results, results, [], "box" if request.param == "bbox" else "mask")
    dataset["annotations"][0]["segmentation"]["counts"] = dataset["annotations"][0]["segmentation"]["counts"].decode()
    return request.param, truth, results, analyse(truth, kept, 100), oracle


def matched(oracle: COCOeval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, categories and hits at IoU 0.5, of the detections that count."""
    rows = [
        (score, cell["category_id"], match > 0)
        for cell in oracle.evalImgs
        if cell is not None and cell["aRng"] == [0, 1e10]
        for score, match, ignored in zip(cell["dtScores"], cell["dtMatches"][0], cell["dtIgnore"][0], strict=True)
        if not ignored
    ]
    scores, categories, hits = zip(*rows, strict=True)
    return np.array(scores), np.array(categories), np.array(hits)


def test_best_thresholds_are_those_of_trying_every_score(generated: Any):
    _, truth, _, found, oracle = generated
    scores, categories, hits = matched(oracle)
    for category_id in sorted(truth.cats):
        best = found["best"]["per_class"][truth.cats[category_id]["name"]]
        of_class = categories == category_id
        objects = sum(a["category_id"] == category_id and not a["iscrowd"] for a in truth.anns.values())
        tried = []
        for least in scores[of_class]:
            kept = of_class & (scores >= least)
            tried.append(2 * hits[kept].sum() / (kept.sum() + objects))
        if not hits[of_class].any():
            assert best["threshold"] is None
            continue
        assert best["f1"] == pytest.approx(max(tried))
        kept = of_class & (scores >= best["threshold"])
        assert best["precision"] == pytest.approx(hits[kept].mean())
        assert best["recall"] == pytest.approx(hits[kept].sum() / objects)
        assert best["f1"] == pytest.approx(2 * hits[kept].sum() / (kept.sum() + objects))


def test_calibration_is_that_of_numpy(generated: Any):
    scores, _, hits = matched(generated[4])
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = [abs(hits[bins == k].mean() - scores[bins == k].mean()) * (bins == k).mean() for k in range(10) if k in bins]
    found = generated[3]["calibration"]
    assert found["ece"] == pytest.approx(sum(gaps))
    assert [one["detections"] for one in found["bins"]] == np.bincount(bins, minlength=10).tolist()
    assert [one["hits"] for one in found["bins"] if one["detections"]] == [
        round(hits[bins == k].mean(), 4) for k in range(10) if k in bins
    ]


def test_slices_are_those_of_pycocotools_on_their_images(generated: Any):
    iou_type, truth, results, found, _ = generated
    counts = {i: sum(not a["iscrowd"] for a in truth.imgToAnns[i]) for i in truth.imgs}
    oracle = COCOeval(truth, open_evaluator("pycocotools", truth).load(results), iou_type)
    oracle.params.imgIds = [image_id for image_id, count in counts.items() if 6 <= count <= 10]
    with contextlib.redirect_stdout(io.StringIO()):
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    (one,) = (one for one in found["slices"]["crowding"] if one["slice"] == "6 to 10")
    assert one["images"] == len(oracle.params.imgIds)
    assert (one["AP"], one["AP50"]) == pytest.approx(tuple(oracle.stats[:2]))


def test_confusions_are_those_of_a_greedy_loop(generated: Any):
    iou_type, truth, results, found, _ = generated
    category_ids = sorted(truth.cats)
    best = found["best"]
    expected = np.zeros((len(category_ids) + 1,) * 2, dtype=int)
    key = "bbox" if iou_type == "bbox" else "segmentation"
    for image_id in truth.imgs:
        objects = [a for a in truth.imgToAnns[image_id] if not a["iscrowd"]]
        crowds = [a for a in truth.imgToAnns[image_id] if a["iscrowd"]]
        own = sorted((r for r in results if r["image_id"] == image_id), key=lambda r: -r["score"])
        free = set(range(len(objects)))
        for result in own:
            threshold = best["per_class"][truth.cats[result["category_id"]]["name"]]["threshold"]
            if result["score"] < (best["all"]["threshold"] if threshold is None else threshold):
                continue
            shapes = [a["bbox"] if key == "bbox" else truth.annToRLE(a) for a in (*objects, *crowds)]
            flags = [a["iscrowd"] for a in (*objects, *crowds)]
            ious = coco_mask.iou([result[key]], shapes, flags)[0] if shapes else []
            column = category_ids.index(result["category_id"])
            chosen = max((k for k in free if ious[k] >= 0.5), key=lambda k: ious[k], default=None)
            is_hit_of_crowd = any(
                iou >= 0.5 and a["category_id"] == result["category_id"]
                for iou, a in zip(ious[len(objects) :], crowds, strict=True)
            )
            if chosen is None and is_hit_of_crowd:
                continue
            if chosen is None:
                expected[-1, column] += 1
            else:
                free.remove(chosen)
                expected[category_ids.index(objects[chosen]["category_id"]), column] += 1
        for k in free:
            expected[category_ids.index(objects[k]["category_id"]), -1] += 1
    assert found["confusion"]["matrix"] == expected.tolist()
