"""From detections to COCO results: hand-made boxes, sizes that differ by other factors in height and width, COCO's own
ids.
"""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from model.inference.postprocess import original_boxes, to_coco_results
from model.structures import Batch, Detections

IDS = (1, 17, 18, 90)  # of labels 1, 2, 3, 4


@pytest.fixture
def batch() -> Batch:
    """Two images: one was 3 times as high and 2 times as wide as the network sees it, one 2 and 4 times."""
    return Batch(
        images=torch.zeros(2, 3, 40, 40, dtype=torch.uint8),
        image_sizes=torch.tensor([[20, 40], [40, 10]], dtype=torch.int32),
        original_sizes=torch.tensor([[60, 80], [80, 40]], dtype=torch.int32),
        image_ids=torch.tensor([139, 42]),
        seeds=torch.zeros(2, dtype=torch.int64),
    )


def detections(with_masks: bool = True) -> Detections:
    """Two objects in the first image, one in the second; their masks fill their boxes."""
    boxes = torch.tensor([[[5.0, 2, 15, 8], [20, 10, 40, 20]], [[1, 10, 6, 30], [0, 0, 0, 0]]])
    return Detections(
        boxes=boxes,
        scores=torch.tensor([[0.75, 0.5], [0.25, 0]]),
        labels=torch.tensor([[3, 2], [4, 0]]),
        num_detections=torch.tensor([2, 1]),
        mask_probs=torch.ones(2, 2, 28, 28) if with_masks else None,
    )


EXPECTED = [  # x × 2, y × 3; x × 4, y × 2
    {"image_id": 139, "category_id": 18, "score": 0.75, "bbox": [10.0, 6.0, 20.0, 18.0]},
    {"image_id": 139, "category_id": 17, "score": 0.5, "bbox": [40.0, 30.0, 40.0, 30.0]},
    {"image_id": 42, "category_id": 90, "score": 0.25, "bbox": [4.0, 20.0, 20.0, 40.0]},
]


def test_boxes_come_back_to_the_pixels_of_the_file_each_side_by_its_own_factor(batch: Batch) -> None:
    expected = [[[10.0, 6, 30, 24], [40, 30, 80, 60]], [[4, 20, 24, 60], [0, 0, 0, 0]]]
    assert original_boxes(batch, detections()).tolist() == expected


@pytest.mark.parametrize("with_masks", [True, False])
def test_results_have_cocos_ids_and_boxes_of_width_and_height(batch: Batch, with_masks: bool) -> None:
    boxes, masks = to_coco_results(batch, detections(with_masks), IDS, "detectron2")
    assert boxes == EXPECTED
    common = [{name: value for name, value in box.items() if name != "bbox"} for box in boxes]
    without = [{name: value for name, value in mask.items() if name != "segmentation"} for mask in masks]
    assert without == (common if with_masks else [])


def test_masks_are_whole_images_of_the_file_with_the_object_in_its_box(batch: Batch) -> None:
    _, masks = to_coco_results(batch, detections(), IDS, "detectron2")
    for found, size, (x, y, width, height) in zip(
        masks, ([60, 80], [60, 80], [80, 40]), (box["bbox"] for box in EXPECTED), strict=True
    ):
        assert found["segmentation"]["size"] == size
        assert isinstance(found["segmentation"]["counts"], str)
        expected = np.zeros(size, np.uint8)
        expected[int(y) : int(y + height), int(x) : int(x + width)] = 1
        assert np.array_equal(coco_mask.decode(found["segmentation"]), expected)
