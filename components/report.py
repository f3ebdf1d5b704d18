"""Write a report of finished runs: `maskrcnn report RUN…`, where RUN is the folder of a run, such as runs/shapes_demo.

Writes a single HTML file (no other files, no web requests), and a Markdown file of the same name without charts and
pictures. For several runs it shows their differences and compares their figures; missing parts are listed. With
--readme, the figures of the runs are stored in docs/results/, and the marked tables of README.md and docs/results.md
are regenerated.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from rich.console import Console

from components.cli import parse, stage_parser, user_errors
from components.evaluation.error_types import ErrorAnalysis, ErrorTypes
from components.reports import outcome, setup
from components.reports.layout import Chapter, Gallery, markdown_table
from components.reports.pictures import worst_and_best
from components.reports.readme import update_readme
from components.reports.speed import speed
from components.runs.files import RunData, read_run
from components.runs.recipes import nearest_recipe
from model.errors import UserError
from model.files import write_atomically
from model.scoring.names import IOU_TYPES

TEMPLATES = Path(__file__).parent / "reports" / "templates"
_PICTURE_BUDGET_BYTES = 3_500_000  # limit for pictures, so that the page stays below 5 MB
_NO_ERRORS = "No error types; see Environment for what is missing."


@dataclass(frozen=True)
class ReportResult:
    """Files of a report."""

    html: Path
    markdown: Path


@dataclass(frozen=True)
class Findings:
    """Results of the error analysis for a report."""

    errors: dict[str, dict[str, ErrorTypes]]  # run name → IoU type → error types
    galleries: list[Gallery]
    trouble: str = ""  # reason why there are none, other than missing files


def run(run_dirs: Sequence[Path], *, output: Path, question: str = "", pictures: int = 4) -> ReportResult:
    """Write the report of some runs to `output`, and as Markdown beside it.

    Args:
        question: question that the report answers; by default it is about the runs' differences.
        pictures: number of worst, and of best, images shown per run.

    Raises:
        UserError: if no run is given, one is given twice, or a folder has no run.
    """
    if not run_dirs:
        raise UserError("report: must name at least one run, such as runs/shapes_demo")
    if output.suffix != ".html":
        raise UserError(f"--output: must end with .html, got {output}; the Markdown file is written beside it")
    if pictures < 0:
        raise UserError(f"--pictures: must be 0 or more, got {pictures}")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    if len({one.name for one in runs}) < len(runs):
        raise UserError(f"report: runs must have different names, got {', '.join(one.name for one in runs)}")
    chapters = _chapters(runs, question, _analyse(runs, pictures))
    title = " · ".join(one.name for one in runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    markdown = output.with_suffix(".md")
    for path in (output, markdown):
        write_atomically(path, render(path.suffix, title, runs, chapters))
    return ReportResult(output, markdown)


def render(suffix: str, title: str, runs: Sequence[RunData], chapters: Sequence[Chapter]) -> str:
    """Render the report as text: Markdown for the suffix `.md`, else HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "markdown_table": markdown_table}
    template = environment.get_template("report.md" if suffix == ".md" else "report.html")
    parts = {name: Markup((TEMPLATES / f"report.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return template.render(title=title, made=made, names=[one.name for one in runs], chapters=chapters, **parts)


def _chapters(runs: Sequence[RunData], question: str, found: Findings) -> list[Chapter]:
    nearest = {one.name: nearest_recipe(one.config) for one in runs if one.config}
    return [
        setup.question(runs, question),
        setup.data(runs),
        setup.configuration(runs, nearest),
        outcome.losses(runs),
        outcome.scores(runs),
        outcome.classes(runs),
        outcome.curves(runs),
        outcome.sizes(runs),
        outcome.errors(runs, found.errors, found.trouble or _NO_ERRORS),
        outcome.pictures(found.galleries),
        speed(runs),
        setup.environment(runs),
        setup.reproduce(runs, nearest),
    ]


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


def _code(text: str) -> Markup:
    """Convert plain text to HTML, with text between backticks as code."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn report`; by default it reports on train.output_dir."""
    parser = stage_parser("report", __doc__, operands="RUN", operands_help="folders of runs")
    parser.add_argument(
        "--output", type=Path, help="HTML file to write (<RUN>/report.html; runs/report.html for several runs)"
    )
    parser.add_argument("--question", default="", help="question that the report answers")
    parser.add_argument(
        "--pictures", type=int, default=4, help="number of worst and of best images per run (%(default)s)"
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="store the runs' figures; regenerate the tables of README.md and docs/results.md",
    )
    with user_errors():
        args, config = parse(parser, argv)
        run_dirs = [Path(word) for word in args.operands]
        if args.readme:
            update_readme(run_dirs, Path())
            return
        run_dirs = run_dirs or [config.train.output_dir]
        output = args.output or (run_dirs[0] if len(run_dirs) == 1 else Path("runs")) / "report.html"
        result = run(run_dirs, output=output, question=args.question, pictures=args.pictures)
    Console().print(f"{result.html}, {result.markdown}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
