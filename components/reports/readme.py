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

from components.reports.layout import Table, markdown_table
from components.reports.setup import commit_of
from components.reports.speed import training_time_s
from components.runs.environment import hardware_name
from components.runs.figures import DASH, duration, number
from components.runs.files import RunData, read_run
from components.runs.recipes import nearest_recipe
from components.studies import tables
from model.errors import UserError
from model.files import write_atomically

RESULTS = Path("docs/results")
# The documents, relative to the repository's root, and the tables that each of them marks.
DOCUMENTS = {"README.md": ("summary",), "docs/results.md": ("accuracy", "stability", "training", "inference")}
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_OWN_COLUMN = ("train.dtype", "train.compile", "train.cuda_graph")  # shown in the column of the precision
Record = dict[str, Any]


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
    record: Record = {"name": run_dir.resolve().name}
    if stability.is_file():
        record["stability"] = json.loads(stability.read_text(encoding="utf-8"))
        return record
    run = read_run(run_dir)
    if run.evaluation is not None and run.config:
        record["training"] = _training(run)
    if run.benchmark is not None:
        backbone = run.config.get("model.backbone")  # missing in benchmark.json of earlier versions
        record["benchmark"] = {"date": _date_of_benchmark(run), "backbone": backbone, **run.benchmark}
    return record


def read_records(folder: Path) -> list[Record]:
    """Read all stored figures, sorted by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def blocks_of(records: Iterable[Record]) -> dict[str, str]:
    """Make the Markdown of each table by name; a sentence if nothing was measured."""
    kept = list(records)
    return {name: make(kept) or _nothing(command) for name, (make, command) in _TABLES.items()}


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


def summary_table(records: Sequence[Record]) -> str:
    """Make README's table: a row per training of an unchanged recipe, with mean ± std over seeds if studied."""
    trainings = [record["training"] for record in records if "training" in record]
    studies = {record["name"]: record["stability"] for record in records if "stability" in record}
    head = ["recipe", "hardware", "precision", "training", "box AP", "mask AP", "box AP over seeds", "mask AP over seeds",
            "made"]  # fmt: skip
    rows = [
        [
            _title(one),
            _machine(one, one["processes"]),
            _precision(one),
            duration(one["time_s"]),
            *(number((one[iou_type] or {}).get("AP")) for iou_type in ("bbox", "segm")),
            *(_over_seeds(studies.get(f"{one['recipe']}_stability"), one, iou_type) for iou_type in ("bbox", "segm")),
            _made(one),
        ]
        for one in trainings
        if not one["changes"]
    ]
    return markdown_table(Table(head, rows)) if rows else ""


def accuracy_table(records: Sequence[Record]) -> str:
    """Make "training accuracy", as in NVIDIA's README: AP, training time, and speed-up of lower precisions."""
    trainings = [record["training"] for record in records if "training" in record]
    head = ["training", "hardware", "batch", "precision", "box AP", "mask AP", "box AP50", "mask AP50", "time", "speed-up",
            "made"]  # fmt: skip
    rows = [
        [
            _title(one),
            _machine(one, one["processes"]),
            str(one["batch_size"]),
            _precision(one),
            *(number((one[iou_type] or {}).get(name)) for name in ("AP", "AP50") for iou_type in ("bbox", "segm")),
            duration(one["time_s"]),
            _speedup(
                one, trainings, key=_training_key, value=lambda other: 1 / other["time_s"] if other["time_s"] else None
            ),
            _made(one),
        ]
        for one in trainings
    ]
    return markdown_table(Table(head, rows)) if rows else ""


def stability_table(records: Sequence[Record]) -> str:
    """Make "training stability test", as in NVIDIA's README: one table per study."""
    studies = [record["stability"] for record in records if "stability" in record]
    return "\n\n".join(f"{tables.markdown_table(study).rstrip()}\n\n{tables.markdown_note(study)}" for study in studies)


def training_table(records: Sequence[Record]) -> str:
    """Make "training performance", as in NVIDIA's README: throughput and speed-up per precision; then weak scaling."""
    return "\n\n".join(filter(None, (_steps_table(records, "train"), _scaling_table(records))))


def inference_table(records: Sequence[Record]) -> str:
    """Make "inference performance", as in NVIDIA's README: throughput and speed-up per precision."""
    return _steps_table(records, "inference")


def _steps_table(records: Sequence[Record], mode: str) -> str:
    cases = [
        {**case, "benchmark": benchmark}
        for benchmark in _benchmarks(records)
        for case in (benchmark.get("steps") or {}).get("cases", [])
        if case["mode"] == mode and case["model"] == "ours"
    ]
    head = ["network", "hardware", "batch", "precision", "images/s", "speed-up", "median step", "peak memory",
            "time to torchvision's", "made"]  # fmt: skip
    rows = [
        [
            f"{case['benchmark']['backbone'] or ''} {case['height']} × {case['width']}".strip(),
            _machine(case["benchmark"], 1),
            str(case["batch"]),
            _precision(case),
            number(case["images_per_s"], ".3g"),
            _speedup(case, cases, key=_case_key, value=lambda other: other["images_per_s"]),
            f"{case['step_s']['median']:.3g} s",
            number(case["peak_memory_mib"], ".0f", "MiB"),
            number(case.get("ratio_to_torchvision"), ".2f"),
            _made(case["benchmark"]),
        ]
        for case in cases
    ]
    return markdown_table(Table(head, rows)) if rows else ""


