"""Tables of README.md and docs/results.md, generated from measured runs: `maskrcnn report --readme RUN…`.

The figures of each run are kept in docs/results/<run>.json, so that the tables can be regenerated anywhere and tested:
the text between `<!-- table:NAME -->` and `<!-- /table -->` is a function of these files. A run that is given again
replaces its figures; deleting a file removes its rows. Speed-ups are against plain float32, or TF32 if there is none.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.reports.setup import commit_of
from components.reports.speed import training_time_s
from components.runs.environment import hardware_name
from components.runs.figures import DASH, duration, markdown_table, number
from components.runs.files import Benchmark, Hardware, RunData, read_run
from components.runs.journal import Entry
from components.runs.recipes import nearest_recipe
from components.runs.result import Scores
from components.studies.result import Study, read_study
from components.studies.tables import markdown_note, markdown_scores
from model.errors import UserError
from model.files import read_json, real, write_atomically

RESULTS = Path("docs/results")
# The documents, relative to the repository's root, and the tables that each of them marks.
DOCUMENTS = {"README.md": ("summary",), "docs/results.md": ("accuracy", "stability", "training", "inference")}
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_COMMANDS = {  # table → command that measures it
    "summary": "maskrcnn train",
    "accuracy": "maskrcnn train",
    "stability": "maskrcnn stability",
    "training": "maskrcnn benchmark train scaling",
    "inference": "maskrcnn benchmark inference",
}
# Titles of the columns; `title = cell` where the name in _CELLS is another.
_SUMMARY = (
    "recipe | hardware | precision | training = time | box AP | mask AP | box AP over seeds | mask AP over seeds | made"
)
_ACCURACY = (
    "training = recipe | hardware | batch | precision | box AP | mask AP | box AP50 | mask AP50 | time | "
    "speed-up | made"
)
_STEPS = (
    "network | hardware | batch | precision | images/s | speed-up | median step | peak memory | "
    "time to torchvision's | made"
)
_SCALING = (
    "weak scaling = backbone | hardware | processes | batch each = batch | precision | images/s | speed-up | "
    "weak scaling | made"
)
_SHOWN_AS_PRECISION = ("train.dtype", "train.compile", "train.cuda_graph")
# Rows that agree in these are compared: they differ in precision alone.
_SAME = ("recipe", "other_changes", "backbone", "height", "width", "batch", "processes", "hardware")
Record = dict[str, Any]


class TrainingFigures(BaseModel):
    """Figures of a training that the tables show."""

    recipe: str
    changes: dict[str, Any]
    date: str | None
    commit: str | None
    hardware: Hardware | None
    processes: int
    batch_size: int
    dtype: str
    time_s: float | None
    data_hash: str
    bbox: Scores | None
    segm: Scores | None


class BenchmarkFigures(Benchmark):
    """Figures of a benchmark that the tables show."""

    date: str | None
    backbone: str | None


class Figures(BaseModel):
    """Content of docs/results/<run>.json."""

    name: str
    training: TrainingFigures | None = None
    benchmark: BenchmarkFigures | None = None
    stability: Study | None = None


def update_readme(run_dirs: Sequence[Path], root: Path) -> list[str]:
    """Store the figures of some runs, and regenerate the tables below `root` from all stored figures.

    Returns:
        Names of the tables that changed.

    Raises:
        UserError: if a folder has no run, or a document marks a table that is not its own or lacks one.
    """
    folder = root / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for run_dir in run_dirs:
        record = record_of(run_dir)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / f"{record['name']}.json", text)
    blocks, changed = blocks_of(read_records(folder)), []
    for document, names in DOCUMENTS.items():
        before = (root / document).read_text(encoding="utf-8")
        write_atomically(root / document, fill_blocks(document, before, blocks))
        changed += [name for name in names if blocks[name] not in before]
    return changed


def record_of(run_dir: Path) -> Record:
    """Read the figures of a run or of a stability study for the tables.

    Raises:
        UserError: if the folder has neither.
    """
    stability = run_dir / "stability.json"
    record: Record = {"name": real(run_dir).name}
    if stability.is_file():
        record["stability"] = read_study(stability)
        return record
    run = read_run(run_dir)
    if run.evaluation is not None and run.config:
        record["training"] = _training(run, run.evaluation)
    if run.benchmark is not None:
        # Benchmarks are logged at step 0, unlike trainings.
        logged = [
            one
            for one in run.journal
            if one.step == 0 and any(n.startswith(("throughput/", "ratio/")) for n in one.metrics)
        ]
        backbone = run.config.get("model.backbone")  # missing in benchmark.json of earlier versions
        record["benchmark"] = {"date": _date(logged), "backbone": backbone, **run.benchmark}
    return record


def _training(run: RunData, evaluation: Record) -> Record:
    near, environment = nearest_recipe(run.config), run.environment or run.benchmark or {}
    return {
        "recipe": near.recipe,
        "changes": {key: ours for key, (_, ours) in near.changes.items()},
        "date": _date(run.training),
        "commit": commit_of(run),
        "hardware": environment.get("hardware"),
        "versions": environment.get("versions"),
        "processes": environment.get("processes", run.config.get("train.processes", 1)),
        "batch_size": run.config["train.batch_size"],
        **{name.removeprefix("train."): run.config.get(name, False) for name in _SHOWN_AS_PRECISION},
        "steps": run.training[-1].step if run.training else None,
        "time_s": training_time_s(run),
        **{key: evaluation.get(key) for key in ("images", "data_hash", "bbox", "segm")},
    }


def _date(entries: Sequence[Entry]) -> str | None:
    """Date of the last of some entries of a journal."""
    return datetime.datetime.fromtimestamp(entries[-1].time_s, datetime.UTC).date().isoformat() if entries else None


def read_records(folder: Path) -> list[Record]:
    """Read all stored figures, sorted by name."""
    remedy = "`maskrcnn report --readme RUN` writes it anew"
    return [read_json(path, Figures, remedy) for path in sorted(folder.glob("*.json"))]


def blocks_of(records: Iterable[Record]) -> dict[str, str]:
    """Make the Markdown of each table by name; a sentence if nothing was measured."""
    kept = list(records)
    return {
        name: table(name, kept) or f"Not measured yet; run `{command}`, then `maskrcnn report --readme RUN`."
        for name, command in _COMMANDS.items()
    }


def fill_blocks(document: str, text: str, blocks: dict[str, str]) -> str:
    """Replace the content of the marked tables in the text of one of DOCUMENTS.

    Raises:
        UserError: if it marks a table that is not its own, or lacks one.
    """
    marked, names = [match["name"] for match in _BLOCK.finditer(text)], DOCUMENTS[document]
    if sorted(marked) != sorted(names):
        raise UserError(
            f"{document}: must mark the tables {', '.join(names)}, each once; got {', '.join(marked) or 'none'}"
        )
    return _BLOCK.sub(lambda match: f"{match[1]}\n{blocks[match['name']]}\n\n{match[3]}", text)


def table(name: str, records: Sequence[Record]) -> str:
    """Make one of the tables, all but the summary as in NVIDIA's README; empty if nothing was measured.

    Args:
        name: "summary" (trainings of unchanged recipes), "accuracy", "stability" (one table per study), "training"
            (throughput per precision, then weak scaling) or "inference".
    """
    trainings = _trainings(records)
    match name:
        case "summary":
            return _table(_SUMMARY, [row for row in trainings if not row["changes"]])
        case "accuracy":
            return _table(_ACCURACY, trainings)
        case "stability":
            studies = [record["stability"] for record in records if record.get("stability")]
            return "\n\n".join(f"{markdown_scores(study)}\n\n{markdown_note(study)}" for study in studies)
        case "training":
            parts = _table(_STEPS, _steps(records, "train")), _table(_SCALING, _weak_scaling(records))
            return "\n\n".join(filter(None, parts))
        case _:
            return _table(_STEPS, _steps(records, "inference"))


def _trainings(records: Sequence[Record]) -> list[Record]:
    """Rows of trainings, each with the study of its recipe."""
    studies = {record["name"]: record["stability"] for record in records if record.get("stability")}
    free = (*_SHOWN_AS_PRECISION, "train.seed")
    return [
        {
            **training,
            "study": studies.get(f"{training['recipe']}_stability"),
            "other_changes": {key: value for key, value in training["changes"].items() if key not in free},
            "speed": 1 / training["time_s"] if training["time_s"] else None,
        }
        for training in (record["training"] for record in records if record.get("training"))
    ]


def _steps(records: Sequence[Record], mode: str) -> list[Record]:
    """Rows of our network's steps in one mode."""
    return [
        {**benchmark, **case, "processes": 1, "speed": case["images_per_s"]}
        for benchmark in (record["benchmark"] for record in records if record.get("benchmark"))
        for case in (benchmark.get("steps") or {}).get("cases", [])
        if case["mode"] == mode and case["model"] == "ours"
    ]


