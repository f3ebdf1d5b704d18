"""The local record of a run's metrics, which no outage can touch: `log.jsonl`, and `metrics.csv` made from it.

A line is {"step": …, "time": seconds since 1970, "metrics": {name: value}}; null: absent or not finite.
"""

import csv
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from model.errors import UserError
from model.files import replacing, write_atomically

_TAIL_BYTES = 16384  # end of a journal, longer than its last line


@dataclass(frozen=True)
class Entry:
    """The metrics of one step, logged at once."""

    step: int
    time_s: float
    metrics: dict[str, float | None]


class _Line(BaseModel):
    """An entry as the file has it."""

    step: int
    time: float
    metrics: dict[str, float | None]


class Journal:
    """An append-only file of entries. One process writes to it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_torn_line()

    def append(self, step: int, metrics: Mapping[str, float | None]) -> Entry:
        """Write one line; it survives the death of this process from here on.

        Raises:
            OSError: if it cannot be written as a whole, for example since the disk is full; then nothing of it stays.
        """
        entry = Entry(step, round(time.time(), 3), {name: _finite(value) for name, value in metrics.items()})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
        except OSError:
            self._drop_torn_line()  # else the next line would continue it
            raise
        return entry

    def read(self) -> list[Entry]:
        """Every line, oldest first."""
        return read_journal(self.path)

    def rewind(self, step: int, undone: str | None = None) -> list[bool]:
        """Forget what came after a step. Returns for each line that was there whether it stayed.

        Args:
            undone: what the step's metrics begin with that are also forgotten, with the others of their line.
        """
        entries = self.read()
        kept = [entry.step <= step and not (entry.step == step and _has(entry, undone)) for entry in entries]
        if not all(kept):
            lines = (_line(entry) for entry, is_kept in zip(entries, kept, strict=True) if is_kept)
            write_atomically(self.path, "".join(lines))
        return kept

    def write_csv(self, path: Path) -> None:
        """A table with a row for each step and a column for each metric; the last value of a step stands."""
        rows: dict[int, dict[str, float | None]] = {}
        for entry in self.read():
            rows.setdefault(entry.step, {}).update(entry.metrics)
        columns = ["step", *sorted({name for row in rows.values() for name in row})]
        with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns, lineterminator="\n")
            table.writeheader()
            table.writerows({"step": step, **rows[step]} for step in sorted(rows))

    def _drop_torn_line(self) -> None:
        """Remove a line without its end, which a process leaves that was killed, or had no disk left, as it wrote."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def read_journal(path: Path) -> list[Entry]:
    """Read a journal that another process may be writing: its complete lines, oldest first; none without a file.

    Raises:
        UserError: if a line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [_entry(path, line) for line in lines]


def last_step(path: Path) -> int:
    """Step of a journal's last complete line, read from its end; 0 if there is none.

    Raises:
        UserError: if that line is damaged.
    """
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return _entry(path, lines[-1]).step if lines else 0


def _entry(path: Path, text: bytes) -> Entry:
    try:
        line = _Line.model_validate_json(text)
    except ValidationError as error:
        raise UserError(
            f"{path}: each line must be a JSON object with step, time and metrics, as training writes it, got "
            f"{text[:60]!r}; delete that line, or move the file away"
        ) from error
    return Entry(line.step, line.time, line.metrics)


def _has(entry: Entry, prefix: str | None) -> bool:
    return prefix is not None and any(name.startswith(prefix) for name in entry.metrics)


def _line(entry: Entry) -> str:
    return json.dumps({"step": entry.step, "time": entry.time_s, "metrics": entry.metrics}, allow_nan=False) + "\n"


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
