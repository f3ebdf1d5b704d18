"""Drawings are looked at by people; here only what a pixel can prove."""

from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from model.inference.visualize import draw_detections, side_by_side
from model.scoring.coco import load_ground_truth


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def rle(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def test_mask_is_tinted_inside_and_untouched_outside() -> None:
    mask = np.zeros((600, 800))
    mask[100:300, 200:400] = 1
    drawn = np.asarray(
        draw_detections(gray(600, 800), [[200, 100, 400, 300]], [1], class_names=["a"], masks=[rle(mask)])
    )
    assert drawn.shape == (600, 800, 3)
    inside = drawn[250, 350].astype(int)
    assert np.ptp(inside) > 20
    assert (drawn[400:] == 128).all()
    assert (drawn[:, 500:] == 128).all()


def test_instances_of_one_class_differ_in_colour() -> None:
    boxes = [[i * 100 + 20, 300, i * 100 + 80, 400] for i in range(6)]
    drawn = np.asarray(draw_detections(gray(600, 800), boxes, [1] * 6, class_names=["a"]))
    colors = {tuple(drawn[350, i * 100 + 20]) for i in range(6)}
    assert len(colors) == 6


def test_small_image_is_enlarged_and_keeps_its_proportions() -> None:
    drawn = draw_detections(gray(100, 128), np.zeros((0, 4)), [], class_names=["a"], scores=[], masks=[])
    assert drawn.size == (128 * 4, 100 * 4)


def test_surest_detection_lies_on_top() -> None:
    boxes = [[100, 300, 300, 500], [100, 300, 300, 500]]
    both = np.asarray(draw_detections(gray(600, 800), boxes, [1, 1], class_names=["a"], scores=[0.9, 0.6]))
    sure = np.asarray(draw_detections(gray(600, 800), boxes[:1], [1], class_names=["a"], scores=[0.9]))
    assert (both[400, 100] == sure[400, 100]).all()


def test_label_of_a_box_beyond_the_frame_stays_in_the_picture() -> None:
    blank = draw_detections(gray(600, 800), [[-50, -50, -10, -10]], [1], class_names=["far away"])
    assert (np.asarray(blank)[:40, :120] != 128).any()


def test_empty_mask_and_unusual_name_are_drawn() -> None:
    empty = rle(np.zeros((600, 800)))
    drawn = draw_detections(
        gray(600, 800), [[10, 10, 60, 60]], [1], class_names=["étoile ☆"], scores=[0.5], masks=[empty]
    )
    assert drawn.size == (800, 600)


def test_annotations_of_coco_with_crowds_are_drawn(either_coco: Path) -> None:
    coco = load_ground_truth(either_coco / "annotations" / "instances_val2017.json")
    image_id = next(a["image_id"] for a in coco.anns.values() if a["iscrowd"])
    record = coco.imgs[image_id]
    pixels = np.asarray(Image.open(either_coco / "val2017" / record["file_name"]).convert("RGB"))
    annotations = coco.imgToAnns[image_id]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (annotation["bbox"] for annotation in annotations)]
    masks = [coco.annToRLE(annotation) for annotation in annotations]
    drawn = draw_detections(pixels, boxes, [1] * len(boxes), class_names=["thing"], masks=masks)
    changed = (np.asarray(drawn) != pixels).any(axis=2)
    assert changed[coco_mask.decode(coco_mask.merge(masks)) > 0].mean() > 0.9


def test_side_by_side_is_as_wide_as_its_pictures() -> None:
    left, right = Image.new("RGB", (100, 50)), Image.new("RGB", (60, 80))
    row = side_by_side([left, right], ["ground truth", "predictions"])
    assert row.width == 100 + 60 + 8
    assert row.height > 80