def _weak_scaling(records: Sequence[Record]) -> list[Record]:
    """Rows of several processes, each with the same batch."""
    return [
        {**benchmark, **row, "dtype": scaling["dtype"], "batch": row["batch_per_process"], "speed": row["images_per_s"]}
        for benchmark in (record["benchmark"] for record in records if record.get("benchmark"))
        if (scaling := benchmark.get("scaling"))
        for row in scaling["weak"]
    ]


def _table(columns: str, rows: Sequence[Record]) -> str:
    """Format rows as Markdown; empty if there are none."""
    head = [column.partition(" = ") for column in columns.split(" | ")]
    cells = [[_CELLS[cell or title]({**row, "rows": rows}) for title, _, cell in head] for row in rows]
    return markdown_table([title for title, *_ in head], cells) if rows else ""


def _speedup(row: Record) -> str:
    """Speed-up over the same in plain float32, or else TF32; a dash if that was not measured or is this one."""
    same = [one for one in row["rows"] if all(one.get(key) == row.get(key) for key in _SAME)]
    for precision in ("float32", "tf32"):
        if _precision(row) == precision:
            return DASH
        base = next((one["speed"] for one in same if one["speed"] and _precision(one) == precision), None)
        if base and row["speed"]:
            return f"{row['speed'] / base:.2f}"
    return DASH


