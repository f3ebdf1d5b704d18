"""Evaluation of a checkpoint on a prepared split: detects, scores, writes, tracks and prints."""

import json
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from rich.table import Table

from components.cli import terminal
from components.config import Config
from components.evaluation.analysis import analyse
from components.evaluation.analysis_plots import write_analysis_plots, write_label_errors
from components.evaluation.detect import Results, detect
from components.evaluation.files import evaluation_report, write_inference, write_plots, write_scores
from components.evaluation.score import analysis_metrics, class_metrics, limits_that_bind, score, score_metrics
from components.runs.figures import number
from components.runs.lock import require_folder, writing
from components.runs.thresholds import ANALYSIS_FILE
from components.runs.trained import Trained, load_trained, open_split
from components.tracking.tracker import open_tracker
from model.data.index import CocoIndex
from model.distributed import on_main, pick_device, process_group
from model.files import write_atomically
from model.scoring.backends import Backend, choose_backend
from model.scoring.coco import CocoEvaluation, load_ground_truth
from model.scoring.names import COCO_MAX_DETECTIONS, TITLES

_MAX_CLASSES_IN_TABLE = 20


def evaluate(config: Config, checkpoint: str) -> tuple[str, CocoEvaluation | None]:
    """Evaluate a checkpoint and write all results into `train.output_dir`.

    Args:
        config: configuration of the stage.
        checkpoint: `last`, `best` or a path.

    Returns:
        The checkpoint's path below the run's folder, and its scores, None with evaluate.skip_eval.

    Raises:
        UserError: if the checkpoint, prepared data with its classes, or evaluate.backend is missing.
    """
    backend = choose_backend(config.evaluate.backend)  # fail before minutes of detection
    device, train = pick_device(config.train.device), config.train
    with process_group(device, train.timeout_s), writing(train.output_dir, "evaluate"):
        trained = load_trained(config, checkpoint)
        index = open_split(trained, config.evaluate.split)
        data, dtype = trained.config.data, trained.config.train.dtype
        results = detect(trained.loaded.model, index, data, config.evaluate, dtype=dtype, keep_tensors=True)

        def finished() -> CocoEvaluation | None:
            assert results is not None
            return _finish(config, trained, index, results, backend)

        evaluation = on_main(finished)
    return trained.name, evaluation


def _finish(
    config: Config, trained: Trained, index: CocoIndex, results: Results, backend: Backend
) -> CocoEvaluation | None:
    """Score the results; write, log and print everything."""
    run_dir = config.train.output_dir
    ground_truth = load_ground_truth(index.ground_truth_path)
    evaluation = None
    if not config.evaluate.skip_eval:
        evaluation = score(ground_truth, results, backend, max_detections=config.evaluate.max_detections)
    require_folder(run_dir)
    write_inference(run_dir / "inference", results, evaluation)
    write_plots(run_dir, results, evaluation, index, ground_truth, config.evaluate.drawn_images)
    analysis = _analyse(config, index, ground_truth, results) if evaluation else {}
    report = evaluation_report(evaluation, results, index, trained.name, config.evaluate)
    origin = {key: report[key] for key in ("checkpoint", "data_hash", "test_time")}
    write_atomically(run_dir / ANALYSIS_FILE, json.dumps(origin | analysis, ensure_ascii=False) + "\n")
    report |= {"train_data_hash": trained.loaded.data_hash, "max_iters": trained.loaded.max_iters}
    write_atomically(run_dir / "evaluation.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_scores(run_dir, report)
    metrics = score_metrics(evaluation) | class_metrics(evaluation) | analysis_metrics(analysis) if evaluation else {}
    _track(config, trained, index, metrics)
    _print(evaluation, run_dir, trained)
    if evaluation is not None:
        limits = config.evaluate.max_detections, trained.config.model.detections_per_image
        for sentence in limits_that_bind(ground_truth, results, *limits):
            print(f"warning: {sentence}")
    return evaluation


def _analyse(config: Config, index: CocoIndex, ground_truth: COCO, results: Results) -> dict[str, Any]:
    """Analyse the results and draw the analysis into plots/; empty for proposals, and without hotcoco."""
    if results.task == "proposals":
        return {}
    try:
        analysis = analyse(ground_truth, results, config.evaluate.max_detections)
    except ImportError as error:
        print(f"warning: no thresholds and no analysis, since hotcoco cannot be imported ({error})")
        return {}
    plots = config.train.output_dir / "plots"
    write_analysis_plots(analysis, plots)
    write_label_errors(analysis, plots / "label_errors", index, ground_truth, results, config.evaluate.drawn_images)
    return analysis


def _track(config: Config, trained: Trained, index: CocoIndex, metrics: dict[str, float | None]) -> None:
    run_dir, data = config.train.output_dir, trained.config.data
    with open_tracker(trained.config, run_dir=run_dir, metrics_csv=False) as tracker:
        tracker.log_dataset(
            f"{data.source}_{config.evaluate.split}", index.data_hash, data.prepared_dir, context="evaluation"
        )
        if metrics:
            tracker.log_metrics(metrics, trained.loaded.step)
        tracker.log_artifact(run_dir / "evaluation.json")
        tracker.log_artifact(run_dir / ANALYSIS_FILE)
        tracker.log_artifact(run_dir / "plots", "plots")


def _print(evaluation: CocoEvaluation | None, run_dir: Path, trained: Trained) -> None:
    console = terminal()
    if evaluation is not None:
        limit, coco = evaluation.max_detections, COCO_MAX_DETECTIONS
        note = "" if limit == coco else f"; AP counts {limit} detections per image and class, published AP {coco}"
        console.print(f"{trained.name} on {evaluation.num_images} images{note}", soft_wrap=True)
        console.print(score_table(evaluation))
        if 0 < len(evaluation.per_class) <= _MAX_CLASSES_IN_TABLE:
            console.print(class_table(evaluation))
    console.print(f"drawn predictions: {run_dir / 'plots' / 'predictions'}", soft_wrap=True)


def score_table(evaluation: CocoEvaluation) -> Table:
    """Table of the twelve scores of boxes and masks, or of the recall of proposals."""
    table = Table()
    for column in ("", *(TITLES[result_type] for result_type in evaluation.scores)):
        table.add_column(column, justify="right" if column else "left")
    for name in next(iter(evaluation.scores.values())):
        table.add_row(name, *(number(scores[name]) for scores in evaluation.scores.values()))
    return table


def class_table(evaluation: CocoEvaluation) -> Table:
    """Table of AP per class."""
    table = Table()
    for column in ("class", *(f"{TITLES[result_type]} AP" for result_type in evaluation.scores)):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, scores in evaluation.per_class.items():
        table.add_row(name, *(number(scores[result_type]) for result_type in evaluation.scores))
    return table
