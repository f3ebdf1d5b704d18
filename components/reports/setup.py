"""Report chapters on the setup: question, data, configuration, environment, commands."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from components.reports.layout import Chapter, Table
from components.reports.speed import training_time_s
from components.runs.figures import DASH, duration, number
from components.runs.files import RunData
from components.runs.identity import deciding, differences
from components.runs.recipes import Nearest, load_recipe
from model.scoring.names import TITLES

_SHOWN_CLASSES = 100
_PATHS = (
    "data.raw_dir",
    "data.prepared_dir",
    "train.output_dir",
)  # they do not affect a result, but are needed to reproduce it
_COUNTS = {
    "images": "images",
    "images_without_instances": "images without an instance",
    "instances": "instances",
    "crowds": "regions of crowds",
    "clipped_boxes": "boxes clipped to the frame",
    "dropped": "records dropped",
    "repaired": "records repaired",
    "warnings": "warnings",
    "data_hash": "hash",
}
_HEADLINES = (("bbox", "AP"), ("segm", "AP"), ("bbox", "AP50"), ("segm", "AP50"), ("proposals", "AR1000"))


def question(runs: Sequence[RunData], asked: str) -> Chapter:
    """Make the chapter of the question, with the answer in one table."""
    shown = [
        (result_type, name) for result_type, name in _HEADLINES if any(run.scores.get(result_type) for run in runs)
    ]
    head = ["run", *(f"{TITLES[result_type]} {name}" for result_type, name in shown), "steps", "time in steps"]
    rows = []
    for run in runs:
        found = [number(run.scores.get(result_type, {}).get(name)) for result_type, name in shown]
        steps = str(run.training[-1].step) if run.training else DASH
        rows.append([run.name, *found, steps, duration(training_time_s(run))])
    return Chapter("question", "Question", [asked or _question(runs)], [Table(head, rows)])


def data(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of training and test data; runs with the same data share a table."""
    tables, notes = [], []
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for run in runs:
        same_data = next((names for report, names in groups if report == run.data_report), None)
        if same_data is None:
            groups.append((run.data_report, [run.name]))
        else:
            same_data.append(run.name)
    for report, names in groups:
        if not report:
            notes.append(
                f"{', '.join(names)}: the prepared data are not at the path in config.yaml, so there are no counts."
            )
            continue
        rows = [[label, *(_count(report[split], key) for split in report)] for key, label in _COUNTS.items()]
        caption = ", ".join(names) if len(groups) > 1 else ""
        tables.append(Table(["", *report], rows, caption))
        findings = _findings(report)
        if findings:
            tables.append(Table(["what `prepare` found", *report, "for example"], findings, caption))
        names_of_classes = list(next(iter(report.values()))["per_class"])
        listed = ", ".join(names_of_classes[:_SHOWN_CLASSES])
        notes.append(
            f"{len(names_of_classes)} classes: {listed}{' …' if len(names_of_classes) > _SHOWN_CLASSES else ''}."
        )
    return Chapter("data", "Data", notes, tables)


def configuration(runs: Sequence[RunData], nearest: Mapping[str, Nearest]) -> Chapter:
    """Make the chapter of the configuration: differences between runs, then to the nearest recipe, then all values."""
    tables, notes = [], []
    configured = [run for run in runs if run.config]
    names = [run.name for run in configured]
    if len(configured) > 1:
        changed = differences([deciding(run.config) for run in configured])
        rows = [[key, *map(_value, values)] for key, values in changed.items()]
        if rows:
            tables.append(Table(["between the runs", *names], rows))
        else:
            notes.append("The runs have the same configuration.")
    for run in configured:
        near = nearest[run.name]
        rows = [[key, _value(theirs), _value(ours)] for key, (theirs, ours) in near.changes.items()]
        if rows:
            tables.append(Table([f"recipe {near.recipe}", "recipe", run.name], rows))
        else:
            notes.append(f"{run.name} is the recipe {near.recipe}, unchanged.")
    keys = dict.fromkeys(key for run in configured for key in run.config)
    everything = [[key, *(_value(run.config.get(key)) for run in configured)] for key in keys]
    if everything:
        tables.append(Table(["all values", *names], everything, "All values", folded=True))
    return Chapter("configuration", "Configuration", notes, tables)


