"""The report's chapter on thresholds and faults, of runs whose analysis.json is small enough to read."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from components.reports.analysis import analysis as chapter_of
from components.reports.analysis import label_error_caption
from components.reports.pictures import confusion_matrix, label_errors
from components.runs.files import read_run

WRONG = {
    "kind": "wrong_label", "image_id": 5, "annotation_id": 71, "class": "cat", "annotated_class": "dog", "score": 0.8,
}  # fmt: skip
MISSING = {
    "kind": "missing_annotation", "image_id": 6, "annotation_id": None, "class": "cat", "annotated_class": None,
    "score": 0.75,
}  # fmt: skip
EVALUATION = {"bbox": {"AP": 0.5}, "images": 2, "detections": 3, "checkpoint": "c.pt", "data_hash": "da"}
FLIPPED = {"scales": [1.0], "flip": True, "soft_nms": "off", "soft_nms_sigma": 0.5}


def write_run(run_dir: Path, **changes: Any) -> Path:
    point = {"threshold": 0.65, "precision": 0.75, "recall": 0.6, "f1": 2 / 3}
    curve = {"precision": [0.5, 0.75, None], "recall": [0.9, 0.6, 0.0], "f1": [0.6, 2 / 3, 0.0]}
    crowded = {"slice": "1 to 2", "images": 2, "objects": 3, "AP": 0.4, "AP50": 0.5, "precision": None, "recall": 0.25}
    content = {
        "checkpoint": "c.pt",
        "data_hash": "da",
        "iou_type": "bbox",
        "best": {"all": point, "per_class": {"cat": point, "dog": dict.fromkeys(point)}},
        "curves": {"confidence": [0.0, 0.5, 1.0], "all": curve},
        "confusion": {"classes": ["cat", "dog"], "matrix": [[3, 1, 0], [6, 2, 0], [0, 4, 0]]},
        "calibration": {"ece": 0.125, "bins": [{"detections": 0, "confidence": None, "hits": None},
                                               {"detections": 3, "confidence": 0.7, "hits": 0.5}]},
        "slices": {"size": [{"slice": "small", "objects": 3, "AP": None, "AR": 0.3}], "crowding": [crowded]},
        "label_errors": {"count": 7, "likeliest": [WRONG, MISSING]},
    }  # fmt: skip
    run_dir.mkdir()
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    (run_dir / "analysis.json").write_text(json.dumps(content | changes))
    return run_dir


def test_tables_say_what_the_file_says(tmp_path: Path):
    chapter = chapter_of([read_run(write_run(tmp_path / "one"))], [])
    text = "\n".join(table.markdown for table in chapter.tables)
    for row in (
        "| one | 0.650 | 0.667 | 0.750 | 0.600 | 0.125 | 7 |",
        "| cat | 0.650 | 0.667 | 0.750 | 0.600 |",
        "| dog | – | – | – | – |",
        "| dog | cat | 6 | 0.750 |\n| cat | dog | 1 | 0.250 |",  # without false alarms
        "| small | 3 | – | 0.300 |",
        "| 1 to 2 | 2 | 3 | 0.400 | 0.500 | – | 0.250 |",
    ):
        assert row in text
    assert [chart.title for chart in chapter.charts][-1] == "calibration"
    assert "one ends at 0.75" in chapter.charts[1].svg  # where the precision is known last


def test_runs_have_tables_each_and_charts_together(tmp_path: Path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("one", "other")]
    chapter = chapter_of(runs, [])
    assert [row[0] for row in chapter.tables[0].rows] == ["one", "other"]
    assert {table.caption.partition(":")[0] for table in chapter.tables[1:]} == {"one", "other"}
    assert all(chart.svg.count("<polyline") == 2 for chart in chapter.charts)


def test_the_analysis_of_another_evaluation_is_left_out(tmp_path: Path):
    changes: list[dict[str, Any]] = [
        {"checkpoint": "d.pt"},
        {"data_hash": "db"},
        {"test_time": FLIPPED},
        {"best": None},
    ]
    for number, change in enumerate(changes):
        name = str(number)
        chapter = chapter_of([read_run(write_run(tmp_path / name, **change))], [])
        assert (list(chapter.tables), list(chapter.charts)) == ([], [])
        assert "`maskrcnn evaluate` writes it" in chapter.notes[0]
    run = write_run(tmp_path / "same", test_time=FLIPPED)
    (run / "evaluation.json").write_text(json.dumps(EVALUATION | {"test_time": FLIPPED}))
    assert chapter_of([read_run(run)], []).tables


def test_pictures_are_those_that_evaluate_drew(tmp_path: Path):
    run_dir = write_run(tmp_path / "one")
    assert confusion_matrix(run_dir, 10_000) == label_errors(run_dir, [WRONG], count=1, budget_bytes=10_000) == []
    folder = run_dir / "plots" / "label_errors"
    folder.mkdir(parents=True)
    for path in (folder / "001_5.jpg", folder / "002_6.jpg", run_dir / "plots" / "confusion_matrix.png"):
        Image.new("RGB", (90, 60)).save(path)
    pictures = label_errors(run_dir, [WRONG, MISSING], count=2, budget_bytes=10_000)
    assert [one.caption for one in pictures] == [
        "wrong label? cat 0.80, annotated as dog (71), image 5",
        "missing annotation? cat 0.75, image 6",
    ]
    assert [one.caption for one in pictures] == [label_error_caption(one) for one in (WRONG, MISSING)]
    assert len(label_errors(run_dir, [WRONG, MISSING], count=1, budget_bytes=10_000)) == 1
    assert confusion_matrix(run_dir, 10_000)[0].width == 90
