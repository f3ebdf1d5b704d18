"""Scores by which a model is registered, or becomes the champion."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RegistryConfig
from components.runs.result import ap_of, no_ap, read_evaluation
from model.scoring.names import IOU_TYPES, TITLES, IouType

if TYPE_CHECKING:
    from components.tracking.registry import Version


@dataclass(frozen=True)
class Scored:
    """Scores of a checkpoint, and the data they refer to."""

    ap: Mapping[IouType, float]  # empty for proposals
    data_hash: str

    def tags(self) -> dict[str, str]:
        """The scores as tags of a registry version."""
        return {f"ap/{iou_type}": repr(ap) for iou_type, ap in self.ap.items()} | {
            "evaluation.data_hash": self.data_hash
        }

    @staticmethod
    def of_tags(tags: dict[str, str]) -> "Scored":
        """Parse the tags written by `tags`."""
        ap: dict[IouType, float] = {
            iou_type: float(tags[f"ap/{iou_type}"]) for iou_type in IOU_TYPES if f"ap/{iou_type}" in tags
        }
        return Scored(ap, tags.get("evaluation.data_hash", ""))


def read_scored(run_dir: Path) -> tuple[str, Scored]:
    """Read the name and scores of a run's evaluated checkpoint.

    Raises:
        ResultError: if evaluation.json is missing, damaged, or has no scores.
    """
    evaluation = read_evaluation(run_dir, "checkpoint", "data_hash")
    ap = ap_of(evaluation)
    if not ap and not evaluation.get("proposals"):
        raise no_ap(run_dir)
    return evaluation["checkpoint"], Scored(ap, evaluation["data_hash"])


def shortfall(minimum: RegistryConfig, scored: Scored) -> str:
    """Reason why the scores do not suffice: each AP below its registry.min_…; empty if they do."""
    if not scored.ap:
        return "proposals have no AP, which registration requires"
    minima = {"bbox": minimum.min_bbox_ap, "segm": minimum.min_segm_ap}
    lacking = [
        f"{TITLES[iou_type]} AP {scored.ap.get(iou_type, 0.0):.4f} is below registry.min_{iou_type}_ap "
        f"{minima[iou_type]:.4f}"
        for iou_type in IOU_TYPES
        if scored.ap.get(iou_type, 0.0) < minima[iou_type]
    ]
    return ", ".join(lacking)


def beats(version: "Version", champion: "Version | None") -> tuple[bool, str]:
    """Decide if a version should be champion, and why: by mask AP, or by box AP if one of the two has no masks."""
    if champion is None:
        return True, "the champion, as the first version"
    if champion.number == version.number:
        return True, "already the champion"
    new, old = Scored.of_tags(version.tags), Scored.of_tags(champion.tags)
    if new.data_hash != old.data_hash:
        return False, (
            f"not the champion: the champion, version {champion.number}, was evaluated on other data; evaluate its "
            "run on this data and register it again, or set the alias in MLflow"
        )
    iou_type = next((iou_type for iou_type in reversed(IOU_TYPES) if iou_type in new.ap and iou_type in old.ap), None)
    if iou_type is None:
        return False, f"not the champion: the champion, version {champion.number}, has no AP to compare with"
    comparison = (
        f"{TITLES[iou_type]} AP {new.ap[iou_type]:.4f} against {old.ap[iou_type]:.4f} of version {champion.number}"
    )
    is_better = new.ap[iou_type] > old.ap[iou_type]
    return is_better, f"{'the new champion' if is_better else 'not the champion'}: {comparison}"
