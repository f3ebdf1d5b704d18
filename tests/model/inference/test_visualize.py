"""Drawings are looked at by people; here only what a pixel can prove."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from model.inference import visualize
from model.inference.colors import class_color
from model.inference.visualize import draw_objects, grid, side_by_side
from model.scoring.coco import load_ground_truth


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def draw_detections(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    class_names: Sequence[str],
    longer_side_px: int | None = None,
    **columns: Sequence[Any],
) -> Image.Image:
    """Draw the objects of a table; `scores` and `masks` are further columns."""
    keys = {"scores": "score", "masks": "segmentation"}
    objects = [
        {"label": label, "bbox": box} | {keys[name]: column[i] for name, column in columns.items()}
        for i, (label, box) in enumerate(zip(labels, boxes, strict=True))
    ]
    return draw_objects(image, objects, class_names, longer_side_px=longer_side_px)


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


def test_a_class_has_one_colour_in_ground_truth_and_predictions() -> None:
    boxes = [[i * 100 + 20, 300, i * 100 + 80, 400] for i in range(6)]
    labels = [1, 2, 1, 2, 1, 2]
    truth = np.asarray(draw_detections(gray(600, 800), boxes, labels, class_names=["a", "b"]))
    scores = [0.9, 0.6, 0.8, 0.7, 0.5, 0.4]
    found = np.asarray(
        draw_detections(gray(600, 800), boxes[::-1], labels[::-1], class_names=["a", "b"], scores=scores)
    )
    for drawn in (truth, found):
        assert [tuple(drawn[350, i * 100 + 20]) for i in range(6)] == [class_color(label) for label in labels]


def test_colours_of_seven_classes_differ_with_each_kind_of_colour_blindness() -> None:
    """Machado et al. (2009), severity 1: no red, green or blue cones."""
    matrices = (
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    )
    linear = (np.array([class_color(label) for label in range(1, 8)]) / 255) ** 2.2
    for matrix in (np.eye(3), *np.array(matrices)):
        seen = 255 * np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen, axis=2)
        assert distances[~np.eye(7, dtype=bool)].min() > 25
    assert len({class_color(label) for label in range(1, 22)}) == 21


def labels_of(boxes: list[list[int]], names: list[str], size: tuple[int, int] = (600, 800)) -> int:
    """The number of labels that are drawn; none covers another."""
    places: list[visualize.Corners] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "_draw_label", lambda draw, text, place, *style: places.append(place))
        draw_detections(gray(*size), boxes, list(range(1, len(boxes) + 1)), class_names=names)
    for k, (x1, y1, x2, y2) in enumerate(places):
        assert 0 <= x1 < x2 <= size[1]
        assert 0 <= y1 < y2 <= size[0]
        for left, upper, right, lower in places[:k]:
            assert right <= x1 or x2 <= left or lower <= y1 or y2 <= upper
    return len(places)


def test_labels_cover_neither_one_another_nor_leave_the_picture() -> None:
    same_place = [[300, 200, 420, 330]] * 5
    assert labels_of(same_place, ["person"] * 5) == 5
    in_a_corner = [[700, 500, 799, 599], [690, 510, 790, 595], [0, 0, 60, 60], [2, 2, 50, 55]]
    assert labels_of(in_a_corner, ["a", "traffic light", "b", "stop sign"]) == 4
    assert labels_of([[10, 10, 500, 500]] * 2, ["x" * 500, "two\nlines"]) == 2
    assert labels_of([[10, 10, 100, 100]], [f"WWWWWWWW{'i' * 24}WWWWWWWW"], (512, 120)) == 1  # its ends are wide
    assert 4 < labels_of([[400, 300, 410, 306]] * 60, ["far too many"] * 60) < 60  # the others find no place


def test_small_image_is_enlarged_and_keeps_its_proportions() -> None:
    drawn = draw_detections(gray(100, 128), [], [], class_names=["a"], scores=[], masks=[])
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


def test_pictures_stand_in_cells_of_one_size() -> None:
    wide, tall = Image.new("RGB", (300, 50), "red"), Image.new("RGB", (60, 180), "blue")
    joined = np.asarray(grid([[wide, tall], [tall, wide]], ["ground truth", "predictions"]))
    assert joined.shape[1] == 300 + 8 + 300
    reds, blues = ((joined == color).all(axis=2) for color in ([255, 0, 0], [0, 0, 255]))
    assert [int(reds[:, half].sum()) for half in (slice(300), slice(308, None))] == [300 * 50] * 2
    assert [int(blues[:, half].sum()) for half in (slice(300), slice(308, None))] == [60 * 180] * 2
    assert np.flatnonzero(blues[:, :300].any(axis=0))[0] == (300 - 60) // 2
    first_row, second_row = np.flatnonzero(blues[:, 308:].any(axis=1))[0], np.flatnonzero(blues[:, :300].any(axis=1))[0]
    assert second_row - first_row == 180 + 8
    narrow = side_by_side([Image.new("RGB", (20, 50))] * 2, ["a title that is wider than its picture", "another"])
    assert narrow.width > 300


def test_drawing_of_a_given_size_has_it_and_its_boxes_are_scaled() -> None:
    drawn = draw_detections(gray(1000, 2000), [[1000, 200, 1500, 800]], [1], class_names=["a"], longer_side_px=500)
    assert drawn.size == (500, 250)
    assert drawn.getpixel((250, 125)) == class_color(1)
    assert drawn.getpixel((245, 125)) == (128, 128, 128)
