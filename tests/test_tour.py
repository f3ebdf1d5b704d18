"""The notebook docs/tour.ipynb runs from its first cell to its last, and what it keeps is what running shows."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from components import download, prepare, train
from components.runs.recipes import load_recipe
from components.tracking.tracker import open_tracker

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "docs" / "tour.ipynb"
TINY = [
    "data.shapes.train_images=6", "data.shapes.val_images=3", "data.workers=0", "train.max_iters=3",
    "train.batch_size=2", "train.warmup_iters=1",
    "train.lr_steps=[2]", "train.device=cpu", "evaluate.batch_size=3", "evaluate.drawn_images=1",
    "tracking.enabled=false",
    "predict.score_threshold=0", "model.score_threshold=0",
]  # fmt: skip


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(output: Any) -> str:
    """What is printed, or shown as text."""
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", ""))


def shown_by(cell: Any) -> dict[str, set[str]]:
    """The lines of a cell's outputs by kind, without numbers, names of classes, spaces and styles; they
    are of the run.
    """
    found: dict[str, set[str]] = {}
    for output in cell["outputs"]:
        kind = output.get("name") or " ".join(sorted(output["data"]))
        text = re.sub(r"\x1b\[\d*m", "", text_of(output))
        text = re.sub(r"\b(circle|square|triangle|star|bars)\b", "CLASS", text)
        text = re.sub(r"[−-]?\d[\d.]*(e-\d+)?|–", "0", text)
        found.setdefault(kind, set()).update(re.sub(r"\s+|[┏┓┳━]+", " ", line).strip() for line in text.splitlines())
    return found


@pytest.fixture(scope="module")
def stored() -> Any:
    return json.loads(NOTEBOOK.read_text())


def test_what_is_kept_is_small_and_of_a_whole_training(stored: Any):
    """In pictures, too; nothing names a place on the machine that ran it."""
    assert NOTEBOOK.stat().st_size < 200_000
    code = code_of(stored)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(cell["outputs"] for cell in code)
    texts = [text_of(output) for cell in code for output in cell["outputs"]]
    assert [text for text in texts if re.search(r"(?<![\w.<:/])/\w", text)] == []
    assert any("step=850" in text for text in texts)
    (scores,) = (text for text in texts if "│ AP50" in text)
    assert all(float(score) > 0.5 for score in re.findall(r"│ AP +│ (\S+) │ (\S+) │", scores)[0])


def test_the_tour_runs_to_its_end_and_shows_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any):
    """As its second run shows it, with few steps on few images: numbers are for the tests of the stages."""
    for name in ("nbformat", "nbclient"):
        pytest.importorskip(name, reason=f"needs {name}, of the extra `dev`")
    spec = importlib.util.spec_from_file_location("run_tour", REPOSITORY / "docs" / "run_tour.py")
    assert spec is not None
    assert spec.loader is not None
    run_tour = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_tour)
    monkeypatch.chdir(tmp_path)
    config = load_recipe("shapes_demo", ["train.output_dir=runs/tour", *TINY])
    download.run(config)
    prepare.run(config)
    assert train.run(config, skip_test=True).step == 3
    with open_tracker(config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
        tracker.log_metrics({"throughput/train_images_per_s": 3.0}, step=0)  # as a benchmark does
    notebook = run_tour.run(tmp_path, shlex.join(TINY))
    for cell, kept in zip(code_of(notebook), code_of(stored), strict=True):
        assert shown_by(cell) == shown_by(kept), cell["id"]
        assert cell["execution_count"] == kept["execution_count"]
    pictures = [cell["id"] for cell in code_of(stored) if re.search("image/(png|jpeg)", " ".join(shown_by(cell)))]
    assert len(pictures) == 4  # data, losses, an evaluated image, the user's own
    predictions = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert Path(predictions["images"][0]["file"]).name == "my_picture.png"
    assert len(predictions["images"][0]["detections"]) > 0
    assert (tmp_path / "runs" / "tour" / "report.html").stat().st_size > 50_000
