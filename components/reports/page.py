"""Report of runs as one page: its chapters, error types and pictures, rendered as HTML or Markdown."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from components.evaluation.error_types import ErrorAnalysis, ErrorTypes
from components.reports import outcome, setup
from components.reports.analysis import analysis
from components.reports.layout import Chapter, Gallery
from components.reports.pictures import confusion_matrix, label_errors, worst_and_best
from components.reports.same_data import scoring_warnings, warnings_of
from components.reports.speed import speed
from components.runs.files import RunData
from components.runs.recipes import nearest_recipe
from model.files import write_atomically
from model.scoring.names import IOU_TYPES

TEMPLATES = Path(__file__).parent / "templates"
# Limits for pictures, so that the page stays below 5 MB.
_PICTURE_BUDGET_BYTES = 2_500_000  # worst and best images
_ANALYSIS_BUDGET_BYTES = 1_000_000
_NO_ERRORS = "No error types; see Environment for what is missing."
_SCORED = ("scores", "classes", "curves", "sizes", "errors", "analysis")  # chapters with scores of several runs
_NOT_COMPARABLE = "The scores of these runs must not be compared (see Question)."
# Dots, slashes and underscores within a name such as data.prepared_dir; not those of 0.025 and images/s.
_JOINTS = re.compile(r"(?<=\w\w)([/_]|\.(?!\d))(?=\w{3})")


@dataclass(frozen=True)
class Findings:
    """Results of the error analysis for a report."""

    errors: dict[str, dict[str, ErrorTypes]]  # run name → IoU type → error types
    galleries: list[Gallery]
    reason: str = ""  # reason why there are none, other than missing files


def write_report(runs: Sequence[RunData], output: Path, question: str, pictures: int) -> Path:
    """Write the report of some runs to `output`, and as Markdown beside it; return the latter's path.

    Args:
        runs: files of finished runs.
        output: HTML file.
        question: question that the report answers; if empty, it is about the runs' differences.
        pictures: number of worst, and of best, images shown per run.
    """
    chapters = _chapters(runs, question, _analyse(runs, pictures), pictures)
    title = " · ".join(one.name for one in runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    markdown = output.with_suffix(".md")
    for path in (output, markdown):
        write_atomically(path, render(path.suffix, title, runs, chapters))
    return markdown


def render(suffix: str, title: str, runs: Sequence[RunData], chapters: Sequence[Chapter]) -> str:
    """Render the report as text: Markdown for the suffix `.md`, else HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "breakable": _breakable}
    template = environment.get_template("report.md" if suffix == ".md" else "report.html")
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return template.render(title=title, made=made, names=[one.name for one in runs], chapters=chapters, **parts)


def _chapters(runs: Sequence[RunData], question: str, found: Findings, pictures: int) -> list[Chapter]:
    nearest = {one.name: nearest_recipe(one.config) for one in runs if one.config}
    chapters = [
        replace(setup.question(runs, question), warnings=warnings_of(runs)),
        setup.data(runs),
        setup.configuration(runs, nearest),
        outcome.losses(runs),
        outcome.scores(runs),
        outcome.classes(runs),
        outcome.curves(runs),
        outcome.sizes(runs),
        outcome.errors(runs, found.errors, found.reason or _NO_ERRORS),
        analysis(runs, _analysis_galleries(runs, pictures)),
        outcome.pictures(found.galleries),
        speed(runs),
        setup.environment(runs),
        setup.reproduce(runs, nearest),
    ]
    if not scoring_warnings(runs):
        return chapters
    return [replace(one, warnings=[_NOT_COMPARABLE]) if one.id in _SCORED else one for one in chapters]


def _analyse(runs: Sequence[RunData], pictures: int) -> Findings:
    """Compute error types and pictures of the runs whose data and results are available."""
    errors: dict[str, dict[str, ErrorTypes]] = {}
    galleries: list[Gallery] = []
    for one in runs:
        results = {
            iou_type: path
            for iou_type in IOU_TYPES
            if iou_type in one.scores and (path := one.inference_path(iou_type))
        }
        if one.index is None or not results:
            continue
        try:
            analysis = ErrorAnalysis(one.index.ground_truth_path)
        except ImportError as error:
            return Findings(
                {}, [], f"No error types and no pictures: hotcoco, which finds them, cannot be imported ({error})."
            )
        errors[one.name] = {iou_type: analysis.error_types(path, iou_type) for iou_type, path in results.items()}
        budget_bytes = _PICTURE_BUDGET_BYTES // len(runs)
        worst, best = worst_and_best(one.index, results, analysis, count=pictures, budget_bytes=budget_bytes)
        galleries += [Gallery(f"{one.name}: worst", worst), Gallery(f"{one.name}: best", best)]
    return Findings(errors, galleries)


def _analysis_galleries(runs: Sequence[RunData], pictures: int) -> list[Gallery]:
    """Make galleries of the confusion matrix and of the likeliest label errors of each run."""
    galleries: list[Gallery] = []
    for one in (run for run in runs if run.analysis and pictures):
        budget_bytes = _ANALYSIS_BUDGET_BYTES // len(runs)
        likeliest = one.analysis["label_errors"]["likeliest"]
        drawn = label_errors(one.run_dir, likeliest, count=pictures, budget_bytes=budget_bytes // 2)
        galleries += [
            Gallery(f"{one.name}: confusion matrix", confusion_matrix(one.run_dir, budget_bytes // 2)),
            Gallery(f"{one.name}: likely label errors", drawn),
        ]
    return galleries


def _code(text: str) -> Markup:
    """Convert plain text to HTML, with text between backticks as code."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def _breakable(text: object) -> Markup:
    """Convert plain text to HTML in which a line may break after a dot, slash or underscore within a name."""
    return Markup(_JOINTS.sub(r"\1<wbr>", str(escape(text))))
