"""Plots of an evaluation: precision over recall, and predictions beside the ground truth."""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from pycocotools.coco import COCO

from model.data.dataset import read_indexed
from model.data.index import CocoIndex
from model.inference.predictor import Object, label_and_bbox
from model.inference.visualize import draw_detections, draw_objects, side_by_side
from model.scoring.coco import IOU_THRESHOLDS, RECALL_THRESHOLDS, CocoEvaluation

DRAWN_SCORE = 0.5  # detections below it are not drawn
_TITLES = {"bbox": "boxes", "segm": "masks"}


def plot_precision_recall(evaluation: CocoEvaluation, path: Path) -> None:
    """Plot a PNG with one panel for boxes and one for masks, if any, and one curve per IoU threshold."""
    from matplotlib.figure import Figure  # imported here since it takes a second, and training draws no curves

    figure = Figure(figsize=(0.5 + 5.25 * len(evaluation.precision), 4.8), layout="constrained")
    panels = figure.subplots(1, len(evaluation.precision), sharex=True, sharey=True, squeeze=False)[0]
    for panel, iou_type in zip(panels, evaluation.precision, strict=True):
        for i, threshold in enumerate(IOU_THRESHOLDS):
            color = (0.15 + 0.08 * i, 0.25 + 0.04 * i, 0.75 - 0.06 * i)
            panel.plot(RECALL_THRESHOLDS, evaluation.precision[iou_type][i], color=color, label=f"IoU {threshold:.2f}")
        panel.plot(RECALL_THRESHOLDS, evaluation.precision[iou_type].mean(axis=0), "k--", label="mean")
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
    before: Sequence[Object] | None = None,
) -> Image.Image:
    """Draw image i of a split as a row of panels: ground truth, and objects with a score of at least DRAWN_SCORE.

    Args:
        class_names: names of the labels; by default those of the split.
        before: objects found before training, for a panel between the two.
    """
    pixels = read_indexed(index, i)
    annotations = ground_truth.imgToAnns[int(index.image_ids[i])]
    true = [label_and_bbox(annotation, index.category_ids) for annotation in annotations]
    annotated = draw_detections(
        pixels,
        [bbox for _, bbox in true],
        [label for label, _ in true],
        class_names=index.class_names,
        masks=[ground_truth.annToRLE(annotation) for annotation in annotations],
    )
    names = class_names or index.class_names
    predicted = draw_objects(pixels, [one for one in found if one["score"] >= DRAWN_SCORE], names)
    note = f"(score {DRAWN_SCORE} and above)"
    if before is None:
        return side_by_side([annotated, predicted], ["ground truth", f"predictions {note}"])
    untrained = draw_objects(pixels, before, names)
    titles = ["ground truth", f"before training {note}", f"after training {note}"]
    return side_by_side([annotated, untrained, predicted], titles)
