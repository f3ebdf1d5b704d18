"""Report chapter on choosing a threshold and understanding a model: what analysis.json of each run holds."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.reports.charts import Axis, Series, line_chart
from components.reports.layout import Cell, Chapter, Chart, Gallery, Table
from components.runs.figures import DASH, number
from components.runs.files import RunData

_MAX_CONFUSIONS = 10
_MAX_ROWS = 20  # a table with more classes is folded
_SCORES = {"f1": "F1", "precision": "precision", "recall": "recall"}
_NONE = "No run has an analysis.json of the checkpoint that was scored; `maskrcnn evaluate` writes it."
_NOTES = (
    "Detections of {what}: a hit has an IoU of at least 0.5 with an object of its class. Precision, recall and F1 at a "
    "confidence are those of the detections that score at least as high. The best threshold has the highest F1 on "
    "these very images, so its F1 on others will be a little lower. The confusions, and precision and recall by "
    "crowding, are those with each class at its own best threshold.",
    "Calibration: the share of hits among the detections of about the same score, against that score. The expected "
    "calibration error (ECE) is the mean distance of the two over all detections, in ten bins (arXiv:1706.04599).",
    "Likely label errors are detections with a score of at least 0.5 that contradict the annotations: in the place of "
    "an object that nothing matches is one of another class (wrong label), or no object of any class is near (missing "
    "annotation). They may be errors of the model as well.",
)
_WHAT = {"bbox": "boxes", "segm": "masks"}
_CROWDING_SCORES = ("AP", "AP50", "precision", "recall")
_KINDS = {"wrong_label": "wrong label", "missing_annotation": "missing annotation"}


def analysis(runs: Sequence[RunData], galleries: Sequence[Gallery]) -> Chapter:
    """Make the chapter of thresholds, confusions, calibration, slices and label errors."""
    shown = [(slot, run) for slot, run in enumerate(runs) if run.analysis]
    if not shown:
        return Chapter("analysis", "Choosing and understanding", [_NONE])
    kinds = " and ".join(dict.fromkeys(_WHAT[run.analysis["iou_type"]] for _, run in shown))
    tables = [_summary(shown), *(table for slot, run in shown for table in _tables(slot, run, len(shown) > 1))]
    notes = [_NOTES[0].format(what=kinds), *_NOTES[1:]]
    shown_galleries = [one for one in galleries if one.pictures]
    return Chapter("analysis", "Choosing and understanding", notes, tables, _charts(shown), shown_galleries)


def label_error_caption(error: Mapping[str, Any]) -> str:
    """Describe a likely label error in a line."""
    annotated = (
        f", annotated as {error['annotated_class']} ({error['annotation_id']})" if error["annotated_class"] else ""
    )
    return f"{_KINDS[error['kind']]}? {error['class']} {error['score']:.2f}{annotated}, image {error['image_id']}"


def _charts(shown: Sequence[tuple[int, RunData]]) -> list[Chart]:
    charts = []
    for score, title in _SCORES.items():
        series = [_curve(slot, run, score) for slot, run in shown]
        charts.append(_chart(f"{title} over confidence, all classes", title, series))
    series = [_reliability(slot, run) for slot, run in shown]
    return [*charts, _chart("calibration", "share of hits", series)]


def _chart(title: str, label: str, series: Sequence[Series]) -> Chart:
    return Chart(title, line_chart(title, series, Axis("confidence", 0, 1), Axis(label, 0, 1)))


def _reliability(slot: int, run: RunData) -> Series:
    bins = [one for one in run.analysis["calibration"]["bins"] if one["detections"]]
    return Series(run.name, slot, [one["confidence"] for one in bins], [one["hits"] for one in bins])


def _curve(slot: int, run: RunData, score: str) -> Series:
    curves = run.analysis["curves"]
    points = [(x, y) for x, y in zip(curves["confidence"], curves["all"][score], strict=True) if y is not None]
    return Series(run.name, slot, [x for x, _ in points], [y for _, y in points])


def _summary(shown: Sequence[tuple[int, RunData]]) -> Table:
    head = ["all classes", "best threshold", "F1", "precision", "recall", "ECE", "likely label errors"]
    rows = []
    for slot, run in shown:
        best, found = run.analysis["best"]["all"], run.analysis
        errors = str(found["label_errors"]["count"])
        rows.append([run.name, *_point(best, slot), number(found["calibration"]["ece"]), errors])
    return Table(head, rows)


def _point(point: Mapping[str, float | None], slot: int) -> list[Cell | str]:
    f1 = point["f1"]
    bar: Cell | str = DASH if f1 is None else Cell(number(f1), f1, slot)
    return [number(point["threshold"]), bar, number(point["precision"]), number(point["recall"])]


def _tables(slot: int, run: RunData, is_one_of_many: bool) -> list[Table]:
    """Tables of one run: classes, confusions and slices."""
    name = f"{run.name}: " if is_one_of_many else ""
    per_class = run.analysis["best"]["per_class"]
    classes = [[one, *_point(point, slot)] for one, point in per_class.items()]
    sizes = [
        [one["slice"], str(one["objects"]), number(one["AP"]), number(one["AR"])]
        for one in run.analysis["slices"]["size"]
    ]
    crowding = [
        [one["slice"], str(one["images"]), str(one["objects"]), *(number(one[score]) for score in _CROWDING_SCORES)]
        for one in run.analysis["slices"]["crowding"]
    ]
    found = [
        Table(
            ["class", "best threshold", "F1", "precision", "recall"],
            classes,
            f"{name}best threshold of each class",
            folded=len(classes) > _MAX_ROWS,
        ),
        Table(
            ["annotated", "predicted", "objects", "share"], _confusions(run.analysis["confusion"]), f"{name}confusions"
        ),
        Table(["size of the object", "objects", "AP", "AR"], sizes, f"{name}by size"),
        Table(["objects in the image", "images", "objects", *_CROWDING_SCORES], crowding, f"{name}by crowding"),
    ]
    return [table for table in found if table.rows]


def _confusions(confusion: Mapping[str, Any]) -> list[list[str]]:
    """The most frequent confusions of two classes at their best thresholds, with the share of the annotated class."""
    names, matrix = confusion["classes"], confusion["matrix"]
    pairs = [
        (count, row, column)
        for row, counts in enumerate(matrix[:-1])
        for column, count in enumerate(counts[:-1])
        if row != column and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return [
        [names[row], names[column], str(count), number(count / sum(matrix[row]))]
        for count, row, column in pairs[:_MAX_CONFUSIONS]
    ]
