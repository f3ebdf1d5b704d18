"""The chapters of a report on what was reached: losses, scores, classes, curves, sizes, errors, pictures.

A run has the colour of its place among the runs everywhere. Tables have a column, or a group of columns, for each run.
"""

from collections.abc import Iterable, Sequence

from components.charts import Axis, Series, line_chart, positive_bounds, thinned
from components.error_analysis import ErrorTypes
from components.report_data import RunData
from components.report_layout import Cell, Chapter, Chart, Gallery, Table, number
from model.coco_eval import SCORE_NAMES

LOSSES = {
    "loss/total": "all losses together",
    "loss/objectness": "RPN: object or not",
    "loss/rpn_box_reg": "RPN: boxes",
    "loss/classifier": "classes",
    "loss/box_reg": "boxes",
    "loss/mask": "masks",
}
TASKS = {"bbox": "box", "segm": "mask"}
_NOT_EVALUATED = "No run has been evaluated: `maskrcnn evaluate` does it."
_CURVES = {"50": "IoU 0.50", "75": "IoU 0.75", "mean": "IoU 0.50 to 0.95"}
_SIZES = {"small": ("s", "under 32² px"), "medium": ("m", "32² to 96² px"), "large": ("l", "over 96² px")}


def losses(runs: Sequence[RunData]) -> Chapter:
    """A chart for each loss, with a line for each run."""
    charts = []
    for name, title in LOSSES.items():
        series = [_loss(run, slot, name) for slot, run in enumerate(runs) if run.training]
        series = [one for one in series if len(one.x)]
        if series:
            last = max(one.x[-1] for one in series)
            axes = Axis("step", 0, last), Axis(title, *positive_bounds(series), log=True)
            charts.append(Chart(title, line_chart(title, series, *axes)))
    note = (
        "Means over equal stretches of steps, on a logarithmic scale."
        if charts
        else "No run has logged a training step."
    )
    return Chapter("losses", "Training losses", [note], charts=charts)


def scores(runs: Sequence[RunData]) -> Chapter:
    """COCO's twelve scores of boxes and masks."""
    scored = _scored(runs)
    head = ["", *(_columns(scored) if len(scored) > 1 else TASKS.values())]
    rows = [
        [name, *(number(run.evaluation[task][name]) for run in scored for task in TASKS)]  # type: ignore[index]
        for name in SCORE_NAMES
    ]
    notes = [
        f"{run.name}: {run.evaluation['checkpoint']} on the {run.evaluation['images']} images of {run.split}, {run.evaluation['detections']} detections."  # type: ignore[index]
        for run in scored
    ]
    ending = "Average precision (AP) and recall (AR) as COCO defines them; AP without a number is the mean over IoU 0.50 to 0.95. A dash: nothing to find."
    return Chapter(
        "scores", "Scores", [*notes, ending] if scored else [_NOT_EVALUATED], [Table(head, rows)] if scored else []
    )


def classes(runs: Sequence[RunData]) -> Chapter:
    """AP of each class as bars, in the order of the first run's mask AP."""
    scored = _scored(runs)
    if not scored:
        return Chapter("classes", "Classes", [_NOT_EVALUATED])
    per_class = {run.name: run.evaluation["per_class"] for run in scored}  # type: ignore[index]
    names = dict.fromkeys(name for run in scored for name in per_class[run.name])
    first = per_class[scored[0].name]
    order = sorted(names, key=lambda name: -((first.get(name) or {}).get("segm") or 0))
    counts = _counts(scored[0], "per_class")
    rows = [
        [
            name,
            str(counts.get(name, "–")),
            *(_bar((per_class[run.name].get(name) or {}).get(task), slot)
              for slot, run in _slots(runs, scored) for task in TASKS),
        ]
        for name in order
    ]  # fmt: skip
    table = Table(["class", "instances", *_columns(scored)], rows)
    return Chapter("classes", "Classes", ["AP at IoU 0.50 to 0.95, best masks first."], [table])


def curves(runs: Sequence[RunData]) -> Chapter:
    """Precision over recall, a chart for each task and IoU, with a line for each run."""
    charts = []
    for task, label in TASKS.items():
        for column, iou in _CURVES.items():
            title = f"{label}es, {iou}" if task == "bbox" else f"{label}s, {iou}"
            series = [
                Series(run.name, slot, run.precision_recall["recall"], run.precision_recall[f"{task}_{column}"])
                for slot, run in enumerate(runs)
                if run.precision_recall
            ]
            if series:
                axes = Axis("recall", 0, 1), Axis("precision", 0, 1)
                charts.append(Chart(title, line_chart(f"Precision over recall, {title}", series, *axes)))
    return Chapter(
        "curves", "Precision over recall", ["Mean over classes."] if charts else [_NOT_EVALUATED], charts=charts
    )


