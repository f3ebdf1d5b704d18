"""Artifacts of pipeline steps: metadata for lineage, and a small document or page for Kubeflow's user interface.

Data and weights stay on the volume where the stages wrote them, and the final checkpoint in MLflow; artifacts only
refer to them.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from components.benchmark import BenchmarkResult
from components.benchmarks.measures import MEASURES
from components.config import Config
from components.download import DownloadResult
from components.predict import PredictResult
from components.prepare import PrepareResult
from components.register import RegisterResult
from components.runs.environment import git_commit
from components.runs.figures import number
from components.runs.result import final_checkpoint, read_evaluation
from components.studies.result import StabilityResult
from components.studies.tables import summary_metrics
from components.tracking.run_file import RUN_FILE, RunFile
from model.data.index import CocoIndex
from model.engine.pointers import POINTERS, CheckpointError, find_checkpoint
from model.scoring.names import IOU_TYPES, TITLES

_SHOWN_PICTURES = 4
_MIME = {".png": "image/png", ".jpg": "image/jpeg"}


class Artifact(Protocol):
    """Output of a component, as passed by kfp."""

    path: str
    metadata: dict[str, Any]


def describe_raw(raw: Artifact, config: Config, result: DownloadResult) -> None:
    """Describe the raw data set: its source and location."""
    _describe(raw, {"source": config.data.source, "raw_dir": str(result.raw_dir), "changed": result.changed})


def describe_dataset(dataset: Artifact, result: PrepareResult) -> None:
    """Describe the prepared data set by hashes and sizes, with the whole report as content."""
    facts: dict[str, Any] = {"prepared_dir": str(result.prepared_dir), "commit": git_commit()}
    for split, report in result.splits.items():
        facts |= {f"{split}_data_hash": report.data_hash, f"{split}_images": report.images}
    _describe(dataset, facts, {split: asdict(report) for split, report in result.splits.items()})


def describe_model(model: Artifact, config: Config) -> None:
    """Describe the trained model: the checkpoint that is the result, its training data and its MLflow run.

    Raises:
        CheckpointError: if this step finds no checkpoint.
    """
    run_dir = config.train.output_dir
    checkpoint = find_checkpoint(run_dir, POINTERS[final_checkpoint(run_dir, config.train)])
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir}: must have a checkpoint after training, got none; this step and the training job must mount "
            "the same volume "
            "(cluster.volumes)"
        )
    data_hash = CocoIndex.open(config.data.prepared_dir, "train").data_hash
    facts = {
        "run_dir": str(run_dir),
        "checkpoint": checkpoint.name,
        "train_data_hash": data_hash,
        "commit": git_commit(),
    }
    _describe(model, facts | _mlflow(run_dir))


def describe_evaluation(metrics: Artifact, page: Artifact, config: Config) -> None:
    """Describe an evaluation: AP by MLflow name, and a page with scores, curves and some drawings."""
    run_dir = config.train.output_dir
    keys = ("checkpoint", "images", "detections", "data_hash", "commit")
    evaluation = read_evaluation(run_dir, *keys)
    scores = {result_type: evaluation[result_type] or {} for result_type in TITLES if result_type in evaluation}
    figures = {
        f"{name.lower()}/{result_type}": value
        for result_type, of_type in scores.items()
        for name, value in of_type.items()
    }
    facts = {key: evaluation[key] for key in keys}
    _describe(metrics, {"run_dir": str(run_dir), **facts, **_mlflow(run_dir), **figures})
    rows = [
        [name, *(number(of_type.get(name), ".4f") for of_type in scores.values())]
        for name in dict.fromkeys(name for of_type in scores.values() for name in of_type)
    ]
    plots = run_dir / "plots"
    pictures = [
        plots / "precision_recall.png",
        plots / "f1_curves.png",
        plots / "confusion_matrix.png",
        plots / "before_after.jpg",
        *_pictures(plots / "predictions"),
    ]
    header = ["", *(TITLES[result_type] for result_type in scores)]
    _write_page(page, f"{evaluation['checkpoint']} on {evaluation['images']} images", header, rows, pictures)


def describe_predictions(page: Artifact, result: PredictResult) -> None:
    """Write a page of drawn images, with the number of objects in each."""
    rows = [[image["file"], str(len(image["detections"]))] for image in result.images]
    drawn = [result.output / image["drawing"] for image in result.images]
    _write_page(page, f"{len(result.images)} images", ["image", "objects"], rows, drawn)


def describe_benchmark(metrics: Artifact, result: BenchmarkResult) -> None:
    """Describe a benchmark by the figures that MLflow also gets."""
    measured = {name: module for name, (_, module) in MEASURES.items() if name in result.report}
    figures = {
        key: value for name, module in measured.items() for key, value in module.metrics(result.report[name]).items()
    }
    _describe(metrics, {"path": str(result.path), "commit": result.report["commit"], **figures})


def describe_registration(registered: Artifact, config: Config, result: RegisterResult | None) -> None:
    """Describe the outcome of a registration; the result is None if MLflow is off."""
    if result is None:
        _describe(registered, {"reason": "not registered: tracking.enabled is false"})
        return
    facts = {"reason": result.reason, "version": result.version, "is_champion": result.is_champion}
    _describe(registered, facts | {"name": config.registry.model_name, "model_uri": result.model_uri})


def describe_study(metrics: Artifact, page: Artifact, result: StabilityResult) -> None:
    """Describe a study: mean and standard deviation of AP over the seeds, and a page with table and plot."""
    rows, report = [], result.report
    for iou_type in IOU_TYPES:
        if score := report.get(iou_type, {}).get("AP"):
            values = (*score["values"], score["mean"], score["deviation"])
            rows.append([TITLES[iou_type], *(number(value, ".4f") for value in values)])
    _describe(
        metrics, {"output_dir": str(result.output_dir), "data_hash": report["data_hash"]} | summary_metrics(report)
    )
    header = ["final AP", *(f"seed {seed}" for seed in report["seeds"]), "mean", "standard deviation"]
    _write_page(
        page, f"stability over {len(report['seeds'])} seeds", header, rows, [result.output_dir / "stability.png"]
    )


def _describe(artifact: Artifact, facts: Mapping[str, Any], document: Mapping[str, Any] | None = None) -> None:
    """Set the metadata without unknown facts, and write a JSON document, by default of the same facts."""
    artifact.metadata.update({name: value for name, value in facts.items() if value is not None})
    Path(artifact.path).write_text(json.dumps(document or facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _mlflow(run_dir: Path) -> dict[str, str]:
    """MLflow run of a folder: id, server and link."""
    run = RunFile.read(run_dir / RUN_FILE)
    if not run.run_id:
        return {}
    link = {"mlflow_link": f"{run.uri}/#/runs/{run.run_id}"} if run.uri.startswith("http") else {}
    return {"mlflow_run_id": run.run_id, "mlflow_uri": run.uri, **link}


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in _MIME)


def _write_page(
    page: Artifact, title: str, header: list[str], rows: Iterable[list[str]], pictures: Iterable[Path]
) -> None:
    """Write a self-contained HTML file with a table and the first few pictures."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    shown = [path for path in pictures if path.is_file()][:_SHOWN_PICTURES]
    text = (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font-family:sans-serif}h1{font-size:1.3em;overflow-wrap:anywhere}"
        "td,th{padding:.2em .8em;text-align:right}img{max-width:100%}</style>"
        f"<h1>{html.escape(title)}</h1><table>{''.join(lines)}</table>{''.join(map(_image, shown))}\n"
    )
    Path(page.path).write_text(text, encoding="utf-8")


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.name)}" src="data:{_MIME[path.suffix]};base64,{data}"></p>'
