"""Result of a stability study, for those who read it without computing it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError


class StabilityError(UserError):
    """Runs do not form one study."""


@dataclass(frozen=True)
class StabilityResult:
    """Summary of a study."""

    output_dir: Path  # has stability.json, .csv, .md and .png
    report: dict[str, Any]  # content of stability.json; see components/studies/tables.py for its keys

    @property
    def path(self) -> Path:
        """Path of stability.json."""
        return self.output_dir / "stability.json"
