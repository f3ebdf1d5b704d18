"""Score a trained model on a prepared split: COCO's box and mask AP, or the recall of proposals; result files, curves, drawings.

Takes the last checkpoint of train.output_dir unless told otherwise, with the network and image sizes it was trained with, and
writes into train.output_dir: evaluation.json, inference/ and plots/. Scores are fractions; null where there was nothing to find.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import orjson
import torch
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console
from rich.progress import track
from rich.table import Table

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.evaluation.before_after import read_before
from components.evaluation.plots import (
    draw_comparison,
    objects_of,
    plot_precision_recall,
    spread,
    write_precision_recall,
)
from components.launch import relaunch
from components.runs.environment import git_commit
from components.runs.journal import write_atomically
from components.runs.trained import Trained, load_trained, open_split
from components.tracking.tracker import open_tracker
from model.config import DataConfig, EvaluateConfig
from model.data.index import CocoIndex
from model.data.loader import eval_loader
from model.data.views import views_loader
from model.distributed import from_main, gather_on_main, is_main, pick_device, process_group, rank, world_size
from model.engine.steps import predict
from model.inference.postprocess import original_boxes, to_coco_results
from model.inference.predictor import Object
from model.inference.test_time import is_plain, predict_views
from model.inference.visualize import stacked
from model.network.mask_rcnn import NAMES_OF_PROPOSALS, MaskRCNN
from model.scoring.backends import AnyBackend, Backend, choose_backend
from model.scoring.coco import KINDS, TITLES, CocoEvaluation, evaluate_proposals, evaluate_results, load_ground_truth
from model.structures import Batch, Detections

_NOT_IN_METRIC_NAMES = r"[^\w\-. ]"
_MAX_CLASSES_IN_TABLE = 20


@dataclass(frozen=True)
class Results:
    """What a model found in a split: COCO results of boxes (or proposals) and masks in the same order, and tensors an image."""

    bbox: list[dict[str, Any]]
    segm: list[dict[str, Any]]  # empty without a mask head
    tensors: list[dict[str, Any]]  # empty unless they were asked for
    task: str = "mask"  # model.task


@dataclass(frozen=True)
class EvaluateResult:
    """What was evaluated, and how well it did."""

    run_dir: Path
    checkpoint: str
    evaluation: CocoEvaluation | None  # None with evaluate.skip_eval


def run(config: Config, *, checkpoint: str = "last") -> EvaluateResult:
    """Evaluate a checkpoint (`last`, `best` or a path) and leave everything in `train.output_dir`.

    Raises:
        UserError: if there is no such checkpoint, or no prepared data of its classes, or no such evaluate.backend.
    """
    backend = choose_backend(config.evaluate.backend)  # an absent one is told before minutes of detection
    with process_group(pick_device(config.train.device), config.train.timeout_s):
        trained = load_trained(config, checkpoint)
        index = open_split(trained, config.evaluate.split)
        data, dtype = trained.config.data, trained.config.train.dtype
        results = detect(trained.loaded.model, index, data, config.evaluate, dtype=dtype, keep_tensors=True)
        evaluation = from_main(None if results is None else _finish(config, trained, index, results, backend))
    return EvaluateResult(config.train.output_dir, trained.name, evaluation)


def _finish(
    config: Config, trained: Trained, index: CocoIndex, results: Results, backend: Backend
) -> CocoEvaluation | None:
    """Score what was found, write everything, log it and say it."""
    run_dir = config.train.output_dir
    ground_truth = load_ground_truth(index.ground_truth_path)
    evaluation = None
    if not config.evaluate.skip_eval:
        evaluation = score(ground_truth, results, backend)
    write_inference(run_dir / "inference", results, evaluation)
    write_plots(run_dir, results, evaluation, index, ground_truth, config.evaluate.drawn_images)
    report = evaluation_report(evaluation, results, index, trained.name)
    report["train_data_hash"] = trained.loaded.data_hash
    write_atomically(run_dir / "evaluation.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _track(config, trained, index, evaluation)
    _print(evaluation, run_dir, trained)
    return evaluation


def evaluate_model(model: MaskRCNN, config: Config) -> CocoEvaluation:
    """Score a model that is still in training on `evaluate.split`, without test-time augmentation; nothing is written."""
    index = CocoIndex.open(config.data.prepared_dir, config.evaluate.split)
    plain = EvaluateConfig(batch_size=config.evaluate.batch_size)
    results = detect(model, index, config.data, plain, dtype=config.train.dtype)
    evaluation = None
    if results is not None:
        evaluation = score(index.ground_truth_path, results, config.evaluate.backend)
    evaluation = from_main(evaluation)
    assert evaluation is not None
    return evaluation


def score(ground_truth: Path | COCO, results: Results, backend: AnyBackend) -> CocoEvaluation:
    """AP of boxes and, where the model has them, of masks; of a model of proposals, their recall."""
    if results.task == "proposals":
        return evaluate_proposals(ground_truth, results.bbox, backend=backend)
    segm = results.segm if results.task == "mask" else None
    return evaluate_results(ground_truth, results.bbox, segm, backend=backend)


def detect(
    model: MaskRCNN,
    index: CocoIndex,
    data: DataConfig,
    evaluate: EvaluateConfig,
    *,
    dtype: str = "float32",
    keep_tensors: bool = False,
) -> Results | None:
    """Run a model over every image of a split, its batches shared among the processes; augmented as `evaluate` says.

    Args:
        keep_tensors: also keep what the network computed; for COCO's 5,000 val images that is about a GiB of memory.

    Returns:
        What all processes found, in an order that does not depend on their number; None in all but rank 0.
    """
    device, shard = next(model.parameters()).device, (rank(), world_size())
    batches: Iterable[tuple[Batch, Detections]]
    if is_plain(evaluate):
        loader = eval_loader(index, data, batch_size=evaluate.batch_size, shard=shard)
        batches, total = predict(model, loader, device, dtype), len(loader)
    else:
        views = views_loader(index, data, evaluate.scales, batch_size=evaluate.batch_size, shard=shard)
        batches, total = predict_views(model, views, evaluate, device, dtype), len(views)
    found = []
    for batch, detections in track(batches, "detecting", total=total, transient=True, disable=not is_main()):
        tensors = _tensors(batch, detections) if keep_tensors else []
        results = to_coco_results(batch, detections, index.category_ids, model.conventions)
        found.append(Results(*results, tensors))
    if not (of_ranks := gather_on_main(found)):
        return None
    in_order = [
        results for row in zip_longest(*of_ranks) for results in row if results
    ]  # rank r had batches r, r + size, …
    bbox, segm, tensors = (
        list(chain.from_iterable(getattr(part, name) for part in in_order)) for name in ("bbox", "segm", "tensors")
    )
    return Results(bbox, segm, tensors, model.task)


def evaluation_report(
    evaluation: CocoEvaluation | None, results: Results, index: CocoIndex, checkpoint: str
) -> dict[str, Any]:
    """The content of evaluation.json; scores are null where they were not computed."""
    return {
        **{kind: evaluation and evaluation.scores[kind] for kind in KINDS[results.task]},
        "per_class": evaluation and evaluation.per_class,
        "images": len(index),
        "detections": len(results.bbox),
        "checkpoint": checkpoint,
        "data_hash": index.data_hash,
        "commit": git_commit(),
    }


def score_metrics(evaluation: CocoEvaluation) -> dict[str, float | None]:
    """Scores under their MLflow names: `ap/bbox`, `ap50/segm`, `ar1000/proposals`, …"""
    return {
        f"{name.lower()}/{kind}": value for kind, scores in evaluation.scores.items() for name, value in scores.items()
    }


def class_metrics(evaluation: CocoEvaluation) -> dict[str, float | None]:
    """AP of each class under its MLflow name: `class_ap/segm/traffic light`, …; what such names cannot hold is `_`."""
    return {
        f"class_ap/{task}/{re.sub(_NOT_IN_METRIC_NAMES, '_', name)}": ap
        for name, scores in evaluation.per_class.items()
        for task, ap in scores.items()
    }


def write_inference(folder: Path, results: Results, evaluation: CocoEvaluation | None) -> None:
    """bbox.json and segm.json, or proposals.json (COCO results), predictions.pth (a dictionary of tensors an image), coco_results.pth (scores).

    Of another model's files in the folder none stays. coco_results.pth is not written when there was no evaluation. Both .pth load with
    `weights_only=True`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in TITLES:
        (folder / f"{kind}.json").unlink(missing_ok=True)
    for kind in KINDS[results.task]:
        found = results.segm if kind == "segm" else results.bbox
        write_atomically(folder / f"{kind}.json", orjson.dumps(found).decode())  # json takes ten times as long
    _save(results.tensors, folder / "predictions.pth")
    scores_path = folder / "coco_results.pth"
    if evaluation is None:
        scores_path.unlink(missing_ok=True)
        return
    precision = {task: torch.from_numpy(values) for task, values in evaluation.precision.items()}  # [T, R], see coco.py
    _save({**evaluation.scores, "per_class": evaluation.per_class, "precision": precision}, scores_path)


