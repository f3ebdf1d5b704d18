"""Plots of an evaluation: precision over recall, and predictions beside the ground truth."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from pycocotools.coco import COCO

from model.data.dataset import read_indexed
from model.data.index import CocoIndex
from model.inference.predictor import Object, label_and_bbox
from model.inference.visualize import draw_objects, grid, side_by_side
from model.scoring.coco import IOU_THRESHOLDS, RECALL_THRESHOLDS, CocoEvaluation

DRAWN_SCORE = 0.5  # detections below it are not drawn
_NOTE = f"(score {DRAWN_SCORE} and above)"
_PANEL_PX = 512  # longer side of the images in before_after.jpg
# Colour and line of the curves that are not gray: distinct in gray print too, and with each kind of colour blindness.
_CURVE_STYLES = {0.5: ("#0072b2", "-"), 0.75: ("#d55e00", "-."), 0.95: ("#009e73", ":")}
_TITLES = {"bbox": "boxes", "segm": "masks"}


def plot_precision_recall(evaluation: CocoEvaluation, path: Path) -> None:
    """Plot a PNG with one panel for boxes and one for masks, if any: curves of three IoU thresholds and of the mean.

    The curves of the other seven thresholds lie between them, thin and gray.
    """
    from matplotlib.figure import Figure  # imported here since it takes a second, and training draws no curves

    figure = Figure(figsize=(0.5 + 5.25 * len(evaluation.precision), 4.8), layout="constrained")
    panels = figure.subplots(1, len(evaluation.precision), sharex=True, sharey=True, squeeze=False)[0]
    for panel, iou_type in zip(panels, evaluation.precision, strict=True):
        curves = dict(zip(IOU_THRESHOLDS, evaluation.precision[iou_type], strict=True))
        for threshold in curves.keys() - _CURVE_STYLES.keys():
            panel.plot(RECALL_THRESHOLDS, curves[threshold], color="0.8", linewidth=0.8)
        for threshold, (color, line) in _CURVE_STYLES.items():
            panel.plot(RECALL_THRESHOLDS, curves[threshold], line, color=color, label=f"IoU {threshold:.2f}")
        panel.plot([], [], color="0.8", linewidth=0.8, label="IoU in between")
        panel.plot(RECALL_THRESHOLDS, evaluation.precision[iou_type].mean(axis=0), "k--", label="mean of all ten")
        panel.set(
            title=f"{_TITLES[iou_type]}: AP {evaluation.scores[iou_type]['AP'] or 0:.3f}",
            xlabel="recall",
            xlim=(0, 1),
            ylim=(0, 1.02),
        )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("precision, mean over classes")
    panels[-1].legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=120)


def write_precision_recall(evaluation: CocoEvaluation, path: Path) -> None:
    """Write the curves as CSV for DVC: recall, and precision of boxes and masks at IoU 0.50, 0.75 and on average."""
    columns: dict[str, Sequence[float]] = {"recall": RECALL_THRESHOLDS}
    for iou_type, precision in evaluation.precision.items():
        curves = (precision[0], precision[5], precision.mean(axis=0))
        for name, curve in zip(("50", "75", "mean"), curves, strict=True):
            columns[f"{iou_type}_{name}"] = [round(value, 6) for value in curve.tolist()]
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def draw_comparison(
    index: CocoIndex,
    i: int,
    ground_truth: COCO,
    found: Sequence[Object],
    *,
    class_names: Sequence[str] = (),
    longer_side_px: int | None = None,
) -> Image.Image:
    """Draw image i of a split beside itself: ground truth, and objects with a score of at least DRAWN_SCORE.

    Args:
        class_names: names of the labels; by default those of the split.
        longer_side_px: size of each of the two; see draw_objects.
    """
    names = class_names or index.class_names
    panels = image_panels(index, i, ground_truth, (found,), names, longer_side_px)
    return side_by_side(panels, ["ground truth", f"predictions {_NOTE}"])


def draw_before_after(
    index: CocoIndex,
    ground_truth: COCO,
    objects: Mapping[int, tuple[Sequence[Object], Sequence[Object]]],
    class_names: Sequence[str],
) -> Image.Image:
    """Draw images in rows of equal size: ground truth, objects found before training, and after.

    Args:
        objects: index of an image in the split → objects before and after.
        class_names: names of the labels of objects.
    """
    rows = [image_panels(index, i, ground_truth, of_image, class_names, _PANEL_PX) for i, of_image in objects.items()]
    return grid(rows, ["ground truth", f"before training {_NOTE}", f"after training {_NOTE}"])


def image_panels(
    index: CocoIndex,
    i: int,
    ground_truth: COCO,
    found: Sequence[Sequence[Object]],
    class_names: Sequence[str],
    longer_side_px: int | None,
) -> list[Image.Image]:
    """Image i with its ground truth, and once with each list of objects: those with a score of at least DRAWN_SCORE."""
    pixels = read_indexed(index, i)
    annotations = ground_truth.imgToAnns[int(index.image_ids[i])]
    true = [
        dict(zip(("label", "bbox"), label_and_bbox(annotation, index.category_ids), strict=True))
        | ({"segmentation": ground_truth.annToRLE(annotation)} if annotation.get("segmentation") else {})
        for annotation in annotations
    ]
    sure = [[one for one in objects if one["score"] >= DRAWN_SCORE] for objects in found]
    return [
        draw_objects(pixels, true, index.class_names, longer_side_px=longer_side_px),
        *(draw_objects(pixels, objects, class_names, longer_side_px=longer_side_px) for objects in sure),
    ]
