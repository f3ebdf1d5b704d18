"""Best thresholds of a checkpoint: where they are, and what is said where there are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.runs.result import ResultError
from components.runs.thresholds import Thresholds, best_thresholds, find_thresholds


def point(threshold: float | None) -> dict[str, float | None]:
    return {"threshold": threshold, "precision": None, "recall": None, "f1": None}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of a run with an analysis.json."""
    path = tmp_path / "run" / "checkpoints" / "step_0000008.pt"
    path.parent.mkdir(parents=True)
    path.touch()
    write(path, {"all": point(0.4), "per_class": {"cat": point(0.3), "dog": point(None)}})
    return path


def write(checkpoint: Path, best: dict[str, Any] | None, name: str = "checkpoints/step_0000008.pt") -> None:
    content: dict[str, Any] = {"checkpoint": name, "data_hash": "da"} | ({} if best is None else {"best": best})
    (checkpoint.parents[1] / "analysis.json").write_text(json.dumps(content))


def test_a_class_without_a_threshold_of_its_own_has_that_of_all(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    expected = Thresholds(0.4, {"cat": 0.3, "dog": 0.4})
    assert best_thresholds(checkpoint) == find_thresholds(checkpoint, checkpoint.parents[1]) == expected
    monkeypatch.chdir(checkpoint.parent)
    assert best_thresholds(Path(checkpoint.name)) == expected


@pytest.mark.parametrize(
    ("test_time", "told"),
    [
        ({}, ""),
        ({"scales": [1.0], "flip": False, "soft_nms": "off", "soft_nms_sigma": 0.5}, ""),
        ({"soft_nms": "off", "soft_nms_sigma": 0.7}, ""),
        ({"flip": True, "soft_nms": "off"}, "with evaluate.flip=true"),
        ({"scales": [1.0, 1.5], "soft_nms": "linear"}, "with evaluate.scales=[1.0, 1.5], evaluate.soft_nms=linear"),
        ({"soft_nms": "gaussian", "soft_nms_sigma": 0.7}, "evaluate.soft_nms=gaussian, evaluate.soft_nms_sigma=0.7"),
    ],
)
def test_thresholds_of_scores_that_predict_does_not_make_are_told(
    checkpoint: Path, test_time: dict[str, Any], told: str
):
    path = checkpoint.parents[1] / "analysis.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_time": test_time}))
    best = best_thresholds(checkpoint)
    assert best.test_time == test_time
    assert told in best.caution()
    assert bool(best.caution()) == bool(told)
    assert "on whole images, not in tiles; predict makes other scores" in best.caution(in_tiles=True)


def test_a_checkpoint_may_be_evaluated_into_another_folder(checkpoint: Path, tmp_path: Path):
    other = tmp_path / "other" / "checkpoints" / "x.pt"
    write_to = other.parents[1]
    write_to.mkdir()
    write(other, {"all": point(0.6), "per_class": {}}, str(checkpoint))
    assert best_thresholds(checkpoint, write_to) == Thresholds(0.6, {})


def test_thresholds_of_another_checkpoint_are_refused(checkpoint: Path):
    other = checkpoint.with_name("step_0000004.pt")
    with pytest.raises(ResultError, match=r"must be of .*0004.pt, got .*0008.pt; run `maskrcnn evaluate .*0004.pt`"):
        best_thresholds(other)
    assert find_thresholds(other, checkpoint.parents[1]) is None


@pytest.mark.parametrize("best", [None, {"all": point(None), "per_class": {}}])
def test_an_evaluation_without_thresholds_is_an_error(checkpoint: Path, best: dict[str, Any] | None):
    write(checkpoint, best)
    with pytest.raises(ResultError, match="must have a best threshold, got none"):
        best_thresholds(checkpoint)
    assert find_thresholds(checkpoint, checkpoint.parents[1]) is None


def test_a_run_that_was_not_evaluated_is_an_error_that_says_how(checkpoint: Path):
    (checkpoint.parents[1] / "analysis.json").unlink()
    with pytest.raises(ResultError, match=r"analysis.json: .*not there; run `maskrcnn evaluate train.output_dir="):
        best_thresholds(checkpoint)
    assert find_thresholds(checkpoint, checkpoint.parents[1]) is None


def test_a_damaged_file_is_an_error(checkpoint: Path):
    for content, reason in (("{", "not JSON"), ('{"data_hash": "da"}', "checkpoint is missing")):
        (checkpoint.parents[1] / "analysis.json").write_text(content)
        with pytest.raises(ResultError, match=f"analysis.json: {reason}.*`maskrcnn evaluate` writes it anew"):
            best_thresholds(checkpoint)
