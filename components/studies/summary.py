"""Summary of finished runs that differ only in their seeds.

result = summarise([Path("runs/demo/seed_1"), Path("runs/demo/seed_2")], Path("runs/demo"))
result.report["bbox"]["AP"]["mean"]
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from components.runs.identity import differences_beside_seed
from components.runs.result import Result, read_result, require_final
from components.studies.plot import plot_stability
from components.studies.result import StabilityError, StabilityResult
from components.studies.tables import csv_text, markdown_note, markdown_scores, report_of, shown_scores
from model.files import write_atomically


def summarise(run_dirs: Sequence[Path], output_dir: Path) -> StabilityResult:
    """Summarise finished runs that differ only in their seeds: mean, sample standard deviation and 95 % interval.

    Args:
        run_dirs: folders of finished runs, with config.yaml and evaluation.json. A single one gives no standard
            deviation.
        output_dir: folder for stability.json, .csv, .md, .png and scores.json; created if missing.

    Raises:
        ResultError: if a run is not finished, or its final checkpoint is not evaluated.
        StabilityError: if there is no run, two have the same seed, or they differ in more than the seed.
    """
    results = sorted(map(read_result, run_dirs), key=lambda result: result.seed)
    _require_one_study(results)
    output_dir.mkdir(parents=True, exist_ok=True)
    report = _dated(results, output_dir / "stability.json")
    write_atomically(output_dir / "stability.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomically(output_dir / "scores.json", json.dumps(shown_scores(report), indent=2) + "\n")
    write_atomically(output_dir / "stability.csv", csv_text(report))
    write_atomically(output_dir / "stability.md", f"{markdown_scores(report)}\n\n{markdown_note(report)}\n")
    plot_stability(report, output_dir / "stability.png")
    return StabilityResult(output_dir, report)


def _require_one_study(results: Sequence[Result]) -> None:
    if not results:
        raise StabilityError(
            "stability: must have at least one finished run, got none; train them with `maskrcnn stability`"
        )
    for one, next_one in pairwise(results):
        if one.seed == next_one.seed:
            raise StabilityError(
                f"{one.run_dir} and {next_one.run_dir}: seeds must differ, but both have train.seed={one.seed}; leave "
                "out one of them"
            )
    for result in results:
        require_final(result)
        _require_same(results[0], result)


def _require_same(one: Result, other: Result) -> None:
    differing = differences_beside_seed(one.config, other.config)
    names = ("the data evaluated on (data_hash)", "the data trained on (train_data_hash)")
    differing += [name for name, a, b in zip(names, one.data, other.data, strict=True) if a != b]
    if differing:
        raise StabilityError(
            f"{one.run_dir} and {other.run_dir}: must differ only in the seed, but differ in {', '.join(differing)}; "
            "use `maskrcnn compare` for runs that differ in more"
        )


def _dated(results: Sequence[Result], path: Path) -> dict[str, Any]:
    """Make the report; it keeps its date if nothing has changed."""
    report = report_of(results, datetime.now(UTC).date().isoformat())
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return report
    # Compare as JSON, in which tuples are lists.
    is_same = isinstance(before, dict) and {**before, "date": ""} == json.loads(json.dumps({**report, "date": ""}))
    return before if is_same else report
