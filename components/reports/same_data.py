"""Warnings of a report whose runs were not evaluated, or not trained, on the same data."""

from collections.abc import Sequence

from components.runs.files import RunData


def warnings_of(runs: Sequence[RunData]) -> list[str]:
    """All warnings of a report of these runs."""
    return [warning for warning in (evaluated_differently(runs), trained_differently(runs)) if warning]


def evaluated_differently(runs: Sequence[RunData]) -> str:
    """Warn that scores must not be compared, and say who was evaluated on what; empty if all used the same data."""
    groups = _groups(runs, "data_hash")
    if len(groups) < 2:
        return ""
    found = "; ".join(
        f"{_names(group)} on {(group[0].evaluation or {}).get('images', 'unknown')} images, data_hash {data_hash[:12]}"
        for data_hash, group in groups.items()
    )
    return (
        f"These runs were evaluated on different data, so their scores must not be compared: {found}. "
        "Evaluate all of them with one data.prepared_dir and evaluate.split."
    )


def trained_differently(runs: Sequence[RunData]) -> str:
    """Warn that the runs learned from different data; empty if all used the same data."""
    groups = _groups(runs, "train_data_hash")
    if len(groups) < 2:
        return ""
    found = "; ".join(f"{_names(group)} on data_hash {data_hash[:12]}" for data_hash, group in groups.items())
    return f"These runs were trained on different data, which may explain any difference: {found}."


def _groups(runs: Sequence[RunData], key: str) -> dict[str, list[RunData]]:
    """The evaluated runs by hash; files of earlier versions lack some, and such runs are left out."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if data_hash := (run.evaluation or {}).get(key):
            groups.setdefault(str(data_hash), []).append(run)
    return groups


def _names(runs: Sequence[RunData]) -> str:
    return ", ".join(run.name for run in runs)
