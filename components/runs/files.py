"""Readers of the files of finished runs, from which reports are made. Nothing is computed or written here.

A run may lack any of its files; `missing` then says which, and which command would make them. Scores are fractions.
"""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.params import read_flat
from components.runs.journal import Entry, read_journal
from components.runs.result import read_evaluation
from components.runs.thresholds import ANALYSIS_FILE, read_analysis
from model.data.index import CocoIndex
from model.errors import UserError
from model.files import read_json, real
from model.scoring.names import TITLES

_EVALUATED = ("checkpoint", "images", "detections", "data_hash")
_PREPARE = "`maskrcnn prepare` writes it anew"


class Hardware(BaseModel):
    """The machine of a run."""

    cpu: str
    cores: int
    gpu: str = ""
    gpus: int = 0


class Environment(BaseModel):
    """Content of environment.json, and part of benchmark.json."""

    commit: str | None = None
    hardware: Hardware = Hardware(cpu="", cores=0)
    versions: dict[str, str] = {}
    processes: int = 1


class StepTimes(BaseModel):
    """Seconds of one step: median and upper quantiles."""

    median: float
    p90: float
    p99: float


class StepCase(BaseModel):
    """Measurement of one network's steps."""

    mode: str
    model: str
    dtype: str
    batch: int
    height: int
    width: int
    images_per_s: float | None
    step_s: StepTimes
    peak_memory_mib: float | None
    ratio_to_torchvision: float | None = None


class Steps(BaseModel):
    """Measurements of steps."""

    cases: list[StepCase]


class ScalingRow(BaseModel):
    """Measurement of one number of processes."""

    processes: int
    batch_per_process: int
    images_per_s: float | None
    speedup: float | None
    efficiency: float | None


class Scaling(BaseModel):
    """Measurements of several processes."""

    dtype: str
    weak: list[ScalingRow]
    strong: list[ScalingRow]


class Benchmark(Environment):
    """Keys of benchmark.json that readers use."""

    backbone: str | None = None
    steps: Steps | None = None
    scaling: Scaling | None = None


class SplitCounts(BaseModel):
    """Keys that readers use of a split in the report of `maskrcnn prepare`."""

    per_class: dict[str, int]
    per_size: dict[str, int] = {}
    data_hash: str = ""


@dataclass(frozen=True)
class RunData:
    """One folder `<run>`; None or empty stands for what is not there."""

    name: str
    run_dir: Path
    config: dict[str, Any]  # dotted name → value, of config.yaml
    journal: list[Entry]
    evaluation: dict[str, Any] | None
    analysis: dict[str, Any]  # analysis.json; empty if there is none of the evaluated checkpoint
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
        found = "is a file" if run_dir.exists() else "does not exist"
        raise UserError(f"{run_dir}: must be the folder of a run (train.output_dir), but {found}")
    config = read_flat(run_dir / "config.yaml") if (run_dir / "config.yaml").is_file() else {}
    evaluation = read_evaluation(run_dir, *_EVALUATED) if (run_dir / "evaluation.json").is_file() else None
    benchmark = _read(run_dir / "benchmark.json", Benchmark, "`maskrcnn benchmark` writes it anew")
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
        name=real(run_dir).name,
        run_dir=run_dir,
        config=config,
        journal=journal,
        evaluation=evaluation,
        analysis=_analysis(run_dir, evaluation),
        benchmark=benchmark,
        environment=_read(run_dir / "environment.json", Environment, "delete it to leave out the environment"),
        precision_recall=_read_columns(run_dir / "plots" / "precision_recall.csv"),
        data_report=(_read(prepared / "report.json", dict[str, SplitCounts], _PREPARE) if config else None) or {},
        split=split,
        index=index,
        missing=missing,
    )


def _analysis(run_dir: Path, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    if evaluation is None or not (run_dir / ANALYSIS_FILE).is_file():
        return {}
    analysis = read_analysis(run_dir)
    is_whole = analysis.get("best") is not None
    # An evaluation that was interrupted between the two leaves its analysis beside the scores of the one before it.
    is_same = all(analysis[key] == evaluation[key] for key in ("checkpoint", "data_hash"))
    is_same &= not analysis.get("test_time") or analysis["test_time"] == evaluation.get("test_time")
    return analysis if is_whole and is_same else {}


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
    indices = prepared_splits(prepared, configured)
    for split, index in indices.items():
        if index.data_hash == evaluation["data_hash"]:
            return split, index
    hashes = [f"{split} {index.data_hash[:12]}" for split, index in indices.items()]
    found = f"it holds {', '.join(hashes)}" if hashes else "nothing is prepared there"
    missing.append(
        f"The evaluated data ({evaluation['data_hash'][:12]}) are not in {prepared} ({found}), so there are no "
        "pictures and no "
        "error types. Run the report where they are."
    )
    return configured, None


def prepared_splits(prepared: Path, first: str) -> dict[str, CocoIndex]:
    """The splits in a folder of prepared data that can be opened, the named one first."""
    found = {}
    for split in dict.fromkeys((first, "val", "train")):
        with contextlib.suppress(UserError):
            found[split] = CocoIndex.open(prepared, split)
    return found


def _read(path: Path, shape: Any, remedy: str) -> dict[str, Any] | None:
    return read_json(path, shape, remedy) if path.is_file() else None


def _read_columns(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        return {name: [float(row[name]) for row in rows] for name in ("recall", *rows[0])} if rows else {}
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path}: must hold columns of numbers, recall and precision ({error!r}); `maskrcnn evaluate` writes it "
            "anew"
        ) from error
