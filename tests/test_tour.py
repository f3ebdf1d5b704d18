"""The notebook docs/tour.ipynb runs from its first cell to its last, and is kept without its outputs."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "docs" / "tour.ipynb"
TINY = [
    "data.shapes.train_images=6", "data.shapes.val_images=3", "data.workers=0", "train.max_iters=3", "train.batch_size=2",
    "train.lr_steps=[2]", "train.device=cpu", "evaluate.batch_size=3", "evaluate.drawn_images=1", "tracking.enabled=false",
    "predict.score_threshold=0", "model.score_threshold=0",
]  # fmt: skip


def test_outputs_are_not_committed():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    kept = [
        cell["id"] for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])
    ]
    assert kept == []


def text_of(cell: Any) -> str:
    """What a cell of code printed, and what its last line gave."""
    return "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell["outputs"])


def test_the_tour_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In few steps on few images: that it is right is for the tests of the stages, here it is that the path leads through."""
    nbformat, nbclient = (
        pytest.importorskip(name, reason=f"needs {name}, of the extra `dev`") for name in ("nbformat", "nbclient")
    )
    monkeypatch.setenv("TOUR_DIR", str(tmp_path))
    monkeypatch.setenv("TOUR_OVERRIDES", shlex.join(TINY))
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    pictures = [
        cell["id"]
        for cell in code
        if any("image/png" in out.get("data", {}) or "image/jpeg" in out.get("data", {}) for out in cell["outputs"])
    ]
    assert len(pictures) == 4  # data, losses, an evaluated image, the user's own
    assert "step=3" in "".join(text_of(cell) for cell in code)
    predictions = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert Path(predictions["images"][0]["file"]).name == "my_picture.png"
    assert len(predictions["images"][0]["detections"]) > 0
    assert (tmp_path / "runs" / "tour" / "report.html").stat().st_size > 50_000
