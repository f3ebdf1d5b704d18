"""Faster R-CNN and proposals alone through the stages, on boxes without segmentations: no stage mentions masks."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kfp import dsl
from PIL import Image

from components import evaluate, predict, prepare, register, report, train
from components.config import Config
from components.kubeflow import artifacts
from components.tracking.scores import read_scored, shortfall
from model.data.index import CocoIndex
from model.errors import UserError
from model.scoring.names import RECALL_NAMES, SCORE_NAMES, TITLES
from pipelines.summary import summary_table

TASKS = ("box", "proposals")
by_task = pytest.mark.parametrize("task", TASKS)


def of_task(trained_run: Config, task: str, folder: Path) -> Config:
    """The data of trained_run without segmentations, and a network of this task that is trained for two steps."""
    files = {}
    for split in ("train", "val"):
        tree = json.loads((trained_run.data.raw_dir / f"annotations/instances_{split}2017.json").read_text())
        for entry in tree["annotations"]:
            entry["segmentation"] = []
        min(tree["annotations"], key=lambda entry: entry["image_id"])["area"] = -1
        files[f"{split}_annotations"] = str(folder / f"{split}.json")
        (folder / f"{split}.json").write_text(json.dumps(tree))
    data = trained_run.data.model_copy(update=files | {"prepared_dir": folder / "prepared"})
    model = trained_run.model.model_copy(update={"task": task})
    changes: dict[str, Any] = {"max_iters": 2, "batch_size": 2, "lr_batch_size": 2, "base_lr": 1e-3, "log_period": 1}
    settings = trained_run.train.model_copy(update={"output_dir": folder / "run", **changes})
    scored = trained_run.evaluate.model_copy(update={"every_epoch": True, "target_segm_ap": 0.9})
    return trained_run.model_copy(update={"data": data, "model": model, "train": settings, "evaluate": scored})


@pytest.fixture(scope="module")
def runs(trained_run: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    configs = {task: of_task(trained_run, task, tmp_path_factory.mktemp(task)) for task in TASKS}
    for config in configs.values():
        prepared = prepare.run(config).splits["train"]
        assert (prepared.dropped, prepared.repaired) == ({}, {"bad area": 1})
        result = train.run(config)
        assert result.step == 2
        assert not result.reached_target
    return configs


@by_task
def test_evaluation_holds_the_scores_of_the_task(runs: dict[str, Config], task: str) -> None:
    run_dir = runs[task].train.output_dir
    report = json.loads((run_dir / "evaluation.json").read_text())
    kind, names = {"box": ("bbox", SCORE_NAMES), "proposals": ("proposals", RECALL_NAMES)}[task]
    assert next(iter(report)) == kind
    assert list(report[kind]) == list(names)
    assert "segm" not in json.dumps(report)
    assert report["detections"] > 0
    assert report["per_class"] == {} if task == "proposals" else set(report["per_class"]["person"]) == {"bbox"}
    text = "".join(column.header for column in summary_table(report).columns)  # type: ignore[misc]
    assert ("AR1000" if task == "proposals" else "AP50") in text


@by_task
def test_files_and_metrics_are_those_of_the_task(runs: dict[str, Config], task: str) -> None:
    run_dir = runs[task].train.output_dir
    found = {path.name for path in (run_dir / "inference").iterdir()}
    assert (
        found
        == {
            "box": {"bbox.json", "predictions.pth", "coco_results.pth"},
            "proposals": {"proposals.json", "predictions.pth", "coco_results.pth"},
        }[task]
    )
    image = torch.load(run_dir / "inference" / "predictions.pth", weights_only=True)[0]
    assert set(image) == {"image_id", "size", "boxes", "scores", "labels"}
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    journal = json.dumps(entries)
    assert "loss/rpn_box_reg" in journal
    assert ("ap/bbox" in journal) == (task == "box")
    assert ("ar1000/proposals" in journal) == (task == "proposals")
    assert ("epoch/ap_bbox" if task == "box" else "epoch/ar1000_proposals") in journal
    assert "loss/mask" not in journal
    assert "/segm" not in journal
    with (run_dir / "metrics.csv").open() as file:
        assert not [column for column in csv.DictReader(file).fieldnames or [] if "mask" in column or "segm" in column]
    curves = run_dir / "plots" / "precision_recall.csv"
    assert curves.is_file() == (task == "box")
    analysis = json.loads((run_dir / "analysis.json").read_text())
    assert analysis.get("iou_type") == {"box": "bbox", "proposals": None}[task]
    for name in ("f1_curves.png", "confusion_matrix.png", "reliability.png", "label_errors"):
        assert (run_dir / "plots" / name).exists() == (task == "box")
    assert task == "proposals" or curves.read_text().startswith("recall,bbox_50,bbox_75,bbox_mean\n")
    assert len(list((run_dir / "plots" / "predictions").iterdir())) == 2
    with Image.open(run_dir / "plots" / "before_after.jpg") as grid:
        assert grid.width > 3 * 512
    seen = json.loads((run_dir / "before.json").read_text())["objects"]
    index = CocoIndex.open(runs[task].data.prepared_dir, "val")
    assert list(seen) == [str(image_id) for image_id in index.image_ids]  # of all four


@by_task
def test_predictions_have_boxes_alone(runs: dict[str, Config], task: str) -> None:
    config = runs[task]
    shown = config.predict.model_copy(update={"score_threshold": 0.0, "images": 1})
    result = predict.run(config.model_copy(update={"predict": shown}))
    detections = result.images[0]["detections"]
    assert detections
    assert set(detections[0]) == {"label", "category_id", "class", "score", "bbox"}
    assert task == "box" or {found["class"] for found in detections} == {"object"}


@by_task
def test_a_pipelines_step_has_the_scores_of_the_task(runs: dict[str, Config], task: str, tmp_path: Path) -> None:
    metrics, page = dsl.Metrics(uri=str(tmp_path / "metrics")), dsl.HTML(uri=str(tmp_path / "page"))
    artifacts.describe_evaluation(metrics, page, runs[task])
    kind, first = {"box": ("bbox", "ap"), "proposals": ("proposals", "ar100")}[task]
    report = json.loads((runs[task].train.output_dir / "evaluation.json").read_text())
    assert metrics.metadata[f"{first}/{kind}"] == report[kind][first.upper()]
    assert not [name for name in metrics.metadata if "segm" in name]
    assert f"<th>{TITLES[kind]}</th>" in (tmp_path / "page").read_text()


def test_masks_are_not_trained_on_boxes_alone(runs: dict[str, Config], trained_run: Config) -> None:
    with pytest.raises(UserError, match=r"model\.task=mask needs a mask .* run `maskrcnn prepare model\.task=mask`"):
        train.run(runs["box"].model_copy(update={"model": trained_run.model}))
    with pytest.raises(UserError, match="segmentation must be polygons or an RLE, got "):
        prepare.run(runs["box"].model_copy(update={"model": trained_run.model}))


@by_task
def test_a_report_is_made_of_boxes_alone(runs: dict[str, Config], task: str) -> None:
    run_dir = runs[task].train.output_dir
    page = report.run([run_dir], output=run_dir / "report.html", pictures=1).html.read_text()
    assert ("data:image/webp" in page) == (task == "box")
    assert "<td" in page.partition("repaired: bad area")[2].partition("got -1")[0]


def test_boxes_alone_have_what_registering_needs(runs: dict[str, Config]) -> None:
    report = json.loads((runs["box"].train.output_dir / "evaluation.json").read_text())
    checkpoint, scored = read_scored(runs["box"].train.output_dir)
    assert checkpoint == report["checkpoint"]
    assert scored.ap == {"bbox": report["bbox"]["AP"]}
    assert shortfall(runs["box"].registry, scored) == ""


def test_proposals_are_not_registered_and_the_reason_is_given(
    runs: dict[str, Config], empty_database: Path, tmp_path: Path
) -> None:
    config = runs["proposals"]
    tracking = {"enabled": True, "uri": f"sqlite:///{shutil.copy(empty_database, tmp_path)}"}
    tracked = config.model_copy(update={"tracking": config.tracking.model_copy(update=tracking)})
    result = register.run(tracked)
    assert result.version is None
    assert result.reason == "not registered: proposals have no AP, which registration requires"


def test_proposals_are_not_united_over_views(runs: dict[str, Config]) -> None:
    config = runs["proposals"]
    flipped = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"flip": True})})
    with pytest.raises(UserError, match=r"model\.task=proposals"):
        evaluate.run(flipped)


def test_boxes_are_united_over_views(runs: dict[str, Config]) -> None:
    config = runs["box"]
    flipped = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"flip": True})})
    evaluation = evaluate.run(flipped).evaluation
    assert evaluation is not None
    assert list(evaluation.scores) == ["bbox"]
