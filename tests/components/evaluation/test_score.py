"""Scores of a model that is still in training."""

from typing import Any

from mlflow.utils.validation import _validate_metric_name

from components import evaluate
from components.config import Config
from components.evaluation.detect import Results
from components.evaluation.score import class_metrics, evaluate_model, limits_that_bind
from components.runs.trained import load_trained
from model.scoring.backends import index_dataset
from model.scoring.coco import CocoEvaluation, Scores


def test_limits_of_detections_that_keep_ap_low_are_named() -> None:
    """120 objects of an image, 110 of a class."""
    records = [{"id": i, "image_id": 1, "category_id": 1 + (i >= 110), "bbox": [0, 0, 1, 1]} for i in range(120)]
    annotations = [record | {"iscrowd": 0, "area": 1} for record in records]
    crowds = [record | {"id": 500 + record["id"], "iscrowd": 1, "area": 1} for record in records]
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    truth = index_dataset({"images": [{"id": 1}], "annotations": annotations + crowds, "categories": categories})
    found = Results(records[:105], [], [], "box")
    assert limits_that_bind(truth, found, 110, 120) == []
    few, low = limits_that_bind(truth, found, 100, 100)
    assert "has 120 objects, but at most 100 are detected; train with a larger model.detections_per_image" in few
    assert "110 objects and 105 detections of one class, but only the surest 100 count" in low
    assert len(limits_that_bind(index_dataset({"images": [], "annotations": []}), found, 100, 100)) == 1


def test_model_in_training_scores_the_same_and_stays_in_training(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    model = load_trained(trained_run, "last").loaded.model.train()
    evaluation = evaluate_model(model, trained_run)
    assert evaluation.segm == evaluated[1]["segm"]
    assert model.training


def test_classes_that_differ_in_a_sign_keep_metrics_of_their_own() -> None:
    per_class: dict[str, Scores] = {"bolt [m4]": {"bbox": 0.1}, "bolt (m4)": {"bbox": 0.2}, "bolt": {"bbox": 0.3}}
    assert class_metrics(CocoEvaluation({}, per_class, {}, 1, 1)) == {
        "class_ap/bbox/bolt _m4_": 0.1,
        "class_ap/bbox/bolt _m4_ 2": 0.2,
        "class_ap/bbox/bolt": 0.3,
    }


def test_classes_of_any_name_have_metrics_that_mlflow_takes() -> None:
    names = [".", "..", "...", "a/b", "/", " ", "猫", "\n", "x" * 300, "x" * 300 + "y", "_", "a:b"]
    metrics = class_metrics(CocoEvaluation({}, {name: {"segm": 0.5} for name in names}, {}, 1, 1))
    assert len(metrics) == len(names)
    for name in metrics:
        _validate_metric_name(name)
        assert len(name) <= 250
