"""The evaluate stage from a checkpoint to its files, on images like COCO's with an untrained network."""

import contextlib
import io
import json
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from components import evaluate, train
from components.config import Config
from components.evaluation.analysis import analyse
from components.evaluation.analysis_plots import write_label_errors
from components.evaluation.detect import Results
from components.params import save_config
from components.runs.thresholds import read_analysis
from model.config import EvaluateConfig, TrainConfig
from model.data.index import CocoIndex
from model.errors import UserError
from model.scoring.coco import load_ground_truth
from model.scoring.names import SCORE_NAMES


def update(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_report_has_the_promised_keys(evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]) -> None:
    result, report = evaluated
    assert list(report) == [
        "bbox", "segm", "per_class", "max_detections", "test_time", "images", "detections", "checkpoint", "data_hash",
        "commit", "train_data_hash", "max_iters",
    ]  # fmt: skip
    assert list(report["bbox"]) == list(report["segm"]) == list(SCORE_NAMES)
    shown = {kind: {name: report[kind][name] for name in ("AP", "AP50", "AP75")} for kind in ("bbox", "segm")}
    assert json.loads((result.run_dir / "scores.json").read_text()) == shown
    assert report["images"] == 4
    assert report["checkpoint"] == result.checkpoint == "checkpoints/step_0000007.pt"


def test_an_analysis_and_its_plots_lie_beside_the_scores(
    evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]],
) -> None:
    result, report = evaluated
    analysis = read_analysis(result.run_dir)
    assert {key: analysis[key] for key in ("checkpoint", "data_hash", "iou_type")} == {
        "checkpoint": report["checkpoint"], "data_hash": report["data_hash"], "iou_type": "segm",
    }  # fmt: skip
    assert analysis["best"]["per_class"].keys() == report["per_class"].keys()
    for name in ("confusion_matrix", "f1_curves", "reliability"):
        with Image.open(result.run_dir / "plots" / f"{name}.png") as plot:
            assert min(plot.size) > 400


def test_likely_label_errors_are_drawn_the_surest_first(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]], tmp_path: Path
) -> None:
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    ground_truth = load_ground_truth(index.ground_truth_path)
    image_ids = [int(image_id) for image_id in index.image_ids[:3]]
    common = {"category_id": index.category_ids[0], "bbox": [0.0, 0.0, 3.0, 3.0]}  # no object is so small
    found = [{"image_id": image_id, "score": 0.6 + 0.1 * k} | common for k, image_id in enumerate(image_ids)]
    results = Results(found, [], [], "box")
    analysis = analyse(ground_truth, results, 100)
    write_label_errors(analysis, tmp_path / "drawn", index, ground_truth, results, 2)
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == [f"001_{image_ids[2]}.jpg", f"002_{image_ids[1]}.jpg"]


def test_without_hotcoco_the_scores_are_there_and_a_warning_instead_of_the_analysis(
    trained_run: Config,
    evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    config = update(
        update(trained_run, "train", output_dir=tmp_path), "evaluate", backend="pycocotools", drawn_images=0
    )
    evaluate.run(config, checkpoint=str(trained_run.train.output_dir / evaluated[0].checkpoint))
    assert json.loads((tmp_path / "evaluation.json").read_text())["bbox"] == evaluated[1]["bbox"]
    assert "warning: no thresholds and no analysis, since hotcoco cannot be imported" in capsys.readouterr().out
    assert "best" not in read_analysis(tmp_path)
    assert not (tmp_path / "plots" / "f1_curves.png").exists()


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_scores_are_those_of_pycocotools_on_the_files_left_behind(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]], task: str
) -> None:
    run_dir, report = trained_run.train.output_dir, evaluated[1]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(trained_run.data.prepared_dir / "val.json"))
        oracle = COCOeval(coco, coco.loadRes(str(run_dir / "inference" / f"{task}.json")), task)
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    assert report["detections"] > 0
    assert [report[task][name] for name in SCORE_NAMES] == [None if v < 0 else v for v in oracle.stats]


def test_absent_backend_is_reported_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an import of an absent package meets
    config = Config(
        train=TrainConfig(output_dir=tmp_path / "without_checkpoint"), evaluate=EvaluateConfig(backend="hotcoco")
    )
    for stage in (evaluate, train):
        with pytest.raises(UserError, match="pip install hotcoco"):
            stage.run(config)


def test_skip_eval_writes_predictions_and_no_score(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint = str(trained_run.train.output_dir / evaluated[0].checkpoint)
    params = tmp_path / "params.yaml"
    save_config(update(trained_run, "train", output_dir=tmp_path), params)
    overrides = ["evaluate.skip_eval=true", "evaluate.drawn_images=0"]
    evaluate.main(["--params", str(params), "--checkpoint", checkpoint, *overrides])
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["bbox"] is None
    assert json.loads((tmp_path / "scores.json").read_text()) == {}
    assert report["detections"] == len(json.loads((tmp_path / "inference" / "bbox.json").read_text())) > 0
    assert not (tmp_path / "inference" / "coco_results.pth").exists()
    assert list((tmp_path / "plots" / "predictions").iterdir()) == []
    assert read_analysis(tmp_path).keys() == {"checkpoint", "data_hash", "test_time"}


def test_scores_reach_mlflow(
    trained_run: Config,
    evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    config = update(trained_run, "tracking", enabled=True, uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = update(config, "train", output_dir=tmp_path / "run")
    evaluate.run(config, checkpoint=str(trained_run.train.output_dir / evaluated[0].checkpoint))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics").fetchall())
        steps = {step for (step,) in database.execute("select step from latest_metrics")}
    assert metrics["ap/bbox"] == evaluated[1]["bbox"]["AP"]
    assert metrics["ar100/segm"] == evaluated[1]["segm"]["AR100"]
    analysis = read_analysis(evaluated[0].run_dir)
    assert metrics["ece/segm"] == analysis["calibration"]["ece"]
    assert metrics["f1/segm"] == analysis["best"]["all"]["f1"]
    sent = {path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()}
    assert {"analysis.json", "confusion_matrix.png", "f1_curves.png", "reliability.png"} <= sent
    assert steps == {7}
    assert len(list((tmp_path / "mlartifacts").rglob("predictions/*.jpg"))) == 2


def test_run_without_a_checkpoint_says_how_to_get_one(trained_run: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="maskrcnn train"):
        evaluate.run(update(trained_run, "train", output_dir=tmp_path))
    with pytest.raises(UserError, match="every_epoch"):
        evaluate.run(trained_run, checkpoint="best")


def test_data_of_other_classes_is_refused(trained_run: Config, tmp_path: Path) -> None:
    source = trained_run.data.prepared_dir
    for path in source.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    meta = json.loads((tmp_path / "val" / "meta.json").read_text())
    meta["category_ids"] = [1000 + k for k in range(len(meta["category_ids"]))]
    (tmp_path / "val" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="must hold the 80 classes"):
        evaluate.run(update(trained_run, "data", prepared_dir=tmp_path))


def test_misspelt_override_ends_with_an_error_line(
    trained_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(trained_run, tmp_path / "params.yaml")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--params", str(tmp_path / "params.yaml"), "evaluate.splt=val"])
    assert end.value.code == 2
    assert "evaluate.split" in capsys.readouterr().err
