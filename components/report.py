"""Write a report of finished runs: `maskrcnn report RUN…`, where RUN is the folder of a run, such as runs/shapes_demo.

Writes a single HTML file (no other files, no web requests), and a Markdown file of the same name without charts and
pictures. For several runs it shows their differences and compares their figures; missing parts are listed. Runs that
cannot be compared, since they were evaluated on different data, get a warning, on the page and on stderr. With
--readme, the figures of the runs are stored in docs/results/, and the marked tables of README.md and docs/results.md
are regenerated; without RUN, from the stored figures alone. The parameter file is read only without RUN and --readme.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.cli import parse_words, path_argument, stage_parser, terminal, user_errors
from components.params import load_config
from components.runs.files import read_run
from model.errors import UserError


@dataclass(frozen=True)
class ReportResult:
    """Files of a report, and its warnings about runs with different data."""

    html: Path
    markdown: Path
    warnings: list[str]


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
    from components.reports.page import write_report
    from components.reports.same_data import warnings_of

    return ReportResult(output, write_report(runs, output, question, pictures), warnings_of(runs))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn report`; by default it reports on train.output_dir."""
    parser = _parser()
    with user_errors():
        args = parse_words(parser, argv)
        run_dirs = [Path(word) for word in args.operands]
        _refuse_unused(parser, args)
        if args.readme:
            from components.reports.readme import update_readme

            update_readme(run_dirs, Path())
            return
        run_dirs = run_dirs or [load_config(args.params, args.overrides).train.output_dir]
        output = args.output or (run_dirs[0] if len(run_dirs) == 1 else Path("runs")) / "report.html"
        result = run(run_dirs, output=output, question=args.question, pictures=args.pictures)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    terminal().print(f"{result.html}, {result.markdown}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = stage_parser(
        "report", __doc__, operands="RUN", operands_help="folders of finished runs (train.output_dir)"
    )
    parser.add_argument(
        "--output", type=path_argument, help="HTML file to write (<RUN>/report.html; runs/report.html for several runs)"
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
    return parser


def _refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    given = {
        name for name in ("output", "question", "pictures", "params") if getattr(args, name) != parser.get_default(name)
    }
    if args.readme and (of_page := sorted(given - {"params"})):
        raise UserError(f"--{of_page[0]}: must not go with --readme, which writes no page; leave one of them out")
    unused = [*args.overrides, *(["--params"] if "params" in given else [])]
    if unused and (args.readme or args.operands):
        by = "--readme" if args.readme else "a RUN"
        raise UserError(f"{unused[0]}: must not go with {by}, for which no parameter file is read; leave it out")


if __name__ == "__main__":
    main()
