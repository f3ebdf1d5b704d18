"""Readers of the files of finished runs, from which reports are made. Nothing is computed or written here.

A run may lack any of its files; `missing` then says which, and which command would make them. Scores are fractions.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.params import read_flat
from components.runs.journal import Entry, read_journal
from components.runs.result import read_evaluation, read_object
from model.data.index import CocoIndex
from model.errors import UserError
from model.scoring.names import TITLES


@dataclass(frozen=True)
class RunData:
    """One folder `<run>`; None or empty stands for what is not there."""

    name: str
    run_dir: Path
    config: dict[str, Any]  # dotted name → value, of config.yaml
    journal: list[Entry]
    evaluation: dict[str, Any] | None
    benchmark: dict[str, Any] | None
    environment: dict[str, Any] | None
    precision_recall: dict[str, list[float]]
    data_report: dict[str, Any]  # split → counts, as `maskrcnn prepare` wrote them
    split: str  # the evaluated split
    index: CocoIndex | None  # index of the split; None if the data are absent or differ
    missing: list[str]

    @property
    def training(self) -> list[Entry]:
        """The journal's lines that are training steps, oldest first."""
        return [entry for entry in self.journal if "loss/total" in entry.metrics]

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Scores by result type: of boxes and masks, of boxes, of proposals, or none at all."""
        return {
            result_type: self.evaluation[result_type]
            for result_type in TITLES
            if self.evaluation and self.evaluation.get(result_type)
        }

    def inference_path(self, result_type: str) -> Path | None:
        """The COCO results of a type, where they were kept."""
        path = self.run_dir / "inference" / f"{result_type}.json"
        return path if path.is_file() else None


def read_run(run_dir: Path) -> RunData:
    """Take up a run's folder.

    Raises:
        UserError: if there is no such folder, or nothing of a run in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: must be the folder of a run (train.output_dir), but does not exist")
    config = read_flat(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else {}
    evaluation = read_evaluation(run_dir, "data_hash") if (run_dir / "evaluation.json").is_file() else None
    benchmark = _read_json(run_dir / "benchmark.json")
    journal = read_journal(run_dir / "log.jsonl")
    if not (config or journal or evaluation or benchmark):
        raise UserError(
            f"{run_dir}: must hold a run (config.yaml, log.jsonl, evaluation.json or benchmark.json), but has none of "
            "them"
        )
    missing = _missing(run_dir, config, evaluation, benchmark)
    prepared = Path(str(config.get("data.prepared_dir", "")))
    split, index = _find_split(prepared, config, evaluation, missing)
    return RunData(
        name=run_dir.resolve().name,
        run_dir=run_dir,
        config=config,
        journal=journal,
        evaluation=evaluation,
        benchmark=benchmark,
        environment=_read_json(run_dir / "environment.json"),
        precision_recall=_read_columns(run_dir / "plots" / "precision_recall.csv"),
        data_report=(_read_json(prepared / "report.json") if config else None) or {},
        split=split,
        index=index,
        missing=missing,
    )


def _missing(run_dir: Path, config: dict[str, Any], evaluation: Any, benchmark: Any) -> list[str]:
    """Sentences on what is not there."""
    found = []
    if not config:
        found.append(f"{run_dir}/config.yaml is not there, so nothing is known of the configuration.")
    if not (run_dir / "log.jsonl").is_file():
        found.append(f"{run_dir}/log.jsonl is not there, so there are no loss curves.")
    if evaluation is None:
        found.append(f"{run_dir}/evaluation.json is not there: `maskrcnn evaluate` writes it.")
    elif not any(evaluation.get(result_type) for result_type in TITLES):
        found.append(f"{run_dir} was evaluated with evaluate.skip_eval, so there are no scores.")
    if benchmark is None:
        found.append(f"{run_dir}/benchmark.json is not there: `maskrcnn benchmark` writes it.")
    return found


def _find_split(
    prepared: Path, config: dict[str, Any], evaluation: dict[str, Any] | None, missing: list[str]
) -> tuple[str, CocoIndex | None]:
    """The split whose hash is that of the evaluation: a command line may have named another than config.yaml has."""
    configured = str(config.get("evaluate.split", "val"))
    if not config or evaluation is None:
        return configured, None
    hashes = []
    for split in dict.fromkeys((configured, "val", "train")):
        try:
            index = CocoIndex.open(prepared, split)
        except UserError:
            continue
        if index.data_hash == evaluation["data_hash"]:
            return split, index
        hashes.append(f"{split} {index.data_hash[:12]}")
    found = f"it holds {', '.join(hashes)}" if hashes else "nothing is prepared there"
    missing.append(
        f"The evaluated data ({evaluation['data_hash'][:12]}) are not in {prepared} ({found}), so there are no "
        "pictures and no "
        "error types. Run the report where they are."
    )
    return configured, None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_object(path, "the command that made it")


def _read_columns(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
