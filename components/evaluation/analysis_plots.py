"""Plots of an analysis.json: confusion matrix, curves over confidence, reliability, and pictures of label errors.

Colours are distinct in gray print too, and with each kind of colour blindness: cividis, and those of Okabe and Ito.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from components.evaluation.detect import Results
from components.evaluation.plots import image_panels
from model.data.index import CocoIndex
from model.inference.fonts import families_for, shortened
from model.inference.predictor import Object, objects_of
from model.inference.visualize import side_by_side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES = ("-", "-.", ":", "--", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_NUMBERED_CLASSES = 15  # a larger matrix has no room for numbers
_MAX_INCHES = 20.0
_SHOWN_CHARS = 24  # characters of a class name
_KINDS = {"wrong_label": "wrong label?", "missing_annotation": "missing annotation?"}


def write_analysis_plots(analysis: Mapping[str, Any], folder: Path) -> None:
    """Write confusion_matrix.png, f1_curves.png and reliability.png into a folder."""
    plot_confusion(analysis, folder / "confusion_matrix.png")
    plot_curves(analysis, folder / "f1_curves.png")
    plot_reliability(analysis, folder / "reliability.png")


def plot_confusion(analysis: Mapping[str, Any], path: Path) -> None:
    """Plot the confusion matrix: each row's shares as colours, and the numbers if the classes are few."""
    from matplotlib.colors import PowerNorm  # imported here since it takes a second, and training draws none
    from matplotlib.figure import Figure

    classes = analysis["confusion"]["classes"]
    names = [*(shortened(name, _SHOWN_CHARS) for name in classes), "background"]
    matrix = np.array(analysis["confusion"]["matrix"], dtype=float)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(3.5 + 0.35 * len(names), _MAX_INCHES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    panel = figure.subplots()
    scale = PowerNorm(0.5, 0, 1)  # one confusion in a hundred is visible
    image = panel.imshow(shares, cmap="cividis", norm=scale)
    ticks, size = range(len(names)), min(9.0, 0.55 * 72 * side / len(names))
    panel.set_xticks(ticks, names, rotation=90, fontsize=size, **_as_written(classes))
    panel.set_yticks(ticks, names, fontsize=size, **_as_written(classes))
    panel.set(
        xlabel="predicted (background: missed)",
        ylabel="annotated (background: false alarm)",
        title=f"detections at each class's best threshold, IoU {analysis['iou']}",
    )
    if len(names) <= _NUMBERED_CLASSES + 1:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "black" if scale(shares[row, column]) > 0.5 else "white"
            panel.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=color, fontsize=size)
    figure.colorbar(image, label="share of the row", shrink=0.8)
    _save(figure, path)


def plot_curves(analysis: Mapping[str, Any], path: Path) -> None:
    """Plot F1, precision and recall over confidence: all classes together, and each class."""
    from matplotlib.figure import Figure

    found, best = analysis["curves"], analysis["best"]["all"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    for panel, score in zip(
        figure.subplots(1, 3, sharex=True, sharey=True), ("f1", "precision", "recall"), strict=True
    ):
        _plot_classes(panel, found, score)
        panel.plot(found["confidence"], _gaps(found["all"][score]), color="black", linewidth=2.2, label="all classes")
        if best["threshold"] is not None:
            label = f"best for all: {best['threshold']:.2f}"
            panel.axvline(best["threshold"], color="0.4", linestyle=(0, (1, 1)), label=label)
        panel.set(title="F1" if score == "f1" else score, xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    for text in panel.legend(fontsize="small", loc="lower left").get_texts():
        text.update(_as_written(found["per_class"]))
    _save(figure, path)


def _plot_classes(panel: "Axes", found: Mapping[str, Any], score: str) -> None:
    """Plot the classes in colours if these suffice, else in gray."""
    is_colored = len(found["per_class"]) <= len(_COLORS)
    for k, (name, curves) in enumerate(found["per_class"].items()):
        if is_colored:
            label = shortened(name, _SHOWN_CHARS)
            style: dict[str, Any] = {"color": _COLORS[k], "linestyle": _LINES[k], "label": label}
        else:
            style = {"color": "0.75", "linewidth": 0.7, "label": "" if k else "each class"}
        panel.plot(found["confidence"], _gaps(curves[score]), **style)


def plot_reliability(analysis: Mapping[str, Any], path: Path) -> None:
    """Plot the share of hits over confidence, in bins, and the number of detections in each."""
    from matplotlib.figure import Figure

    found = analysis["calibration"]
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = [one["from"] for one in found["bins"]]
    width = found["bins"][0]["to"] - edges[0]
    upper.bar(edges, [one["hits"] or 0 for one in found["bins"]], width, align="edge", color=_COLORS[4], edgecolor="k")
    shown = [one for one in found["bins"] if one["detections"]]
    upper.plot([one["confidence"] for one in shown], [one["hits"] for one in shown], "o", color=_COLORS[1])
    upper.plot([0, 1], [0, 1], "k--", label="calibrated")
    ece = "none" if found["ece"] is None else f"{found['ece']:.3f}"
    title = f"expected calibration error: {ece}"
    upper.set(title=title, ylabel=f"share of hits (IoU {analysis['iou']})", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(fontsize="small", loc="upper left")
    lower.bar(edges, [one["detections"] for one in found["bins"]], width, align="edge", color="0.6", edgecolor="k")
    lower.set(xlabel="confidence", ylabel="detections")
    _save(figure, path)


def write_label_errors(
    analysis: Mapping[str, Any],
    folder: Path,
    index: CocoIndex,
    ground_truth: COCO,
    results: Results,
    count: int,
) -> None:
    """Draw up to `count` label errors into <rank>_<image id>.jpg: ground truth, and the suspicious detection."""
    folder.mkdir()
    indices = {int(image_id): i for i, image_id in enumerate(index.image_ids)}
    for rank, error in enumerate(analysis["label_errors"]["likeliest"][:count], 1):
        k = error["detection"]
        found = objects_of([results.bbox[k]], results.segm[k : k + 1], index.category_ids)
        drawing = _suspect(index, indices[error["image_id"]], ground_truth, found, _KINDS[error["kind"]])
        drawing.save(folder / f"{rank:03}_{error['image_id']}.jpg", quality=90)


def _suspect(index: CocoIndex, i: int, ground_truth: COCO, found: list[Object], question: str) -> Image.Image:
    panels = image_panels(index, i, ground_truth, (found,), index.class_names, None)
    return side_by_side(panels, ["ground truth", question])


def _as_written(names: Collection[str]) -> dict[str, Any]:
    """Properties of text that shows names of classes in any script, and one such as `$x$` as it is."""
    return {"parse_math": False, "fontfamily": families_for(names)}


def _save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # families_for has said so
        figure.savefig(path, dpi=100)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else value for value in values]