def write_plots(
    run_dir: Path,
    results: Results,
    evaluation: CocoEvaluation | None,
    index: CocoIndex,
    ground_truth: COCO,
    drawn_images: int,
) -> None:
    """The folder plots/: curves (of proposals there are none), predictions/<image id>.jpg of some images from all over the split, and a few of
    them before and after training.
    """
    folder = run_dir / "plots"
    class_names = NAMES_OF_PROPOSALS if results.task == "proposals" else index.class_names
    shutil.rmtree(folder, ignore_errors=True)  # drawings of an earlier checkpoint
    (folder / "predictions").mkdir(parents=True)
    if evaluation is not None and evaluation.precision:
        plot_precision_recall(evaluation, folder / "precision_recall.png")
        write_precision_recall(evaluation, folder / "precision_recall.csv")

    def draw(i: int, before: list[Object] | None = None) -> Image.Image:
        found = _objects(results, int(index.image_ids[i]), index.category_ids)
        return draw_comparison(index, i, ground_truth, found, class_names=class_names, before=before)

    for i in spread(len(index), drawn_images):
        draw(i).save(folder / "predictions" / f"{index.image_ids[i]}.jpg", quality=90)
    before = read_before(run_dir, index)
    if drawn_images and before:
        stacked([draw(i, objects) for i, objects in before.items()]).save(folder / "before_after.jpg", quality=90)