def _scaling_table(records: Sequence[Record]) -> str:
    measured = [
        {**row, "dtype": benchmark["scaling"]["dtype"], "batch": row["batch_per_process"], "benchmark": benchmark}
        for benchmark in _benchmarks(records)
        if "scaling" in benchmark
        for row in benchmark["scaling"]["weak"]
    ]
    head = [
        "weak scaling",
        "hardware",
        "processes",
        "batch each",
        "precision",
        "images/s",
        "speed-up",
        "weak scaling",
        "made",
    ]
    rows = [
        [
            row["benchmark"]["backbone"] or DASH,
            _machine(row["benchmark"], row["processes"]),
            str(row["processes"]),
            str(row["batch"]),
            _precision(row),
            number(row["images_per_s"], ".3g"),
            _speedup(
                row,
                measured,
                key=lambda one: (*_case_key(one), one["processes"]),
                value=lambda one: one["images_per_s"],
            ),
            number(row["speedup"], ".2f"),
            _made(row["benchmark"]),
        ]
        for row in measured
    ]
    return markdown_table(Table(head, rows)) if rows else ""


_TABLES: dict[str, tuple[Callable[[Sequence[Record]], str], str]] = {
    "summary": (summary_table, "maskrcnn train"),
    "accuracy": (accuracy_table, "maskrcnn train"),
    "stability": (stability_table, "maskrcnn stability"),
    "training": (training_table, "maskrcnn benchmark train scaling"),
    "inference": (inference_table, "maskrcnn benchmark inference"),
}


def _training(run: RunData) -> Record:
    assert run.evaluation is not None
    near, last = nearest_recipe(run.config), run.training[-1].time_s if run.training else None
    environment = run.environment or run.benchmark or {}
    return {
        "recipe": near.recipe,
        "changes": {key: ours for key, (_, ours) in near.changes.items()},
        "date": None if last is None else _day(last),
        "commit": commit_of(run),
        "hardware": environment.get("hardware"),
        "versions": environment.get("versions"),
        "processes": environment.get("processes", run.config.get("train.processes", 1)),
        "batch_size": run.config["train.batch_size"],
        **{name.removeprefix("train."): run.config.get(name, False) for name in _OWN_COLUMN},
        "steps": run.training[-1].step if run.training else None,
        "time_s": training_time_s(run),
        **{key: run.evaluation.get(key) for key in ("images", "data_hash", "bbox", "segm")},
    }


def _date_of_benchmark(run: RunData) -> str | None:
    """Date on which the benchmark's figures were logged, which is at step 0, unlike training's."""
    times = [
        entry.time_s
        for entry in run.journal
        if entry.step == 0 and any(name.startswith("throughput/") for name in entry.metrics)
    ]
    return _day(times[-1]) if times else None


def _day(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).date().isoformat()


def _benchmarks(records: Sequence[Record]) -> list[Record]:
    return [record["benchmark"] for record in records if "benchmark" in record]


def _speedup(
    one: Record, others: Sequence[Record], *, key: Callable[[Record], Any], value: Callable[[Record], float | None]
) -> str:
    """Speed-up over the same in plain float32, or else TF32; a dash if that was not measured or is this one."""
    for precision in ("float32", "tf32"):
        if _precision(one) == precision:
            return DASH
        for other in others:
            mine, base = value(one), value(other)
            if _precision(other) == precision and key(other) == key(one) and mine and base:
                return f"{mine / base:.2f}"
    return DASH


def _over_seeds(study: Record | None, one: Record, iou_type: str) -> str:
    """Mean ± standard deviation of a study with the data of this training; a dash if there is none."""
    score = study.get(iou_type, {}).get("AP") if study and study["data_hash"] == one["data_hash"] else None
    return DASH if not score or score["deviation"] is None else f"{score['mean']:.3f} ± {score['deviation']:.3f}"


def _precision(one: Record) -> str:
    """Precision and enabled accelerators."""
    extras = [label for key, label in (("compile", "compiled"), ("cuda_graph", "CUDA graph")) if one.get(key)]
    return ", ".join([one["dtype"], *extras])


def _training_key(one: Record) -> Any:
    changes = {name: value for name, value in one["changes"].items() if name not in (*_OWN_COLUMN, "train.seed")}
    return (
        one["recipe"],
        json.dumps(changes, sort_keys=True),
        one["processes"],
        json.dumps(one["hardware"], sort_keys=True),
    )


def _case_key(case: Record) -> tuple[Any, ...]:
    benchmark = case["benchmark"]
    size = case.get("height"), case.get("width")
    return benchmark["backbone"], *size, case["batch"], json.dumps(benchmark["hardware"], sort_keys=True)


def _title(training: Record) -> str:
    """Recipe and its changed values, without those in the column of the precision."""
    changes = [
        f"{name.rpartition('.')[2]}={json.dumps(value)}"
        for name, value in training["changes"].items()
        if name not in _OWN_COLUMN
    ]
    return ", ".join([training["recipe"], *changes[:3], *(["…"] if len(changes) > 3 else [])])


def _machine(one: Record, processes: int) -> str:
    return hardware_name(one["hardware"], processes) if one.get("hardware") else "not recorded"


def _made(one: Record) -> str:
    commit = one.get("commit") or ""
    short = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
    return ", ".join(filter(None, (one.get("date"), short))) or "not recorded"


def _nothing(command: str) -> str:
    return f"Not measured yet; run `{command}`, then `maskrcnn report --readme RUN`."