def _precision(row: Record) -> str:
    """Precision and enabled accelerators."""
    labels = {"compile": "compiled", "cuda_graph": "CUDA graph", "deterministic": "deterministic"}
    extras = [label for key, label in labels.items() if row.get(key)]
    return ", ".join([row["dtype"], *extras])


def _recipe(row: Record) -> str:
    """Recipe and its changed values, without those in the column of the precision."""
    changes = [
        f"{name.rpartition('.')[2]}={json.dumps(value)}"
        for name, value in row["changes"].items()
        if name not in _SHOWN_AS_PRECISION
    ]
    return ", ".join([row["recipe"], *changes[:3], *(["…"] if len(changes) > 3 else [])])


def _over_seeds(row: Record, iou_type: str) -> str:
    """Mean ± standard deviation of a study with the data of this training; a dash if there is none."""
    study = row["study"]
    score = study.get(iou_type, {}).get("AP") if study and study["data_hash"] == row["data_hash"] else None
    return DASH if not score or score["deviation"] is None else f"{score['mean']:.3f} ± {score['deviation']:.3f}"


def _score(row: Record, iou_type: str, name: str) -> str:
    return number((row[iou_type] or {}).get(name))


def _made(row: Record) -> str:
    commit = row.get("commit") or ""
    short = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
    return ", ".join(filter(None, (row.get("date"), short))) or "not recorded"


_CELLS: dict[str, Callable[[Record], str]] = {
    "recipe": _recipe,
    "network": lambda row: f"{row['backbone'] or ''} {row['height']} × {row['width']}".strip(),
    "backbone": lambda row: row["backbone"] or DASH,
    "hardware": lambda row: hardware_name(row["hardware"], row["processes"]) if row.get("hardware") else "not recorded",
    "processes": lambda row: str(row["processes"]),
    "batch": lambda row: str(row.get("batch") or row["batch_size"]),
    "precision": _precision,
    "time": lambda row: duration(row["time_s"]),
    "box AP": lambda row: _score(row, "bbox", "AP"),
    "mask AP": lambda row: _score(row, "segm", "AP"),
    "box AP50": lambda row: _score(row, "bbox", "AP50"),
    "mask AP50": lambda row: _score(row, "segm", "AP50"),
    "box AP over seeds": lambda row: _over_seeds(row, "bbox"),
    "mask AP over seeds": lambda row: _over_seeds(row, "segm"),
    "images/s": lambda row: number(row["images_per_s"], ".3g"),
    "speed-up": _speedup,
    "median step": lambda row: f"{row['step_s']['median']:.3g} s",
    "peak memory": lambda row: number(row["peak_memory_mib"], ".0f", "MiB"),
    "time to torchvision's": lambda row: number(row.get("ratio_to_torchvision"), ".2f"),
    "weak scaling": lambda row: number(row["speedup"], ".2f"),
    "made": _made,
}
