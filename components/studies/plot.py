"""Plot of a stability study."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from components.studies.tables import iou_types
from model.scoring.names import TITLES


def plot_stability(report: dict[str, Any], path: Path) -> None:
    """Plot a PNG with panels for boxes and masks: AP per seed as dots, the mean as a line, its interval as a band."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    shown, positions = iou_types(report), range(len(report["seeds"]))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]  # own scales, since deviations are small
    for iou_type, panel, color in zip(shown, panels, ("tab:blue", "tab:orange"), strict=False):
        score = report[iou_type]["AP"]
        panel.plot(positions, score["values"], "o", color=color)
        panel.axhline(score["mean"], color=color, linewidth=1)
        if score["interval"]:
            panel.axhspan(*score["interval"], color=color, alpha=0.15, linewidth=0)
        panel.set_ylabel(f"{TITLES[iou_type]} AP")
        panel.grid(alpha=0.3)
    panels[0].set_title("dots: seeds; line: mean; band: its 95 % interval", fontsize="medium")
    panels[-1].set_xticks(list(positions), [str(seed) for seed in report["seeds"]])
    panels[-1].set_xlabel("seed")
    figure.savefig(path, dpi=120)
