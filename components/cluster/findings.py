"""Findings of the preflight: one line each, with what was found and what to do."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from components.cluster.api import Answer, JobApi

# unknown: this account is not allowed to look.
Level = Literal["ok", "warning", "fault", "unknown"]


@dataclass(frozen=True)
class Finding:
    """Answer to one question; a fault keeps the job from running as the cluster is now."""

    level: Level
    subject: str
    text: str  # what was found, and after a semicolon what to do

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject}: {self.text}"


def unseen(subject: str, answer: Answer, permission: str) -> Finding:
    """Finding about an object that could not be read: absence is for the caller to judge."""
    if answer.status == 403:
        return Finding("unknown", subject, f"not allowed to look ({permission})")
    return Finding("unknown", subject, f"no answer to {permission}: {answer.status} {answer.message}")


def served(api: JobApi, group_version: str, plural: str, advice: str) -> Finding:
    """Find out whether the API server serves a kind of objects."""
    subject, found = f"api {plural}", api.request("GET", f"/apis/{group_version}")
    names = {resource["name"] for resource in found.body.get("resources", [])}
    if found.status == 404 or (found.status == 200 and plural not in names):
        return Finding("fault", subject, f"{group_version} must be served, but is not; {advice}")
    if found.status != 200:
        return unseen(subject, found, "discovery")
    return Finding("ok", subject, f"{group_version} is served")


def summary(findings: Sequence[Finding]) -> str:
    """Number of findings of each level."""
    numbers = Counter(finding.level for finding in findings)
    parts = [f"{numbers['ok']} ok"]
    parts += [f"{numbers[level]} {level}{'' if numbers[level] == 1 else 's'}" for level in ("warning", "fault")]
    parts += [f"{numbers['unknown']} unknown"] if numbers["unknown"] else []
    return ", ".join(parts)
