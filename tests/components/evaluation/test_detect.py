"""Detections of a whole split."""

import pytest
import torch
from pycocotools import mask as coco_mask

from components.config import Config
from components.evaluation.detect import detect
from components.runs.trained import load_trained
from model.config import EvaluateConfig
from model.data.index import CocoIndex


def test_batch_size_changes_no_result(trained_run: Config) -> None:
    model = load_trained(trained_run, "last").loaded.model
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    one, four = (detect(model, index, trained_run.data, EvaluateConfig(batch_size=size)) for size in (1, 4))
    assert len(one.bbox) == len(four.bbox) > 0
    for a, b in zip(one.segm, four.segm, strict=True):
        assert a["image_id"] == b["image_id"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        areas = [int(coco_mask.area(result["segmentation"])) for result in (a, b)]
        assert areas[0] == pytest.approx(areas[1], rel=0.01, abs=2)


def test_several_scales_and_sides_reach_the_results(trained_run: Config) -> None:
    """Each image is found once, in pixels of its file, whatever the scales and processes' batches."""
    model = load_trained(trained_run, "last").loaded.model
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    options = {"scales": (1.0, 0.7, 1.5), "flip": True, "soft_nms": "gaussian"}
    one, four = (
        detect(model, index, trained_run.data, EvaluateConfig(batch_size=size, **options), keep_tensors=True)
        for size in (1, 4)
    )
    assert {result["image_id"] for result in one.bbox} == set(index.image_ids.tolist())
    assert len(one.bbox) == len(four.bbox) == len(one.segm)
    scores = [[result["score"] for result in results.bbox] for results in (one, four)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for image in one.tensors:
        height, width = image["size"]
        assert (image["boxes"] <= torch.tensor([width, height, width, height]) + 1e-2).all()
