"""What a run of the tests lacked, in its last lines: a test may skip only for want of a program or a package, which its
reason names first.
"""

import re
from collections import Counter

import pytest

REASON = re.compile(r"needs (?P<what>[^,;:]+)")  # needs WHAT, and then why or where it comes from


def counted(reasons: list[str]) -> Counter[str]:
    """Skipped tests by what they need; a reason of another form stands for itself."""
    return Counter(found["what"] if (found := REASON.match(reason)) else reason for reason in reasons)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """`Chromium: 1`, and so on: how many tests wait for what."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped]
    reasons = [reason.removeprefix("Skipped: ") for reason in reasons]
    if reasons:
        terminalreporter.write_sep("-", "skipped tests, by what this machine lacks")
    for what, tests in counted(reasons).most_common():
        terminalreporter.write_line(f"{what}: {tests}")
