"""Benchmark of COCO scoring: the evaluators of `evaluate.backend` take turns on the same generated results.

The results come from synthetic_coco.py.
"""

import copy
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from components.benchmarks.synthetic_coco import ground_truth, place_objects, synthetic_results
from components.config import Config
from model.scoring.backends import Backend, Curves, Evaluator, Result, choose_backend, index_dataset, open_evaluator
from model.scoring.coco import summarize
from model.scoring.names import IouType

_ROUNDS = 3
_REFERENCE: Backend = "pycocotools"


@dataclass(frozen=True)
class Turn:
    """Times and curves of one evaluator on all results."""

    load_s: float
    score_s: float
    curves: Curves


def measure(config: Config) -> dict[str, Any]:
    """Time every evaluator on boxes of `evaluator_images` images and on masks of `evaluator_mask_images` images.

    Returns:
        Per IoU type, as plain data: images, detections, and per backend the seconds `ground_truth_s` (loading the
        ground truth, once), `load_s` (loading the results), `score_s` (evaluate, accumulate, summarise) and `total_s`
        (load and score), as medians; speed-ups over pycocotools for the last two; and whether precision and recall
        equal pycocotools' to the last bit.

    Raises:
        UserError: if hotcoco cannot be imported.
    """
    benchmark = config.benchmark
    backends: tuple[Backend, ...] = (_REFERENCE, choose_backend("hotcoco"))
    images: dict[IouType, int] = {"bbox": benchmark.evaluator_images, "segm": benchmark.evaluator_mask_images}
    return {
        iou_type: _measure_iou_type(backends, iou_type, count, benchmark.evaluator_detections)
        for iou_type, count in images.items()
    }


def metrics(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of loading and scoring by MLflow name, such as `time/evaluator_bbox_hotcoco_s`."""
    return {
        f"time/evaluator_{iou_type}_{backend}_s": row["total_s"]
        for iou_type, measured in report.items()
        for backend, row in measured["backends"].items()
    }


def table(report: dict[str, Any]) -> Table:
    """Format the report in 80 columns; × is the speed-up over pycocotools."""
    result = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 0, 0, 1))
    for column in ("", "truth s", "load s", "score s", "×", "total s", "×", "identical"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for iou_type, measured in report.items():
        result.add_row(f"{iou_type}, {measured['images']} images", style="bold")
        for backend, row in measured["backends"].items():
            seconds = [f"{row[name]:.3f}" for name in ("ground_truth_s", "load_s", "score_s", "total_s")]
            times = [f"{row[name]:.1f}" for name in ("times_faster_score", "times_faster_total")]
            identical = "yes" if row["identical"] else "NO"
            result.add_row(f"  {backend}", *seconds[:3], times[0], seconds[3], times[1], identical)
    return result


def _measure_iou_type(backends: tuple[Backend, ...], iou_type: IouType, images: int, detections: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    objects = place_objects(rng, images)
    dataset, results = ground_truth(rng, objects, images), synthetic_results(rng, objects, iou_type, detections)
    opened = {name: _open(name, dataset) for name in backends}
    turns: dict[Backend, list[Turn]] = {name: [] for name in backends}
    for _ in range(_ROUNDS):
        for name, (evaluator, _) in opened.items():
            turns[name].append(_take_turn(evaluator, results, iou_type))
    rows = {name: {"ground_truth_s": opened[name][1], **_row(turns[name], turns[_REFERENCE])} for name in backends}
    return {"images": images, "detections": len(results), "backends": rows}


def _open(backend: Backend, dataset: dict[str, Any]) -> tuple[Evaluator, float]:
    coco = index_dataset(copy.deepcopy(dataset))  # a separate copy, since pycocotools writes into it
    began = time.perf_counter()
    evaluator = open_evaluator(backend, coco)
    return evaluator, time.perf_counter() - began


def _take_turn(evaluator: Evaluator, results: list[Result], iou_type: IouType) -> Turn:
    began = time.perf_counter()
    loaded = evaluator.load(results)
    loaded_at = time.perf_counter()
    curves = evaluator.score(loaded, iou_type)
    summarize(curves)
    return Turn(loaded_at - began, time.perf_counter() - loaded_at, curves)


def _row(turns: list[Turn], reference: list[Turn]) -> dict[str, Any]:
    score_s = median(turn.score_s for turn in turns)
    total_s = median(turn.load_s + turn.score_s for turn in turns)
    curves, expected = turns[0].curves, reference[0].curves
    return {
        "load_s": median(turn.load_s for turn in turns),
        "score_s": score_s,
        "total_s": total_s,
        "times_faster_score": median(turn.score_s for turn in reference) / score_s,
        "times_faster_total": median(turn.load_s + turn.score_s for turn in reference) / total_s,
        "identical": np.array_equal(curves.precision, expected.precision)
        and np.array_equal(curves.recall, expected.recall),
    }