def _objects(results: Results, image_id: int, category_ids: Sequence[int]) -> list[Object]:
    """Those of one image."""
    places = [k for k, result in enumerate(results.bbox) if result["image_id"] == image_id]
    masks = [results.segm[k] for k in places] if results.segm else []
    return objects_of([results.bbox[k] for k in places], masks, category_ids)


def _tensors(batch: Batch, detections: Detections) -> list[dict[str, Any]]:
    """Each image's detections without padding; boxes in original pixels."""
    boxes = original_boxes(batch, detections)
    tensors = []
    for n, count in enumerate(detections.num_detections.tolist()):
        found = {
            "boxes": boxes[n, :count],  # [k, 4] xyxy
            "scores": detections.scores[n, :count],
            "labels": detections.labels[n, :count],
        }
        if detections.mask_probs is not None:
            found["mask_probs"] = detections.mask_probs[n, :count]  # [k, M, M], in the frame of the box
        image = {"image_id": int(batch.image_ids[n]), "size": batch.original_sizes[n].tolist()}
        tensors.append(image | {name: value.cpu().clone() for name, value in found.items()})
    return tensors


def _save(content: Any, path: Path) -> None:
    partial = path.with_name(path.name + ".tmp")
    torch.save(content, partial)
    partial.replace(path)


def _track(config: Config, trained: Trained, index: CocoIndex, evaluation: CocoEvaluation | None) -> None:
    run_dir, data = config.train.output_dir, trained.config.data
    with open_tracker(trained.config, run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_dataset(
            f"{data.source}_{config.evaluate.split}", index.data_hash, data.prepared_dir, context="evaluation"
        )
        if evaluation is not None:
            scores = score_metrics(evaluation) | class_metrics(evaluation)
            tracker.log_metrics(scores, trained.loaded.step)
        tracker.log_artifact(run_dir / "evaluation.json")
        tracker.log_artifact(run_dir / "plots", "plots")


def _print(evaluation: CocoEvaluation | None, run_dir: Path, trained: Trained) -> None:
    console = Console()
    if evaluation is not None:
        console.print(f"{trained.name} on {evaluation.num_images} images", highlight=False, soft_wrap=True)
        console.print(score_table(evaluation))
        if 0 < len(evaluation.per_class) <= _MAX_CLASSES_IN_TABLE:
            console.print(class_table(evaluation))
    console.print(f"drawn predictions: {run_dir / 'plots' / 'predictions'}", highlight=False, soft_wrap=True)


def score_table(evaluation: CocoEvaluation) -> Table:
    """The twelve scores of boxes and masks, or the recall of proposals."""
    table = Table()
    for column in ("", *(TITLES[kind] for kind in evaluation.scores)):
        table.add_column(column, justify="right" if column else "left")
    for name in next(iter(evaluation.scores.values())):
        table.add_row(name, *(_score(scores[name]) for scores in evaluation.scores.values()))
    return table


def class_table(evaluation: CocoEvaluation) -> Table:
    """AP of each class."""
    table = Table()
    for column in ("class", *(f"{TITLES[kind]} AP" for kind in evaluation.scores)):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, scores in evaluation.per_class.items():
        table.add_row(name, *(_score(scores[kind]) for kind in evaluation.scores))
    return table


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn evaluate`."""
    parser = stage_parser("evaluate", __doc__)
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path (%(default)s)")
    parser.add_argument("--skip-eval", action="store_true", help="write predictions, compute no AP")
    with user_errors():
        args, config = parse(parser, argv)
        if args.skip_eval:
            config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"skip_eval": True})})
        if not relaunch("evaluate", config.train.processes, argv):
            run(config, checkpoint=args.checkpoint)


if __name__ == "__main__":
    main()
