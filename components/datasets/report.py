"""Report of `prepare`: counts as JSON, and one picture of classes, sizes and sample images with their masks."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from model.config import DataConfig
from model.data.annotations import CocoFile
from model.data.dataset import CocoDataset, read_indexed
from model.data.findings import count_kinds
from model.data.index import CocoIndex, CocoInstances
from model.data.outlines import parts_of_each
from model.data.seeds import sample_seeds
from model.data.transforms import Pixels
from model.inference.fonts import families_for, shortened
from model.inference.visualize import draw_objects

_SAMPLE_COLUMNS = 4
_SAMPLE_PX = 380  # longer side of a sample, about as large as it is in the picture
_SHOWN_CLASSES, _SHOWN_CHARS = 30, 28
_SMALL_PX, _LARGE_PX = 32, 96  # COCO's bounds of small, medium and large: side of a square of equal area


@dataclass(frozen=True)
class SplitReport:
    """Contents of a split, and the records dropped from it."""

    images: int
    images_without_instances: int
    instances: int
    crowds: int
    clipped_boxes: int  # extended beyond the frame
    per_class: dict[str, int]  # class name → instances
    per_size: dict[str, int]  # small, medium, large (by box area) → instances
    dropped: dict[str, int]  # kind of fault → records
    repaired: dict[str, int]
    warnings: dict[str, int]
    examples: dict[str, str]  # kind of any of these three → the first finding
    data_hash: str


def split_report(coco: CocoFile, data_hash: str) -> SplitReport:
    """Count the contents of a checked annotation file."""
    instances = [instance for of_image in coco.instances.values() for instance in of_image]
    ordinary = [instance for instance in instances if not instance.is_crowd]
    classes = Counter(instance.category_id for instance in ordinary)
    boxes = np.array([instance.box for instance in ordinary]).reshape(-1, 4)
    sides_px = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    small, medium, large = np.histogram(sides_px, [0, _SMALL_PX, _LARGE_PX, np.inf])[0].tolist()
    return SplitReport(
        images=len(coco.images),
        images_without_instances=sum(all(x.is_crowd for x in of_image) for of_image in coco.instances.values()),
        instances=len(ordinary),
        crowds=len(instances) - len(ordinary),
        clipped_boxes=sum(instance.was_clipped for instance in instances),
        per_class={name: classes[category_id] for category_id, name in coco.categories.items()},
        per_size={"small": small, "medium": medium, "large": large},
        dropped=count_kinds(coco.findings, "error"),
        repaired=count_kinds(coco.findings, "repaired"),
        warnings=count_kinds(coco.findings, "warning"),
        examples={finding.kind: str(finding) for finding in reversed(coco.findings)},
        data_hash=data_hash,
    )


def draw_report(path: Path, reports: dict[str, SplitReport], index: CocoIndex) -> None:
    """Draw counts per class and size for each split, and the first images of `index` with masks and class names."""
    figure = Figure(figsize=(14, 15), layout="constrained")
    grid = figure.add_gridspec(4, _SAMPLE_COLUMNS, height_ratios=(1.5, 1, 1, 1))
    classes, sizes = figure.add_subplot(grid[0, :-1]), figure.add_subplot(grid[0, -1])
    names = [name for name, _ in Counter(next(iter(reports.values())).per_class).most_common(_SHOWN_CLASSES)]
    for rank, (split, report) in enumerate(reports.items()):
        _bars(classes, names, [report.per_class[name] for name in names], rank, f"{split}: {report.images} images")
        _bars(sizes, list(report.per_size), list(report.per_size.values()), rank, split)
    classes.set(title=f"instances per class (at most {_SHOWN_CLASSES})", yscale="symlog")
    classes.tick_params(axis="x", rotation=60)
    classes.legend()
    sizes.set(title=f"instances per size ({_SMALL_PX} and {_LARGE_PX} px)")
    for i in range(min(3 * _SAMPLE_COLUMNS, len(index))):
        axes = figure.add_subplot(grid[1 + i // _SAMPLE_COLUMNS, i % _SAMPLE_COLUMNS])
        _draw_sample(axes, read_indexed(index, i), index.instances(i), index.class_names, str(index.image_ids[i]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # families_for has said so
        figure.savefig(path, dpi=110)


def _bars(axes: Axes, names: list[str], counts: list[int], rank: int, label: str) -> None:
    positions = np.arange(len(names))
    axes.bar(positions + 0.4 * rank, counts, width=0.4, align="edge", label=label)
    shown = [shortened(name, _SHOWN_CHARS) for name in names]
    axes.set_xticks(positions + 0.4, shown, parse_math=False, fontfamily=families_for(names))  # a class may be `$x`


def draw_augmented(path: Path, index: CocoIndex, data: DataConfig) -> None:
    """Draw the first images of `index` as training sees them, with data.augment, scale, crop and flip."""
    dataset, images = CocoDataset(index, data, training=True), np.flatnonzero(index.has_instances)
    count = 3 * _SAMPLE_COLUMNS
    figure = Figure(figsize=(14, 11), layout="constrained")
    for k, i in enumerate(np.resize(images, count).tolist()):  # few images are shown several times
        (seed,) = sample_seeds(0, k, np.array([i])).tolist()
        sample = dataset[i, seed]
        assert sample.instances is not None
        axes = figure.add_subplot(3, _SAMPLE_COLUMNS, k + 1)
        _draw_sample(axes, sample.image, sample.instances, index.class_names, str(sample.image_id))
    figure.savefig(path, dpi=110)


def _draw_sample(axes: Axes, image: Pixels, instances: CocoInstances, class_names: Sequence[str], title: str) -> None:
    """Draw one image with the mask, or the box alone, and the class of each instance."""
    height, width = image.shape[:2]
    objects = []
    labelled = zip(instances.labels.tolist(), instances.boxes, parts_of_each(instances), strict=True)
    for label, box, parts in labelled:
        found: dict[str, Any] = {"label": label, "bbox": box}
        if parts:  # else a crowd, or a box alone
            polygons = [part.ravel().astype(float).tolist() for part in parts]
            found["segmentation"] = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        objects.append(found)
    axes.imshow(draw_objects(image, objects, class_names, longer_side_px=_SAMPLE_PX))
    axes.axis("off")
    axes.set_title(title, fontsize=8)