def sizes(runs: Sequence[RunData]) -> Chapter:
    """AP and AR of small, medium and large objects."""
    scored = _scored(runs)
    if not scored:
        return Chapter("sizes", "Sizes", [_NOT_EVALUATED])
    counts = _counts(scored[0], "per_size")
    rows = []
    for size, (letter, meaning) in _SIZES.items():
        for kind in ("AP", "AR"):
            values = [
                _bar(run.evaluation[task][kind + letter], slot)  # type: ignore[index]
                for slot, run in _slots(runs, scored)
                for task in TASKS
            ]
            rows.append([f"{size}, {meaning}: {kind}", str(counts.get(size, "–")), *values])
    note = "COCO sorts objects by the area of their masks; the counts are by the area of their boxes, as `prepare` reports them."
    return Chapter("sizes", "Sizes", [note], [Table(["size", "instances", *_columns(scored)], rows)])


def errors(runs: Sequence[RunData], found: dict[str, dict[str, ErrorTypes]], why_not: str = "") -> Chapter:
    """TIDE's kinds of error by run name and task; a table for each task."""
    tables = []
    for task, label in TASKS.items():
        of_runs = [(slot, run.name, found[run.name][task]) for slot, run in enumerate(runs) if run.name in found]
        if not of_runs:
            continue
        worst = max(kind.delta_ap for _, _, types in of_runs for kind in types.kinds) or 1.0
        head = ["kind", *(f"{name}: {what}" for _, name, _ in of_runs for what in ("errors", "ΔAP50"))]
        rows = []
        for k, kind in enumerate(of_runs[0][2].kinds):
            row: list[Cell | str] = [f"{kind.name}: {kind.meaning}"]
            for slot, _, types in of_runs:
                mine = types.kinds[k]
                row += [str(mine.count), Cell(f"{mine.delta_ap:.3f}", mine.delta_ap / worst, slot)]
            rows.append(row)
        base = ", ".join(f"{name} {types.ap50:.3f}" for _, name, types in of_runs)
        tables.append(Table(head, rows, f"{label}: AP50 {base}"))
    note = (
        "ΔAP50 is by how much AP at IoU 0.50 would rise if all errors of that kind were mended, each kind alone "
        "(TIDE, arXiv:2008.08115). Detections of every score count."
    )
    return Chapter("errors", "Kinds of error", [note] if tables else [why_not], tables)


def pictures(galleries: Sequence[Gallery]) -> Chapter:
    """The worst and the best images of each run."""
    shown = [gallery for gallery in galleries if gallery.pictures]
    note = (
        "Ground truth left, predictions of score 0.5 and above right; images ordered by F1 of their masks at IoU 0.5."
    )
    return Chapter(
        "pictures", "Worst and best images", [note] if shown else ["No pictures: see what is missing."], galleries=shown
    )


def _loss(run: RunData, slot: int, name: str) -> Series:
    points = [(entry.step, value) for entry in run.training if (value := entry.metrics.get(name)) is not None]
    x, y = thinned([step for step, _ in points], [value for _, value in points])
    return Series(run.name, slot, x, y)


def _scored(runs: Iterable[RunData]) -> list[RunData]:
    return [run for run in runs if run.evaluation is not None and run.evaluation["bbox"] is not None]


def _slots(runs: Sequence[RunData], chosen: Sequence[RunData]) -> list[tuple[int, RunData]]:
    return [(slot, run) for slot, run in enumerate(runs) if run in chosen]


def _columns(runs: Sequence[RunData]) -> list[str]:
    if len(runs) == 1:
        return [f"{label} AP" for label in TASKS.values()]
    return [f"{run.name}: {label}" for run in runs for label in TASKS.values()]


def _counts(run: RunData, kind: str) -> dict[str, int]:
    return run.data_report.get(run.split, {}).get(kind, {}) if run.index is not None else {}


def _bar(value: float | None, slot: int) -> Cell | str:
    return "–" if value is None else Cell(f"{value:.3f}", value, slot)
