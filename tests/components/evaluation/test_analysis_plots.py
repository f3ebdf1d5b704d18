"""Plots of an analysis, with names of classes as people write them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from components.evaluation.analysis import best_point, curves
from components.evaluation.analysis_plots import plot_confusion, plot_curves, plot_reliability


def test_names_of_classes_are_shown_as_they_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No formulas, no gaps of other scripts without a warning that says so, no name that takes all the room."""
    names = [r"$\nope$", "Schraube ä", "猫", "x" * 200]
    detections = np.array([0.9, 0.5, 0.3]), np.array([True, False, True]), 3
    found = curves(*detections)
    analysis = {
        "iou": 0.5,
        "best": {"all": best_point(*detections)},
        "confusion": {"classes": names, "matrix": np.arange(25).reshape(5, 5).tolist()},
        "curves": {"confidence": np.linspace(0, 1, 101), "all": found, "per_class": dict.fromkeys(names, found)},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, of missing glyphs, or if no room is left
        plot_confusion(analysis, tmp_path / "confusion.png")
        plot_curves(analysis, tmp_path / "curves.png")
    for name in ("confusion.png", "curves.png"):
        with Image.open(tmp_path / name) as plot:
            assert plot.width > 500
    assert capsys.readouterr().err.count("no font here has") <= 1


@pytest.mark.parametrize(("ece", "shown"), [(0.1234, "0.123"), (None, "none")])
def test_the_calibration_error_is_shown_above_its_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ece: float | None, shown: str
) -> None:
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: titles.append(self.axes[0].get_title()))
    one = {"from": 0.0, "to": 0.5, "confidence": 0.3, "hits": 0.5, "detections": 4}
    bins = [one, {**one, "from": 0.5, "to": 1.0, "hits": None, "detections": 0}]
    plot_reliability({"iou": 0.5, "calibration": {"bins": bins, "ece": ece}}, tmp_path / "reliability.png")
    assert titles == [f"expected calibration error: {shown}"]
