"""The end of the demo."""

import json
from pathlib import Path

import pytest

from pipelines.summary import main

SCORES = {"AP": 0.5126, "AP50": 0.8, "AP75": 0.6, "APs": None, "APm": 0.4, "APl": 0.7}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text("train:\n  output_dir: runs/x\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_gives_both_aps_and_where_to_look(repository: Path, capsys: pytest.CaptureFixture[str]):
    evaluation = {"bbox": SCORES, "segm": {**SCORES, "AP": 0.25}, "images": 100, "checkpoint": "step_10.pt"}
    (repository / "runs" / "x").mkdir(parents=True)
    (repository / "runs" / "x" / "evaluation.json").write_text(json.dumps(evaluation))
    main()
    out = capsys.readouterr().out
    box, mask = (next(line for line in out.splitlines() if name in line) for name in ("box", "mask"))
    assert "0.513" in box
    assert "–" in box
    assert "0.250" in mask
    assert "runs/x/predictions" in out
    assert "make ui" in out


def test_without_an_evaluation_the_way_out_is_named(repository: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "maskrcnn evaluate" in capsys.readouterr().err
