"""The evaluate stage from a checkpoint to its files, on images like COCO's with an untrained network."""

import contextlib
import csv
import io
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import cuda_ops
from components import evaluate, train
from components.config import Config
from components.evaluation.detect import Results, detect
from components.evaluation.files import evaluation_report
from components.evaluation.score import evaluate_model
from components.params import save_config
from components.runs.trained import load_trained
from model.config import EvaluateConfig, TrainConfig
from model.data.index import CocoIndex
from model.errors import UserError
from model.scoring.coco import SCORE_NAMES, evaluate_results, load_ground_truth


def update(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


@pytest.fixture(scope="module")
def evaluated(trained_run: Config) -> tuple[evaluate.EvaluateResult, dict[str, Any]]:
    result = evaluate.run(trained_run)
    return result, json.loads((result.run_dir / "evaluation.json").read_text())


def test_report_has_the_promised_keys(evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]) -> None:
    result, report = evaluated
    assert list(report) == [
        "bbox", "segm", "per_class", "images", "detections", "checkpoint", "data_hash", "commit", "train_data_hash",
    ]  # fmt: skip
    assert list(report["bbox"]) == list(report["segm"]) == list(SCORE_NAMES)
    assert report["images"] == 4
    assert report["checkpoint"] == result.checkpoint == "checkpoints/step_0000007.pt"


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


def test_either_backend_gives_the_same_report_to_the_last_byte(trained_run: Config) -> None:
    """On ground truth like COCO's, crowds too; the results are moved boxes and shrunk masks of it."""
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    coco = load_ground_truth(index.ground_truth_path)
    results = Results([], [], [])
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        common = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        common["score"] = 1 / (1 + annotation["id"] % 7)
        rle = coco.annToRLE(annotation)
        mask = coco_mask.decode(rle)
        mask[::3] = 0
        shrunk = coco_mask.encode(mask)
        results.bbox.append(common | {"bbox": [x + 0.1 * width, y, 0.9 * width, height]})
        results.segm.append(common | {"segmentation": {"size": rle["size"], "counts": shrunk["counts"].decode()}})
    texts = []
    for backend in ("pycocotools", "hotcoco"):
        evaluation = evaluate_results(index.ground_truth_path, results.bbox, results.segm, backend=backend)
        assert 0.1 < (evaluation.segm["AP"] or 0) < (evaluation.bbox["AP"] or 0) < 1
        texts.append(json.dumps(evaluation_report(evaluation, results, index, "any")))
    assert texts[0] == texts[1]


def test_absent_backend_is_told_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an import of an absent package meets
    save_config(Config(train=TrainConfig(output_dir=tmp_path / "without_checkpoint")), tmp_path / "params.yaml")
    for stage in (evaluate, train):
        with pytest.raises(SystemExit) as end:
            stage.main(["--params", str(tmp_path / "params.yaml"), "evaluate.backend=hotcoco"])
        assert end.value.code == 2
        assert "pip install hotcoco" in capsys.readouterr().err


