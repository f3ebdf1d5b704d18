"""Findings of `prepare` about a data set: faults, repairs and warnings, each of a kind that the report counts."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# error: the record cannot be used. repaired: it was changed, and is used. warning: it is used as it is.
Severity = Literal["error", "repaired", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault of a record, a file or a whole split."""

    kind: str  # class of fault, counted in the report
    text: str  # what is wrong, what it must be, what was found
    where: str = ""  # file and id; a function that does not know them leaves it to its caller
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def count_kinds(findings: Iterable[Finding], severity: Severity) -> dict[str, int]:
    """Number of findings of a severity by kind, most frequent first."""
    return dict(Counter(finding.kind for finding in findings if finding.severity == severity).most_common())


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Write every finding as a line of a table (CSV): severity, kind, where, text."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("severity", "kind", "where", "text"))
        table.writerows((finding.severity, finding.kind, finding.where, finding.text) for finding in findings)
