"""Output files of an evaluation: evaluation.json, scores.json, inference/, plots/."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from pycocotools.coco import COCO

from components.evaluation.before_after import read_before
from components.evaluation.detect import Results
from components.evaluation.plots import (
    draw_before_after,
    draw_comparison,
    plot_precision_recall,
    write_precision_recall,
)
from components.runs.environment import git_commit
from model.config import EvaluateConfig
from model.data.index import CocoIndex, spread
from model.engine.checkpoint import write_tensors
from model.files import write_atomically
from model.inference.predictor import Object, objects_of
from model.network.mask_rcnn import NAMES_OF_PROPOSALS
from model.scoring.coco import CocoEvaluation
from model.scoring.names import RESULT_TYPES, TITLES

_SHOWN = {
    "bbox": ("AP", "AP50", "AP75"),
    "segm": ("AP", "AP50", "AP75"),
    "proposals": ("AR100", "AR1000"),
}


def evaluation_report(
    evaluation: CocoEvaluation | None, results: Results, index: CocoIndex, checkpoint: str, settings: EvaluateConfig
) -> dict[str, Any]:
    """Content of evaluation.json; scores are null if not computed."""
    return {
        **{result_type: evaluation and evaluation.scores[result_type] for result_type in RESULT_TYPES[results.task]},
        "per_class": evaluation and evaluation.per_class,
        "max_detections": evaluation and evaluation.max_detections,
        "test_time": {name: getattr(settings, name) for name in ("scales", "flip", "soft_nms", "soft_nms_sigma")},
        "images": len(index),
        "detections": len(results.bbox),
        "checkpoint": checkpoint,
        "data_hash": index.data_hash,
        "commit": git_commit(),
    }


def write_scores(run_dir: Path, report: dict[str, Any]) -> None:
    """Write scores.json for DVC: the main scores of an evaluation.json, few enough for a line of `dvc metrics show`."""
    scores = {
        result_type: {name: report[result_type][name] for name in names if report[result_type][name] is not None}
        for result_type, names in _SHOWN.items()
        if report.get(result_type)
    }
    write_atomically(run_dir / "scores.json", json.dumps(scores, indent=2) + "\n")


def write_inference(folder: Path, results: Results, evaluation: CocoEvaluation | None) -> None:
    """Write the results: bbox.json and segm.json, or proposals.json (COCO results), and two files of tensors.

    predictions.pth has a dictionary of tensors per image, coco_results.pth the scores, if they were computed; both load
    with `weights_only=True`. Files of an earlier model in this folder are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for result_type in TITLES:
        (folder / f"{result_type}.json").unlink(missing_ok=True)
    for result_type in RESULT_TYPES[results.task]:
        found = results.segm if result_type == "segm" else results.bbox
        write_atomically(folder / f"{result_type}.json", orjson.dumps(found).decode())  # json is ten times slower
    write_tensors(results.tensors, folder / "predictions.pth")
    scores_path = folder / "coco_results.pth"
    if evaluation is None:
        scores_path.unlink(missing_ok=True)
        return
    precision = {name: torch.from_numpy(values) for name, values in evaluation.precision.items()}  # [T, R], see coco.py
    write_tensors({**evaluation.scores, "per_class": evaluation.per_class, "precision": precision}, scores_path)


def write_plots(
    run_dir: Path,
    results: Results,
    evaluation: CocoEvaluation | None,
    index: CocoIndex,
    ground_truth: COCO,
    drawn_images: int,
) -> None:
    """Write plots/: curves (none for proposals), predictions/<image id>.jpg of images spread over the split, and a few
    images before and after training.
    """
    folder = run_dir / "plots"
    class_names = NAMES_OF_PROPOSALS if results.task == "proposals" else index.class_names
    shutil.rmtree(folder, ignore_errors=True)  # drawings of an earlier checkpoint
    (folder / "predictions").mkdir(parents=True)
    if evaluation is not None and evaluation.precision:
        plot_precision_recall(evaluation, folder / "precision_recall.png")
        write_precision_recall(evaluation, folder / "precision_recall.csv")

    def found(i: int) -> list[Object]:
        return _objects(results, int(index.image_ids[i]), index.category_ids)

    for i in spread(len(index), drawn_images):
        drawing = draw_comparison(index, i, ground_truth, found(i), class_names=class_names)
        drawing.save(folder / "predictions" / f"{index.image_ids[i]}.jpg", quality=90)
    before = read_before(run_dir, index)
    if drawn_images and before:
        objects = {i: (of_image, found(i)) for i, of_image in before.items()}
        draw_before_after(index, ground_truth, objects, class_names).save(folder / "before_after.jpg", quality=90)


def _objects(results: Results, image_id: int, category_ids: Sequence[int]) -> list[Object]:
    """Objects found in one image."""
    indices = [k for k, result in enumerate(results.bbox) if result["image_id"] == image_id]
    masks = [results.segm[k] for k in indices] if results.segm else []
    return objects_of([results.bbox[k] for k in indices], masks, category_ids)
