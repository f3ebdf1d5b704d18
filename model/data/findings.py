"""Findings of `prepare` about a data set: faults, repairs and warnings, each of a kind that the report counts."""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# error: the record cannot be used. repaired: it was changed, and is used. warning: it is used as it is.
Severity = Literal["error", "repaired", "warning"]


@dataclass(frozen=True)
class Finding:
    """One fault of a record, a file or a whole split."""

    kind: str  # class of fault, counted in the report
    text: str  # the fault, the rule, and the value found
    where: str = ""  # file and id; a function that does not know them leaves it to its caller
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


class Fault(Exception):  # noqa: N818 - not an error yet: `Findings.record` makes it a Finding
    """One record cannot be used; `kind` names the class of fault, the message describes this one."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Findings:
    """Findings of one file, made record by record."""

    repairs: bool = False  # data.on_invalid=mend
    all: list[Finding] = field(default_factory=list)
    where: str = ""

    @contextmanager
    def record(self, where: str) -> Iterator[None]:
        """Name the record that is checked; a Fault ends the check, and is then the record's only finding."""
        self.where, before = where, len(self.all)
        try:
            yield
        except Fault as fault:
            self.all[before:] = [Finding(fault.kind, str(fault), where)]

    def warn(self, kind: str, text: str) -> None:
        """Note what looks wrong but is used as it is."""
        self.all.append(Finding(kind, text, self.where, "warning"))

    def repaired(self, kind: str, text: str) -> None:
        """Note a repair that nobody would want otherwise."""
        self.all.append(Finding(kind, text, self.where, "repaired"))

    def repairable(self, kind: str, text: str) -> None:
        """Note a repair if repairs are asked for.

        Raises:
            Fault: if they are not.
        """
        if not self.repairs:
            raise Fault(kind, f"{text}; data.on_invalid=mend repairs it")
        self.repaired(kind, text)


def count_kinds(findings: Iterable[Finding], severity: Severity) -> dict[str, int]:
    """Number of findings of a severity by kind, most frequent first."""
    return dict(Counter(finding.kind for finding in findings if finding.severity == severity).most_common())


def described(findings: Iterable[Finding], most: int) -> list[str]:
    """Lines of text on findings: one for all that say the same, with their number and the place of the first.

    Args:
        most: lines before the rest are only counted.
    """
    of_text: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        of_text[finding.text].append(finding)
    groups = [*of_text.values()]
    lines = [
        str(first) if not others else f"{len(others) + 1} × {first.text}; the first: {first.where}"
        for first, *others in groups[:most]
    ]
    rest = sum(map(len, groups[most:]))
    return lines + ([f"… and {rest} more"] if rest else [])


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Write every finding as a line of a table (CSV): severity, kind, where, text."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("severity", "kind", "where", "text"))
        table.writerows((finding.severity, finding.kind, finding.where, finding.text) for finding in findings)
