"""The evaluators' benchmark at a size of a second: what is scored is like COCO, and both score it alike."""

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from components import benchmark
from components.benchmarks import evaluator, steps
from components.benchmarks.synthetic_coco import ground_truth, place_objects, synthetic_results
from components.config import BenchmarkConfig, Config
from components.params import save_config
from model.config import TrainConfig
from model.scoring.backends import index_dataset
from model.scoring.coco import evaluate_results

SMALL = BenchmarkConfig(modes=("evaluator",), evaluator_images=20, evaluator_mask_images=5, evaluator_detections=30)


def test_both_evaluators_are_timed_and_agree() -> None:
    report = evaluator.measure(Config(benchmark=SMALL))
    assert list(report) == ["bbox", "segm"]
    assert [measured["images"] for measured in report.values()] == [20, 5]
    assert [measured["detections"] for measured in report.values()] == [600, 150]
    for measured in report.values():
        assert list(measured["backends"]) == ["pycocotools", "hotcoco"]
        for row in measured["backends"].values():
            assert all(row[name] > 0 for name in ("ground_truth_s", "load_s", "score_s", "total_s"))
            assert row["total_s"] >= max(row["load_s"], row["score_s"])
            assert row["identical"]
        theirs, ours = measured["backends"].values()
        assert (theirs["times_faster_score"], theirs["times_faster_total"]) == (1.0, 1.0)
        assert ours["times_faster_score"] == pytest.approx(theirs["score_s"] / ours["score_s"])


def test_generated_results_are_neither_perfect_nor_hopeless() -> None:
    rng = np.random.default_rng(0)
    objects = place_objects(rng, 60)
    dataset = ground_truth(rng, objects, 60)
    found = {task: synthetic_results(rng, objects, task, 40) for task in ("bbox", "segm")}
    areas = np.array([annotation["area"] for annotation in dataset["annotations"]])
    shares = [np.mean((low <= areas) & (areas < high)) for low, high in ((0, 32**2), (32**2, 96**2), (96**2, np.inf))]
    assert min(shares) > 0.15
    assert sum(annotation["iscrowd"] for annotation in dataset["annotations"]) > 0
    assert {result["image_id"] for result in found["bbox"]} == set(range(1, 61))
    evaluation = evaluate_results(index_dataset(dataset), found["bbox"], found["segm"])
    for scores in (evaluation.bbox, evaluation.segm):
        assert 0.1 < (scores["AP"] or 0) < (scores["AP50"] or 0) < 0.95


def test_generated_results_are_the_surer_the_nearer_an_object_they_lie() -> None:
    rng = np.random.default_rng(0)
    objects = place_objects(rng, 100)
    results = synthetic_results(rng, objects, "bbox", 40)
    scores = np.array([result["score"] for result in results])
    assert 0 <= scores.min() < scores.max() <= 1
    overlaps = np.zeros(len(results))
    for number, result in enumerate(results):
        of_image = objects.boxes[objects.image_ids == result["image_id"]]
        overlaps[number] = coco_mask.iou([result["bbox"]], of_image, [0] * len(of_image)).max()
    order = scores.argsort()
    sure, unsure = order[-len(order) // 4 :], order[: len(order) // 4]
    assert overlaps[sure].mean() > 0.7
    assert overlaps[unsure].mean() < 0.4


def test_mode_reaches_the_report_mlflow_and_the_terminal(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    config = Config(train=TrainConfig(output_dir=tmp_path / "run", device="cpu"), benchmark=SMALL)
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    save_config(config.model_copy(update={"tracking": tracking}), tmp_path / "params.yaml")
    benchmark.main(["evaluator"])
    report = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert "steps" not in report
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics").fetchall())
    assert metrics == {
        f"time/evaluator_{task}_{backend}_s": report["evaluator"][task]["backends"][backend]["total_s"]
        for task in ("bbox", "segm")
        for backend in ("pycocotools", "hotcoco")
    }
    assert "bbox, 20 images" in capsys.readouterr().out


def test_other_modes_leave_evaluators_alone() -> None:
    assert "evaluator" not in Config().benchmark.modes
    assert steps.plan(Config(benchmark=SMALL)) == []
