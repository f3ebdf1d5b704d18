"""AP of resampled images, against pycocotools on data sets in which the images stand as often as they were drawn."""

from typing import Any

import numpy as np
import pytest

from components.benchmarks.synthetic_coco import ground_truth, place_objects, synthetic_results
from model.scoring.backends import index_dataset
from model.scoring.bootstrap import match_images, resampled_ap
from model.scoring.coco import IOU_THRESHOLDS, evaluate_results
from model.scoring.names import IouType

IMAGES = 12
LIMIT = 3  # detections per image and class, few enough to bind


def drawn(
    dataset: dict[str, Any], results: list[dict[str, Any]], counts: np.ndarray
) -> tuple[dict[str, Any], list[Any]]:
    """A data set and its results with image k as often as counts[k]."""
    images: list[Any] = []
    annotations: list[Any] = []
    found: list[Any] = []
    for image, count in zip(dataset["images"], counts, strict=True):
        for _ in range(count):
            images.append({**image, "id": len(images) + 1})
            own = [one for one in dataset["annotations"] if one["image_id"] == image["id"]]
            annotations += [{**one, "image_id": len(images)} for one in own]
            found += [{**one, "image_id": len(images)} for one in results if one["image_id"] == image["id"]]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    return {"images": images, "annotations": annotations, "categories": dataset["categories"]}, found


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ap_of_a_resample_is_pycocotools_of_its_images_each_as_often_as_it_was_drawn(iou_type: IouType):
    rng = np.random.default_rng(5)
    objects = place_objects(rng, IMAGES)
    dataset, results = ground_truth(rng, objects, IMAGES), synthetic_results(rng, objects, iou_type, 30)
    dataset["annotations"][0] |= {"iscrowd": 1}
    counts = np.vstack([np.ones(IMAGES, dtype=int), rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=3)])
    assert counts.max() > 2
    matches = match_images(index_dataset(dataset), results, iou_type, LIMIT)
    found = resampled_ap(matches, counts)
    for ap, count in zip(found, counts, strict=True):
        truth, kept = drawn(dataset, results, count)
        boxes, masks = (kept, None) if iou_type == "bbox" else ([], kept)
        evaluation = evaluate_results(index_dataset(truth), boxes, masks, backend="pycocotools", max_detections=LIMIT)
        expected = [evaluation.scores[iou_type][name] for name in ("AP", "AP50", "AP75")]
        at_50, at_75 = IOU_THRESHOLDS.index(0.5), IOU_THRESHOLDS.index(0.75)
        assert [ap.mean(), ap[at_50], ap[at_75]] == pytest.approx(expected, abs=1e-12)


def test_many_resamples_are_computed_in_parts_of_limited_memory(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(5)
    objects = place_objects(rng, IMAGES)
    dataset, results = ground_truth(rng, objects, IMAGES), synthetic_results(rng, objects, "bbox", 30)
    matches = match_images(index_dataset(dataset), results, "bbox", 100)
    counts = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=7)
    whole = resampled_ap(matches, counts)
    monkeypatch.setattr("model.scoring.bootstrap._CHUNK", 3 * max(len(one.images) for one in matches))
    assert np.array_equal(resampled_ap(matches, counts), whole)


def test_a_resample_without_objects_has_no_ap_and_a_class_without_objects_does_not_count():
    images = [{"id": i, "width": 50, "height": 50} for i in (1, 2, 3)]
    box = [0.0, 0.0, 10.0, 10.0]
    annotations = [
        {"id": k, "image_id": k, "category_id": k, "bbox": box, "area": 100.0, "iscrowd": 0} for k in (1, 2)
    ]  # image 3 is empty
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    truth = index_dataset({"images": images, "annotations": annotations, "categories": categories})
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9},
        {"image_id": 3, "category_id": 3, "bbox": box, "score": 0.9},
    ]
    matches = match_images(truth, results, "bbox", 100)
    found = resampled_ap(matches, np.array([[1, 1, 1], [3, 0, 0], [0, 3, 0], [0, 0, 3]])).mean(axis=1)
    assert found[:3].tolist() == [0.5, 1, 0]
    assert np.isnan(found[3])
