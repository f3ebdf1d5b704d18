"""Report of a stability study: stability.json, and the same as CSV, Markdown and terminal table.

stability.json: {"seeds", "runs", "confidence", "bbox" and "segm": {"AP", …: {"values", "mean", "deviation",
"interval"}}, "max_detections", "images", "data_hash", "train_data_hash", "config", "commits", "date"}. Scores are
fractions; values are in the order of the seeds; deviation is the sample standard deviation; undefined values, such as
the deviation of a single run, are null.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from components.runs.figures import interval, markdown_table, number
from components.runs.identity import description
from components.runs.result import Result
from components.studies.intervals import CONFIDENCE, estimate
from model.scoring.names import COCO_MAX_DETECTIONS, IOU_TYPES, SCORE_NAMES, TITLES

_TRACKED = ("AP", "AP50", "AP75")
_NO_DEVIATION = "A single seed has no standard deviation; set at least two in stability.seeds."


def report_of(results: Sequence[Result], date: str) -> dict[str, Any]:
    """Make the content of stability.json for results that differ only in their seeds, in this order.

    Args:
        date: date of the summary, ISO 8601.
    """
    first = results[0].evaluation
    return {
        "seeds": [result.seed for result in results],
        "runs": [result.run_dir.as_posix() for result in results],
        "confidence": CONFIDENCE,
        **{
            iou_type: _scores([result.evaluation[iou_type] for result in results])
            for iou_type in IOU_TYPES
            if first.get(iou_type)
        },
        "max_detections": first.get("max_detections"),
        "images": first["images"],
        "data_hash": first["data_hash"],
        "train_data_hash": first.get("train_data_hash"),
        "config": description(results[0].config),
        "commits": sorted({result.evaluation.get("commit") or "unknown" for result in results}),
        "date": date,
    }


def _scores(evaluations: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name in SCORE_NAMES:
        values = [evaluation.get(name) for evaluation in evaluations]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            scores[name] = {"values": values, **asdict(estimate(known))}
        else:  # the ground truth has nothing of that size
            scores[name] = {"values": values, "mean": None, "deviation": None, "interval": None}
    return scores


def csv_text(report: dict[str, Any]) -> str:
    """Format every score as a CSV row, unrounded: seeds, mean, standard deviation, interval; empty if undefined."""
    seeds = [f"seed_{seed}" for seed in report["seeds"]]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["iou_type", "score", *seeds, "mean", "standard_deviation", "interval_low", "interval_high"])
    for iou_type in iou_types(report):
        for name, score in report[iou_type].items():
            interval = score["interval"] or (None, None)
            table.writerow([iou_type, name, *score["values"], score["mean"], score["deviation"], *interval])
    return text.getvalue()


def markdown_scores(report: dict[str, Any]) -> str:
    """Format the table of NVIDIA's README: final AP of boxes and masks per seed, mean, standard deviation, interval."""
    return markdown_table(_header(report), _rows(report))


def markdown_note(report: dict[str, Any]) -> str:
    """Caption of the table, with date and commit, and with the limit of detections if it is not COCO's."""
    count, commits = len(report["seeds"]), ", ".join(commit[:7] + commit[40:] for commit in report["commits"])
    scores = f"AP at IoU 0.50:0.95 of {count} training run{'s' * (count > 1)} that differ only in the seed"
    note = f"{scores}, on {report['images']} images; {report['date']}, commit {commits}."
    limit = report.get("max_detections") or COCO_MAX_DETECTIONS
    if limit != COCO_MAX_DETECTIONS:
        note += f" AP counts {limit} detections per image and class, published AP {COCO_MAX_DETECTIONS}."
    return note if count > 1 else f"{note} {_NO_DEVIATION}"


def terminal_table(report: dict[str, Any]) -> Table:
    """Format the table for the terminal, transposed: a line per seed, so that any number fits."""
    table = Table(title=f"final AP, {report['images']} images")
    header, rows = _header(report), _rows(report)
    for column in ("", *(row[0].removeprefix("final AP ") for row in rows)):
        table.add_column(column, justify="right" if column else "left")
    for column_idx, name in enumerate(header[1:], start=1):
        table.add_row(name, *(row[column_idx] for row in rows), end_section=column_idx == len(report["seeds"]))
    if len(report["seeds"]) == 1:
        table.caption = _NO_DEVIATION
    return table


def _header(report: dict[str, Any]) -> list[str]:
    percent = f"{report['confidence']:.0%}".replace("%", " %")
    return ["", *(f"Seed {seed}" for seed in report["seeds"]), "Mean", "Standard deviation", f"{percent} interval"]


def _rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for iou_type in iou_types(report):
        score = report[iou_type]["AP"]
        values = map(number, (*score["values"], score["mean"]))
        ends = interval(score["interval"])
        rows.append([f"final AP {TITLES[iou_type]}", *values, number(score["deviation"], ".4f"), ends])
    return rows


def summary_metrics(report: dict[str, Any]) -> dict[str, float | None]:
    """AP, AP50 and AP75 over the seeds by MLflow name: `ap_mean/bbox`, `ap_deviation/bbox`, `ap_low/bbox`, …"""
    metrics: dict[str, float | None] = {}
    for iou_type in iou_types(report):
        for name in _TRACKED:
            score = report[iou_type][name]
            low, high = score["interval"] or (None, None)
            values = {"mean": score["mean"], "deviation": score["deviation"], "low": low, "high": high}
            metrics |= {f"{name.lower()}_{what}/{iou_type}": value for what, value in values.items()}
    return metrics


def shown_scores(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Content of scores.json, for DVC: AP over the seeds."""
    shown = {}
    for iou_type in iou_types(report):
        score = report[iou_type]["AP"]
        values = {"AP_mean": score["mean"], "AP_deviation": score["deviation"]}
        shown[iou_type] = {name: value for name, value in values.items() if value is not None}
    return shown


def iou_types(report: dict[str, Any]) -> list[str]:
    """IoU types in a report: bbox, and segm if the network has masks."""
    return [iou_type for iou_type in IOU_TYPES if iou_type in report]
