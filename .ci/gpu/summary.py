"""Print a summary of a session in Markdown, ready for docs/measurements.md.

    python .ci/gpu/summary.py OUT

A part that cannot be read is replaced by the reason.
"""

import datetime
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

OUT = Path(sys.argv[1])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format rows as a Markdown table; empty if there are none."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if lines else ""


def log(name: str) -> list[str]:
    """Read the lines that a step wrote."""
    path = OUT / "logs" / f"{name}.txt"
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def rows_of_steps() -> list[list[str]]:
    """Read name, result, seconds and time of each step, in order."""
    return [line.split(" | ") for line in (OUT / "steps.txt").read_text().splitlines()]


def written(pattern: str) -> dict[str, Path]:
    """Find the files that steps wrote, by the name of the step, which is `*` in the pattern; ignore other files."""
    paths = {name: OUT / pattern.replace("*", name) for name, *_ in rows_of_steps()}
    return {name: path for name, path in sorted(paths.items()) if path.is_file()}


def benchmarks() -> dict[str, dict[str, Any]]:
    """Read benchmark.json of each step that measured the network, with the day on which it was written."""
    found = {}
    for name, path in written("*/benchmark.json").items():
        day = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date()
        found[name] = {"date": str(day), **json.loads(path.read_text())}
    return found


def driver() -> str:
    """The driver of the first GPU and the power it may take; nothing without nvidia-smi."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return f" (driver {done.stdout.strip()})" if done.returncode == 0 else ""


def machine() -> str:
    from components.runs.environment import environment

    made = environment()
    hardware, versions = made["hardware"], made["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{datetime.datetime.now(datetime.UTC).date()}, commit {made['commit'] or 'unknown'}, "
        f"{hardware['gpu'] or hardware['cpu']}{driver()}, {hardware['cores']} cores; {packages}.\n"
        "`.ci/gpu/session`; steps of the network are waited for in groups of `benchmark.steps_per_wait`."
    )


def steps() -> str:
    rows = rows_of_steps()
    text = table(["step", "", "s", "at s"], rows)
    if any(name.startswith("ONLY=") for name, *_ in rows):
        text += (
            "\n\nSteps below the last row with ONLY ran in this call. Others, and their figures, are of earlier calls."
        )
    return text


def smoke() -> str:
    lines = log("smoke")
    text = [line for line in lines if line.startswith("FAIL")] + lines[-1:]
    return "\n".join(f"- {line[:250]}" for line in text)


def tests() -> str:
    text = []
    for name in ("tests_model", "tests_operators"):
        lines = log(name)
        bad = [line for line in lines if line.startswith(("FAILED", "ERROR", "E   "))][:30]
        ends = [line for line in lines if re.search(r"\d+ (passed|failed|error|deselected)|tests? collected", line)][
            -1:
        ]
        text += [f"- {name}: {line.strip('= ')[:250]}" for line in (*bad, *ends)]
    return "\n".join(text)


def demo() -> str:
    rows = []
    for name, path in written("evaluation_*.json").items():
        found = json.loads(path.read_text())
        rows.append([name.removeprefix("demo_"), *(f"{found[kind]['AP']:.3f}" for kind in ("bbox", "segm"))])
    return table(["demo", "box AP", "mask AP"], rows)


def network(mode: str, gathers: bool = False) -> str:
    """Make the table of the steps that gathered RoIAlign's gradients, or of all others."""
    from components.reports import readme

    records = [
        {"name": name, "benchmark": report}
        for name, report in benchmarks().items()
        if name.startswith("gather_") == gathers
    ]
    return readme.table("training" if mode == "train" else "inference", records)


def torchvision() -> str:
    rows = [
        [
            f"{case['mode']} {case['dtype']} ×{case['batch']}",
            "channels-last" if case["model"].endswith("NHWC") else "NCHW",
            f"{case['images_per_s']:.4g}",
            f"{1e3 * case['step_s']['median']:.2f} ms",
        ]
        for report in benchmarks().values()
        for case in (report.get("steps") or {}).get("cases", [])
        if case["model"] != "ours"
    ]  # fmt: skip
    return table(["torchvision's", "memory format", "images/s", "median step"], rows)


def phases() -> str:
    rows = []
    for report in (found["phases"] for found in benchmarks().values() if "phases" in found):
        rows += [
            [name, f"{1e3 * seconds:.2f}", f"{100 * seconds / report['step_s']:.0f}"]
            for name, seconds in report["phases"].items()
        ]
        rows.append(["step", f"{1e3 * report['step_s']:.2f}", "100"])
        rows.append(["floor", f"{1e3 * report['floor_s']:.2f}", f"{100 * report['floor_s'] / report['step_s']:.0f}"])
    return table(["phase", "ms", "%"], rows)


def profile() -> str:
    path = OUT / "profile.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def operators() -> str:
    path = OUT / "operators.jsonl"
    rows = []
    for one in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
        ours, reference, rival = (1e3 * one[name] for name in ("compiled", "reference", "rival"))
        rows.append(
            [
                one["case"],
                f"{ours:.3f} ms",
                f"{reference:.3f} ms",
                f"{one['rival_name']} {rival:.3f} ms",
                f"{rival / ours:.1f}×",
            ]
        )
    return table(["operator", "compiled", "plain torch", "rival", ""], rows)


def sanitizers() -> str:
    words = re.compile(r"ERROR SUMMARY|RACECHECK SUMMARY|Invalid|hazard|differs|Error:")
    messages = [(name, line) for name in ("memcheck", "racecheck") for line in log(name) if words.search(line)]
    return "\n".join(f"- {name}: {line.strip('= ')[:200]}" for name, line in messages[-25:])


PARTS: dict[str, Callable[[], str]] = {
    "Machine": machine, "Steps": steps, "Smoke": smoke, "Tests": tests, "Demo": demo,
    "Training": lambda: network("train"),
    "Training, RoIAlign's gradient gathered": lambda: network("train", gathers=True),
    "Inference": lambda: network("inference"), "torchvision's network": torchvision, "Phases": phases,
    "Kernels of a step": profile, "Operators": operators, "Sanitizers": sanitizers,
}  # fmt: skip


def main() -> None:
    """Print each part below its title; omit empty parts."""
    if "--dry" in sys.argv:
        print("**A dry run, tiny sizes on a CPU: no figure below is a result.**\n")
    for title, make in PARTS.items():
        try:
            text = make()
        except Exception as error:  # the others are reported all the same
            text = f"Cannot be read: {type(error).__name__}: {error}"
        if text:
            print(f"### {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