def environment(runs: Sequence[RunData]) -> Chapter:
    """Make the chapter of the environment: commit, hardware, versions."""
    columns = [_environment(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, DASH) for column in columns)] for name in names]
    notes = [sentence for run in runs for sentence in run.missing]
    return Chapter(
        "environment", "Environment", notes, [Table(["", *(run.name for run in runs)], rows)] if rows else []
    )


def reproduce(runs: Sequence[RunData], nearest: Mapping[str, Nearest]) -> Chapter:
    """Make the chapter of commands that reproduce the runs and this report."""
    commands = []
    for run in runs:
        if not run.config:
            continue
        near = nearest[run.name]
        commit = commit_of(run)
        if commit:
            commands.append(f"git checkout {commit.removesuffix('-dirty')}")
        recipe = load_recipe(near.recipe).flat()
        changes = {key: ours for key, (_, ours) in near.changes.items()}
        changes |= {key: run.config[key] for key in _PATHS if run.config.get(key) not in (None, recipe[key])}
        overrides = [shlex.quote(f"{key}={_yaml(value)}") for key, value in changes.items()]
        commands += [" ".join(["maskrcnn recipe", near.recipe, *overrides]), "dvc repro"]
    commands.append(" ".join(["maskrcnn report", *(shlex.quote(str(run.run_dir)) for run in runs)]))
    dirty = [run.name for run in runs if commit_of(run).endswith("-dirty")]
    notes = [f"{', '.join(dirty)}: made with uncommitted changes."] if dirty else []
    return Chapter("reproduce", "Reproduce", notes, commands=list(dict.fromkeys(commands)))


def _question(runs: Sequence[RunData]) -> str:
    names = " and ".join((", ".join(run.name for run in runs[:-1]), runs[-1].name)) if len(runs) > 1 else runs[0].name
    if len(runs) == 1:
        return f"How well does {names} find objects, and what does it get wrong?"
    changed = list(differences([deciding(run.config) for run in runs if run.config]))
    if not changed:
        return f"Do {names}, which have the same configuration, give the same result?"
    verb = "does" if len(changed) == 1 else "do"
    return f"What difference {verb} {', '.join(changed[:6])}{' …' if len(changed) > 6 else ''} make between {names}?"


def _findings(report: dict[str, Any]) -> list[list[str]]:
    """Rows of kinds: its number in each split, and an example."""
    rows = []
    for group in ("dropped", "repaired", "warnings"):
        for kind in dict.fromkeys(kind for split in report.values() for kind in split.get(group, {})):
            counts = [str(split.get(group, {}).get(kind, 0)) for split in report.values()]
            examples = [split["examples"][kind] for split in report.values() if kind in split.get("examples", {})]
            rows.append([f"{group}: {kind}", *counts, next(iter(examples), DASH)])
    return rows


def _count(split: dict[str, Any], key: str) -> str:
    value = split.get(key, {})
    if isinstance(value, dict):
        return str(sum(value.values()))
    return value[:12] if key == "data_hash" and value else str(value)


def _environment(run: RunData) -> dict[str, str]:
    where = run.environment or run.benchmark or {}
    hardware, versions = where.get("hardware", {}), where.get("versions", {})
    gpus = f"{hardware['gpus']} × {hardware['gpu']}" if hardware.get("gpus") else "none" if hardware else ""
    facts = {
        "commit": commit_of(run),
        "processor": f"{hardware['cpu']}, {hardware['cores']} cores" if hardware else "",
        "GPUs": gpus,
        "processes": str((run.environment or {}).get("processes", "")),
        **versions,
    }
    return {name: fact for name, fact in facts.items() if fact}


def commit_of(run: RunData) -> str:
    """Commit of the training; else of evaluation or benchmark; empty if unknown."""
    return next(
        (
            found["commit"]
            for found in (run.environment, run.evaluation, run.benchmark)
            if found and found.get("commit")
        ),
        "",
    )


def _value(value: Any) -> str:
    return (
        DASH if value is None else value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    )


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
