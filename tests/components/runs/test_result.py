"""Finished runs as their folders describe them."""

import json
from pathlib import Path

import pytest

from components.runs.result import ResultError, read_object, read_result, require_final


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Early stop was called evaluate.min_bbox_ap; a run that it ended may have ended before train.max_iters."""
    (tmp_path / "config.yaml").write_text("train:\n  seed: 3\nevaluate:\n  every_epoch: true\n  min_bbox_ap: 0.377\n")
    scores = {"bbox": {"AP": 0.378}, "checkpoint": "checkpoints/step_0000008.pt", "data_hash": "da"}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    result = read_result(tmp_path)
    assert (result.seed, result.data) == (3, ("da", None))
    assert result.config.evaluate.target_bbox_ap == 0.377
    require_final(result)


def test_a_damaged_file_is_told_with_the_command_that_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for content in (b"", b'{"bbox"', b"[]", b"null", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ResultError, match=r"evaluation\.json: .*; `maskrcnn evaluate` writes it anew"):
            read_object(path, "`maskrcnn evaluate`")
