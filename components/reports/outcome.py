"""Report chapters on results: losses, scores, classes, curves, sizes, errors, pictures.

Each run has one colour throughout, by its index. Tables have a column, or a group of columns, per run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from components.evaluation.error_types import ErrorTypes
from components.reports.charts import Axis, Series, line_chart, positive_bounds, thinned
from components.reports.layout import Cell, Chapter, Chart, Gallery, Table
from components.runs.figures import DASH, number
from components.runs.files import RunData
from model.scoring.names import IOU_TYPES, TITLES

_LOSS_TITLES = {
    "loss/total": "total loss",
    "loss/objectness": "RPN: object or not",
    "loss/rpn_box_reg": "RPN: boxes",
    "loss/classifier": "classes",
    "loss/box_reg": "boxes",
    "loss/mask": "masks",
}
_NOT_EVALUATED = "No run has been evaluated; run `maskrcnn evaluate`."
_CURVES = {"50": "IoU 0.50", "75": "IoU 0.75", "mean": "IoU 0.50 to 0.95"}
_SIZES = {"small": ("s", "under 32² px"), "medium": ("m", "32² to 96² px"), "large": ("l", "over 96² px")}


def losses(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of losses: a chart per loss, with a line per run."""
    charts = []
    for name, title in _LOSS_TITLES.items():
        series = [_loss(run, slot, name) for slot, run in enumerate(runs) if run.training]
        series = [one for one in series if len(one.x)]
        if series:
            last = max(one.x[-1] for one in series)
            axes = Axis("step", 0, last), Axis(title, *positive_bounds(series), log=True)
            charts.append(Chart(title, line_chart(title, series, *axes)))
    note = (
        "Means over equal intervals of steps, on a logarithmic scale."
        if charts
        else "No run has logged a training step."
    )
    return Chapter("losses", "Training losses", [note], charts=charts)


