"""Detections equal Detectron2's: a state dict in its names, its conventions, its order of channels; see
make_detectron2_expectations.py.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.inference.postprocess import to_coco_results
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections
from model.weights.file import StoredWeights
from model.weights.load import fit_weights
from model.weights.names import rename_weights

from .make_detectron2_expectations import (
    DETECTIONS,
    LAYOUTS,
    NUM_CLASSES,
    ORIGINAL_SIZES,
    SIZES,
    STORED,
    draw_image,
    draw_weights,
)

COMMON: dict[str, Any] = {
    "conventions": "detectron2",
    "backbone": "resnet50",
    "weights": "none",
    "norm": "frozen_batch_norm",
    "stride_in_1x1": True,
    "pixel_order": "bgr",
    "pixel_mean": (103.53, 116.28, 123.675),
    "pixel_std": (1.0, 1.0, 1.0),
    "box_head_channels": 32,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_test": 50,
    "detections_per_image": DETECTIONS,
}
OURS: dict[str, dict[str, Any]] = {
    "c4": {"features": "c4", "box_head": "res5", "mask_head_convs": 0, "box_pool_size": 14, "mask_pool_size": 14},
    "c5": {"features": "c5", "res5_dilation": 2},
    "fpn": {},
    "gn": {"norm": "group_norm", "stride_in_1x1": False, "box_head": "conv"},
}


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=pytest.mark.slow if layout in ("c4", "c5") else ()) for layout in LAYOUTS]
)
def test_detections_are_detectron2s(layout: str) -> None:
    stored = np.load(STORED, allow_pickle=False)
    config = ModelConfig(**(COMMON | OURS[layout]))
    model = MaskRCNN(config, NUM_CLASSES).eval()
    weights = draw_weights(json.loads(str(stored[f"{layout}/shapes"])))
    report = fit_weights(model, rename_weights(StoredWeights(weights), config, layout), layout)
    assert not report.initialised
    assert not report.unused
    for i, size in enumerate(SIZES):
        with torch.inference_mode():
            found = model(one_image(size))
        boxes, scores, classes, masks = (torch.from_numpy(stored[f"{layout}/{i}/{name}"]) for name in NAMES)
        assert found.num_detections.tolist() == [len(boxes)]
        assert len(boxes) >= 5, "the weights of this test must find something"
        torch.testing.assert_close(found.scores[0], scores, rtol=0, atol=1e-4)
        assert torch.equal(found.labels[0], classes + 1)
        torch.testing.assert_close(found.boxes[0], boxes, rtol=0, atol=0.01)
        torch.testing.assert_close(found.mask_probs[0], masks.float() / 255, rtol=0, atol=0.5 / 255 + 1e-3)
        with_their_masks = replace(found, mask_probs=masks[None].float() / 255)
        assert_same_results(
            with_their_masks,
            i,
            torch.from_numpy(stored[f"{layout}/{i}/original_boxes"]),
            stored[f"{layout}/{i}/codes"].tolist(),
        )


def assert_same_results(found: Detections, i: int, boxes: Tensor, codes: list[str]) -> None:
    """Boxes and masks in the pixels of the original image are those of Detectron2's detector_postprocess.

    Boxes are equal within 0.01 px, so one pixel of a mask may tip; of a small mask that is more than a thousandth.
    """
    size = ORIGINAL_SIZES[i]
    batch = one_image(SIZES[i], size)
    bbox, segm = to_coco_results(batch, found, category_ids=range(1, NUM_CLASSES + 1), conventions="detectron2")
    xywh = torch.tensor([result["bbox"] for result in bbox])
    torch.testing.assert_close(torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1), boxes, rtol=0, atol=0.02)
    for ours, code in zip(segm, codes, strict=True):
        theirs = {"size": list(size), "counts": code}
        ours_and_theirs = [ours["segmentation"], theirs]
        union, both = (int(coco_mask.area(coco_mask.merge(ours_and_theirs, intersect))) for intersect in (False, True))
        assert union - both <= max(1, union // 1000)


NAMES = ("boxes", "scores", "classes", "masks")


def one_image(size: tuple[int, int], original_size: tuple[int, int] | None = None) -> Batch:
    sizes, original_sizes = (torch.tensor([each], dtype=torch.int32) for each in (size, original_size or size))
    nothing = torch.zeros(1, dtype=torch.int64)
    return Batch(draw_image(size)[None], sizes, original_sizes, image_ids=nothing, seeds=nothing)
