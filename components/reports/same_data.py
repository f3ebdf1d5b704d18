"""Warnings of a report about runs whose scores cannot be compared, or that learned from different data."""

from collections.abc import Callable, Mapping, Sequence

from components.runs.files import RunData
from model.scoring.names import COCO_MAX_DETECTIONS


def warnings_of(runs: Sequence[RunData]) -> list[str]:
    """All warnings of a report of these runs."""
    return [*scoring_warnings(runs), *_training_warnings(runs)]


def scoring_warnings(runs: Sequence[RunData]) -> list[str]:
    """Warnings that scores must not be compared, as `maskrcnn compare` refuses them; none if they can be."""
    warnings = []
    by_data = _groups(runs, "data_hash")
    if len(by_data) > 1:
        images = {key: (group[0].evaluation or {}).get("images") for key, group in by_data.items()}
        found = _listed(by_data, lambda key: f"on {images[key]} images, data_hash {key[:12]}")
        warnings.append(
            f"These runs were evaluated on different data, so their scores must not be compared: {found}. "
            "Evaluate all of them with one data.prepared_dir and evaluate.split."
        )
    by_limit = _groups(runs, "max_detections", COCO_MAX_DETECTIONS)
    if len(by_limit) > 1:
        warnings.append(
            "AP must not be compared, since it does not count as many detections per image and class in all runs: "
            f"{_listed(by_limit, str)}. Evaluate all of them with one evaluate.max_detections."
        )
    return warnings


def _training_warnings(runs: Sequence[RunData]) -> list[str]:
    groups = _groups(runs, "train_data_hash")
    if len(groups) < 2:
        return []
    found = _listed(groups, lambda key: f"on data_hash {key[:12]}")
    return [f"These runs were trained on different data, which may explain any difference: {found}."]


def _groups(runs: Sequence[RunData], key: str, default: object = None) -> dict[str, list[RunData]]:
    """The evaluated runs by a value of evaluation.json; runs whose file, of an earlier version, lacks it are left out.

    Args:
        runs: all runs of the report.
        key: name of the value.
        default: value of files that lack it, if it is known.
    """
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        if run.evaluation and (value := run.evaluation.get(key) or default):
            groups.setdefault(str(value), []).append(run)
    return groups


def _listed(groups: Mapping[str, Sequence[RunData]], describe: Callable[[str], str]) -> str:
    return "; ".join(f"{', '.join(run.name for run in group)} {describe(key)}" for key, group in groups.items())
