"""Predictions on images: objects of each, drawings, and predictions.json."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.progress import track

from components.config import Config
from components.inference.images import Source
from components.runs.lock import writing
from components.runs.trained import Trained, load_trained, open_split
from components.tracking.tracker import open_tracker
from model.data.file_kinds import why_path_unreadable
from model.data.index import spread
from model.data.transforms import UNREADABLE, Pixels, read_image
from model.files import write_atomically
from model.inference.predictor import Object, Predictor
from model.inference.visualize import draw_objects

Entries = list[dict[str, Any]]  # entries of predictions.json
Unreadable = list[dict[str, str]]  # {"file", "reason"}


def predict(
    config: Config, checkpoint: str, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[Entries, Unreadable]:
    """Predict on images, draw them, and write predictions.json.

    Args:
        config: configuration of the stage.
        checkpoint: `last`, `best` or a path.
        sources: images; if there are none, `predict.images` images of the val split are taken.
        folder: where drawings and predictions.json go.
        is_own: the folder is the run's: drawings of an earlier checkpoint are removed, and MLflow gets the new ones.
    """
    with writing(config.train.output_dir, "predict") if is_own else nullcontext():
        return _predict_and_write(config, checkpoint, sources, folder, is_own=is_own)


def _predict_and_write(
    config: Config, checkpoint: str, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[Entries, Unreadable]:
    trained = load_trained(config, checkpoint)
    sources = sources or _val_images(trained, config.predict.images)
    if is_own:
        shutil.rmtree(folder, ignore_errors=True)
    unreadable: Unreadable = []
    entries = _predict(trained, config, sources, folder, unreadable)
    document = {"checkpoint": trained.name, "images": entries, "unreadable": unreadable}
    write_atomically(folder / "predictions.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if is_own:
        with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
            tracker.log_artifact(folder, "predictions")
    return entries, unreadable


def _val_images(trained: Trained, count: int) -> list[Source]:
    index = open_split(trained, "val")
    return [
        Source(index.image_path(i), Path(f"{index.image_ids[i]}.jpg"), bool(index.apply_exif[i]))
        for i in spread(len(index), count)
    ]


def _predict(
    trained: Trained, config: Config, sources: Sequence[Source], folder: Path, unreadable: Unreadable
) -> Entries:
    settings = config.predict
    folder.mkdir(parents=True, exist_ok=True)
    predictor = Predictor.of(trained.loaded)
    images = _read(sources, unreadable, predictor.pixel_range)
    found = predictor.objects(images, batch_size=settings.batch_size, score_threshold=settings.score_threshold)
    entries = {i: _describe(sources[i], objects, predictor, folder) for i, objects in found}
    return [entries[i] for i in sorted(entries)]


def _read(
    sources: Sequence[Source], unreadable: Unreadable, pixel_range: Sequence[float]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the index of each source with its decoded image."""
    for i, source in enumerate(track(sources, "predicting", transient=True)):
        try:
            yield i, read_image(source.path, apply_exif=source.apply_exif, pixel_range=pixel_range)
        except UNREADABLE as error:
            unreadable.append({"file": str(source.path), "reason": why_path_unreadable(source.path, error)})


def _describe(source: Source, objects: list[Object], predictor: Predictor, folder: Path) -> dict[str, Any]:
    """Draw an image's objects; return its entry of predictions.json."""
    target = folder / source.drawing
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = read_image(source.path, apply_exif=source.apply_exif, pixel_range=predictor.pixel_range)
    drawing = draw_objects(pixels, objects, predictor.class_names)
    drawing.save(target, quality=92)
    return {
        "file": str(source.path),
        "drawing": source.drawing.as_posix(),
        "size": list(pixels.shape[:2]),
        "detections": objects,
    }
