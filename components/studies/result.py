"""Result of a stability study, for those who read it without computing it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from model.errors import UserError
from model.files import read_json
from model.scoring.names import IOU_TYPES, SCORE_NAMES


class StabilityError(UserError):
    """Runs do not form one study."""


class ScoreOfSeeds(BaseModel):
    """One score in stability.json."""

    values: list[float | None]
    mean: float | None
    deviation: float | None
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None


class Study(BaseModel):
    """Content of stability.json."""

    seeds: Annotated[list[int], Field(min_length=1)]
    confidence: float
    bbox: dict[str, ScoreOfSeeds] = {}
    segm: dict[str, ScoreOfSeeds] = {}
    max_detections: int | None = None
    images: int
    data_hash: str
    train_data_hash: str | None = None
    config: dict[str, Any]
    commits: list[str]
    date: str

    @model_validator(mode="after")
    def _scores_are_complete(self) -> "Study":
        for iou_type in self.model_fields_set & {*IOU_TYPES}:
            scores: dict[str, ScoreOfSeeds] = getattr(self, iou_type)
            if missing := [name for name in SCORE_NAMES if name not in scores]:
                raise ValueError(f"{iou_type}.{missing[0]} is missing")
            for name, score in scores.items():
                if len(score.values) != len(self.seeds) or (score.mean is not None and None in score.values):
                    raise ValueError(f"{iou_type}.{name}.values must have a number for each seed, got {score.values}")
        return self


def read_study(path: Path) -> dict[str, Any]:
    """The content of a stability.json.

    Raises:
        UserError: if it is damaged.
    """
    content: dict[str, Any] = read_json(path, Study, "`maskrcnn stability --summary` writes it anew")
    return content


@dataclass(frozen=True)
class StabilityResult:
    """Summary of a study."""

    output_dir: Path  # has stability.json, .csv, .md and .png
    report: dict[str, Any]  # content of stability.json; see components/studies/tables.py for its keys

    @property
    def path(self) -> Path:
        """Path of stability.json."""
        return self.output_dir / "stability.json"
