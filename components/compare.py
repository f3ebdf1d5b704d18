"""Compare runs or studies with the first one: `maskrcnn compare RUN RUN…`.

RUN is the folder of a run or of a stability study with several seeds, such as runs/shapes_demo or
runs/shapes_demo_stability. Lists the parameters that differ, each score's difference with a 95 % interval and p value
(Student's paired test if both have the same seeds, else Welch's test), and a verdict. With one seed on a side there is
no verdict. Two single runs have an interval over the images of the split: by paired bootstrap, with AP computed anew in
each resample. It says nothing about other seeds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.cli import path_argument, terminal, user_errors
from components.runs.result import Result, read_result
from components.studies.comparison_text import parameter_table, score_table
from components.studies.result import read_study
from model.errors import UserError
from model.files import write_atomically
from model.scoring.names import COCO_MAX_DETECTIONS


class CompareError(UserError):
    """Results cannot be compared."""


def run(run_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """Compare each run or study with the first.

    Returns:
        One comparison each: {"before", "after": {"name", "seeds"}, "method": paired | welch | images | none,
        "confidence", "resamples" (images only), "images", "parameters": key → [before, after], "same_training_data",
        "bbox" and "segm": score → {"before", "after", "difference", "interval", "p"}, "sentences"}. Scores are means
        over the seeds; None if undefined.

    Raises:
        CompareError: if fewer than two are named, or they were not evaluated on the same data.
        ResultError: if a folder has no result.
    """
    if len(run_dirs) < 2:
        raise CompareError(
            f"compare: must name at least two runs or studies, got {len(run_dirs)}; the others are compared with the "
            "first"
        )
    found = [(run_dir.as_posix(), _read(run_dir)) for run_dir in run_dirs]
    from components.studies.comparison import compare, study_of

    first, *others = [(name, study_of(one)) for name, one in found]
    for other in others:
        _require_same_evaluation(first, other)
    return [compare(found[0], other) for other in found[1:]]


def _read(run_dir: Path) -> dict[str, Any] | Result:
    """Read the stability.json of a study, or the result of a run."""
    path = run_dir / "stability.json"
    return read_study(path) if path.is_file() else read_result(run_dir)


def _require_same_evaluation(before: tuple[str, dict[str, Any]], after: tuple[str, dict[str, Any]]) -> None:
    (name, one), (other_name, other) = before, after
    if one["data_hash"] != other["data_hash"]:
        evaluated = [
            f"{n}: {report['images']} images, data_hash {report['data_hash'][:12]}…" for n, report in (before, after)
        ]
        raise CompareError(
            f"{name} and {other_name}: must be evaluated on the same data, got {' and '.join(evaluated)}; "
            "evaluate both with one data.prepared_dir and evaluate.split"
        )
    limits = [study.get("max_detections") or COCO_MAX_DETECTIONS for study in (one, other)]
    if limits[0] != limits[1]:
        raise CompareError(
            f"{name} and {other_name}: AP must count as many detections per image and class, got {limits[0]} and "
            f"{limits[1]}; evaluate both with one evaluate.max_detections"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn compare`."""
    parser = argparse.ArgumentParser(
        prog="maskrcnn compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", type=path_argument, metavar="RUN", help="folder of a run or of a stability study"
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        metavar="FILE",
        help="also write the comparisons to FILE, with every score unrounded",
    )
    args = parser.parse_args(argv)
    console = terminal(soft_wrap=True)
    with user_errors():
        comparisons = run(args.runs)
        for comparison in comparisons:
            for part in (parameter_table(comparison), score_table(comparison), *comparison["sentences"]):
                console.print(part)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.json, json.dumps({"comparisons": comparisons}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
