"""Comparison of two studies: parameters that differ, and every score's difference with its interval and p value.

Two single runs have intervals over the images of the split instead, without p values.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from components.runs.identity import differences_of_descriptions
from components.runs.result import Result
from components.studies.comparison_text import sentences
from components.studies.intervals import CONFIDENCE, paired_difference, welch_difference
from components.studies.tables import report_of
from model.scoring.names import IOU_TYPES, IouType

Study = dict[str, Any]  # content of stability.json


def study_of(found: Study | Result) -> Study:
    """A run as a study of one seed; a study as it is."""
    return report_of([found], date="") if isinstance(found, Result) else found


def compare(before: tuple[str, Study | Result], after: tuple[str, Study | Result]) -> dict[str, Any]:
    """Compare two studies or runs, each with its name; components/compare.py has the keys.

    Raises:
        UserError: if the kept results of a run are not those that its evaluation.json scores.
    """
    (name, found), (other_name, other_found) = before, after
    one, other = study_of(found), study_of(other_found)
    over_images: dict[IouType, dict[str, tuple[float, float]]] = {}
    resamples: dict[str, int] = {}
    reason = ""
    if isinstance(found, Result) and isinstance(other_found, Result):
        from components.studies.image_bootstrap import RESAMPLES, image_intervals  # studies do not need its imports

        over_images, reason = image_intervals(found, other_found)
        resamples = {"resamples": RESAMPLES} if over_images else {}
    method = "images" if over_images else _method(one["seeds"], other["seeds"])
    comparison: dict[str, Any] = {
        "before": {"name": name, "seeds": one["seeds"]},
        "after": {"name": other_name, "seeds": other["seeds"]},
        "method": method,
        "confidence": CONFIDENCE,
        **resamples,
        "images": one["images"],
        "parameters": differences_of_descriptions([one["config"], other["config"]]),
        "same_training_data": one.get("train_data_hash") == other.get("train_data_hash"),
    }
    for iou_type in IOU_TYPES:
        if iou_type in one and iou_type in other:
            comparison[iou_type] = {
                score: _score(one[iou_type][score], other[iou_type][score], method) for score in one[iou_type]
            }
            for score, interval in over_images.get(iou_type, {}).items():
                comparison[iou_type][score]["interval"] = interval
    return comparison | {"sentences": sentences(comparison, reason)}


def _method(seeds: Sequence[int], other_seeds: Sequence[int]) -> str:
    if min(len(seeds), len(other_seeds)) == 1:
        return "none"
    return "paired" if sorted(seeds) == sorted(other_seeds) else "welch"


def _score(before: dict[str, Any], after: dict[str, Any], method: str) -> dict[str, Any]:
    """Compare one score over the seeds, which a report lists in ascending order."""
    if before["mean"] is None or after["mean"] is None:
        return {"before": before["mean"], "after": after["mean"], "difference": None, "interval": None, "p": None}
    difference = (paired_difference if method == "paired" else welch_difference)(before["values"], after["values"])
    values = asdict(difference)
    return {"before": before["mean"], "after": after["mean"], "difference": values.pop("mean"), **values}