def scores(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of scores: COCO's scores of boxes and masks, or of proposals."""
    columns = _columns(runs, TITLES)
    if not columns:
        return Chapter("scores", "Scores", [_NOT_EVALUATED])
    names = dict.fromkeys(name for column in columns for name in column.scores)
    rows = [[name, *(number(column.scores.get(name)) for column in columns)] for name in names]
    notes = [_evaluated(run) for run in runs if run.scores]
    ending = (
        "Average precision (AP) and recall (AR) as COCO defines them; AP without a number is the mean over IoU 0.50 "
        "to 0.95. "
        "A dash means that there is no ground truth."
    )
    return Chapter("scores", "Scores", [*notes, ending], [Table(["", *_titles(columns)], rows)])


def classes(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of classes: AP per class as bars, sorted by the first run's AP of masks, else of boxes."""
    columns = [column for column in _columns(runs, IOU_TYPES) if column.per_class]
    if not columns:
        return Chapter("classes", "Classes", [_NOT_EVALUATED])
    first = [column for column in columns if column.run is columns[0].run][-1]
    names = dict.fromkeys(name for column in columns for name in column.per_class)
    order = sorted(names, key=lambda name: -(first.per_class.get(name) or 0))
    counted, counts = _counts(columns, "per_class")
    rows = [
        [name, str(counts.get(name, DASH)), *(_bar(column.per_class.get(name), column.slot) for column in columns)]
        for name in order
    ]
    note = f"AP at IoU 0.50 to 0.95, sorted by {first.run.name}'s {TITLES[first.result_type]} AP."
    return Chapter("classes", "Classes", [note], [Table(["class", counted, *_titles(columns, "AP")], rows)])


def curves(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of curves: precision over recall, a chart per IoU type and threshold, a line per run."""
    charts = []
    for iou_type, label in ((iou_type, TITLES[iou_type]) for iou_type in IOU_TYPES):
        for column, iou in _CURVES.items():
            title = f"{label}, {iou}"
            series = [
                Series(run.name, slot, run.precision_recall["recall"], run.precision_recall[f"{iou_type}_{column}"])
                for slot, run in enumerate(runs)
                if f"{iou_type}_{column}" in run.precision_recall
            ]
            if series:
                axes = Axis("recall", 0, 1), Axis("precision", 0, 1)
                charts.append(Chart(title, line_chart(f"Precision over recall, {title}", series, *axes)))
    note = "Mean over classes." if charts else _NOT_EVALUATED
    return Chapter("curves", "Precision over recall", [note], charts=charts)


def sizes(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of sizes: AP and AR of small, medium and large objects."""
    columns = _columns(runs, IOU_TYPES)
    if not columns:
        return Chapter("sizes", "Sizes", [_NOT_EVALUATED])
    counted, counts = _counts(columns, "per_size")
    rows = [
        [
            f"{size}, {meaning}: {score}",
            str(counts.get(size, DASH)),
            *(_bar(column.scores.get(score + letter), column.slot) for column in columns),
        ]
        for size, (letter, meaning) in _SIZES.items()
        for score in ("AP", "AR")
    ]
    note = (
        "COCO classifies objects by the area of their masks; "
        "the counts, from `prepare`, are by the area of their boxes."
    )
    return Chapter("sizes", "Sizes", [note], [Table(["size", counted, *_titles(columns)], rows)])


def errors(runs: Sequence[RunData], found: dict[str, dict[str, ErrorTypes]], reason: str = "") -> Chapter:
    """Make the chapter of errors: TIDE's error types, a table per IoU type.

    Args:
        found: run name → IoU type → error types.
        reason: note if there are none.
    """
    tables = []
    for iou_type, label in ((iou_type, TITLES[iou_type]) for iou_type in IOU_TYPES):
        of_runs = [
            (slot, run.name, found[run.name][iou_type])
            for slot, run in enumerate(runs)
            if iou_type in found.get(run.name, {})
        ]
        if not of_runs:
            continue
        worst = max(error.delta_ap for _, _, types in of_runs for error in types.errors) or 1.0
        head = ["type", *(f"{name}: {what}" for _, name, _ in of_runs for what in ("errors", "ΔAP50"))]
        rows = []
        for k, error in enumerate(of_runs[0][2].errors):
            row: list[Cell | str] = [f"{error.name}: {error.meaning}"]
            for slot, _, types in of_runs:
                own = types.errors[k]
                row += [str(own.count), Cell(f"{own.delta_ap:.3f}", own.delta_ap / worst, slot)]
            rows.append(row)
        base = ", ".join(f"{name} {types.ap50:.3f}" for _, name, types in of_runs)
        tables.append(Table(head, rows, f"{label}: AP50 {base}"))
    note = (
        "ΔAP50 is the gain in AP at IoU 0.50 if all errors of that type were fixed, each type alone "
        "(TIDE, arXiv:2008.08115). Detections of every score count."
    )
    return Chapter("errors", "Error types", [note] if tables else [reason], tables)


def pictures(galleries: Sequence[Gallery]) -> Chapter:
    """Make the chapter of pictures: the worst and the best images of each run."""
    shown = [gallery for gallery in galleries if gallery.pictures]
    note = (
        "Left: ground truth; right: predictions with a score of at least 0.5. "
        "Images are sorted by F1 at IoU 0.5, of masks if there are any."
    )
    return Chapter(
        "pictures", "Worst and best images", [note] if shown else ["No pictures: see what is missing."], galleries=shown
    )


def _loss(run: RunData, slot: int, name: str) -> Series:
    points = [(entry.step, value) for entry in run.training if (value := entry.metrics.get(name)) is not None]
    x, y = thinned([step for step, _ in points], [value for _, value in points])
    return Series(run.name, slot, x, y)


@dataclass(frozen=True)
class _Column:
    """Scores of one run and IoU type."""

    slot: int
    run: RunData
    result_type: str

    @property
    def scores(self) -> dict[str, float | None]:
        return self.run.scores[self.result_type]

    @property
    def per_class(self) -> dict[str, float | None]:
        assert self.run.evaluation is not None
        per_class = self.run.evaluation.get("per_class") or {}
        return {name: of_class.get(self.result_type) for name, of_class in per_class.items()}


def _columns(runs: Sequence[RunData], result_types: Iterable[str]) -> list[_Column]:
    wanted = set(result_types)
    return [
        _Column(slot, run, result_type)
        for slot, run in enumerate(runs)
        for result_type in run.scores
        if result_type in wanted
    ]


def _titles(columns: Sequence[_Column], what: str = "") -> list[str]:
    """Column titles, with the run's name if there are several runs."""
    is_one = all(column.run is columns[0].run for column in columns)
    return [
        f"{'' if is_one else column.run.name + ': '}{TITLES[column.result_type]} {what}".strip() for column in columns
    ]


def _evaluated(run: RunData) -> str:
    found = run.evaluation
    assert found is not None
    what = f"{found['checkpoint']} on the {found['images']} images of {run.split}, {found['detections']} detections"
    return f"{run.name}: {what}."


def _counts(columns: Sequence[_Column], key: str) -> tuple[str, dict[str, int]]:
    """Title and values of the column of instances: the first run's, whose name it has where another's are different."""
    first, *others = (
        run.data_report.get(run.split, {}).get(key, {}) if run.index is not None else {}
        for run in {column.run.name: column.run for column in columns}.values()
    )
    is_same = all(counts == first for counts in others if counts)
    return "instances" if is_same else f"{columns[0].run.name}: instances", first


def _bar(value: float | None, slot: int) -> Cell | str:
    return DASH if value is None else Cell(number(value), value, slot)