def test_prediction_tensors_agree_with_the_results(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    folder = trained_run.train.output_dir / "inference"
    tensors = torch.load(folder / "predictions.pth", weights_only=True)
    results, masks_found = (json.loads((folder / f"{name}.json").read_text()) for name in ("bbox", "segm"))
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    assert {image["image_id"] for image in tensors} == set(index.image_ids.tolist())
    for image in tensors:
        own = [result for result in results if result["image_id"] == image["image_id"]]
        x, y, width, height = torch.tensor([result["bbox"] for result in own]).T
        torch.testing.assert_close(image["boxes"], torch.stack([x, y, x + width, y + height], 1))
        torch.testing.assert_close(image["scores"], torch.tensor([result["score"] for result in own]))
        assert [result["category_id"] for result in own] == [
            index.category_ids[k - 1] for k in image["labels"].tolist()
        ]
        assert image["mask_probs"].shape == (len(own), 28, 28)
        codes = cuda_ops.encode_masks(
            image["mask_probs"], image["boxes"], image["size"], conventions=trained_run.model.conventions
        )
        masks = [result["segmentation"]["counts"] for result in masks_found if result["image_id"] == image["image_id"]]
        assert masks == [code["counts"].decode() for code in codes]


def test_saved_scores_equal_the_report(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    scores = torch.load(trained_run.train.output_dir / "inference" / "coco_results.pth", weights_only=True)
    assert scores["bbox"] == evaluated[1]["bbox"]
    assert scores["precision"]["segm"].shape == (10, 101)


def test_plots_show_curves_and_some_images(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    folder = trained_run.train.output_dir / "plots"
    with Image.open(folder / "precision_recall.png") as image:
        assert image.width > 500
    with (folder / "precision_recall.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 101
    assert list(rows[0]) == ["recall", "bbox_50", "bbox_75", "bbox_mean", "segm_50", "segm_75", "segm_mean"]
    assert len(list((folder / "predictions").glob("*.jpg"))) == 2


def test_model_in_training_scores_the_same_and_stays_in_training(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    model = load_trained(trained_run, "last").loaded.model.train()
    evaluation = evaluate_model(model, trained_run)
    assert evaluation.segm == evaluated[1]["segm"]
    assert model.training


def test_batch_size_changes_no_result(trained_run: Config) -> None:
    model = load_trained(trained_run, "last").loaded.model
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    one, four = (detect(model, index, trained_run.data, EvaluateConfig(batch_size=size)) for size in (1, 4))
    assert len(one.bbox) == len(four.bbox) > 0
    for a, b in zip(one.segm, four.segm, strict=True):
        assert a["image_id"] == b["image_id"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        areas = [int(coco_mask.area(result["segmentation"])) for result in (a, b)]
        assert areas[0] == pytest.approx(areas[1], rel=0.01, abs=2)


def test_skip_eval_writes_predictions_and_no_score(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint = str(trained_run.train.output_dir / evaluated[0].checkpoint)
    params = tmp_path / "params.yaml"
    save_config(update(trained_run, "train", output_dir=tmp_path), params)
    evaluate.main(["--params", str(params), "--skip-eval", "--checkpoint", checkpoint, "evaluate.drawn_images=0"])
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["bbox"] is None
    assert report["detections"] == len(json.loads((tmp_path / "inference" / "bbox.json").read_text())) > 0
    assert not (tmp_path / "inference" / "coco_results.pth").exists()
    assert list((tmp_path / "plots" / "predictions").iterdir()) == []


def test_scores_reach_mlflow(
    trained_run: Config,
    evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = update(trained_run, "tracking", enabled=True, uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = update(config, "train", output_dir=tmp_path / "run")
    evaluate.run(config, checkpoint=str(trained_run.train.output_dir / evaluated[0].checkpoint))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics").fetchall())
        steps = {step for (step,) in database.execute("select step from latest_metrics")}
    assert metrics["ap/bbox"] == evaluated[1]["bbox"]["AP"]
    assert metrics["ar100/segm"] == evaluated[1]["segm"]["AR100"]
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


def test_several_scales_and_sides_reach_the_results(trained_run: Config) -> None:
    """Each image is found once, in pixels of its file, whatever the scales and processes' batches."""
    model = load_trained(trained_run, "last").loaded.model
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    options = {"scales": (1.0, 0.7, 1.5), "flip": True, "soft_nms": "gaussian"}
    one, four = (
        detect(model, index, trained_run.data, EvaluateConfig(batch_size=size, **options), keep_tensors=True)
        for size in (1, 4)
    )
    assert {result["image_id"] for result in one.bbox} == set(index.image_ids.tolist())
    assert len(one.bbox) == len(four.bbox) == len(one.segm)
    scores = [[result["score"] for result in results.bbox] for results in (one, four)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for image in one.tensors:
        height, width = image["size"]
        assert (image["boxes"] <= torch.tensor([width, height, width, height]) + 1e-2).all()
