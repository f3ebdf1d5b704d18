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
    entries: dict[int, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for i, entry in _predict(trained, config, sources, folder, unreadable):
            entries[i] = entry
    finally:  # also of the images before an error or an interrupt
        in_order = [entries[i] for i in sorted(entries)]
        document = {"checkpoint": trained.name, "images": in_order, "unreadable": unreadable}
        write_atomically(folder / "predictions.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if is_own:
        with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
            tracker.log_artifact(folder, "predictions")
    return in_order, unreadable


def _val_images(trained: Trained, count: int) -> list[Source]:
    index = open_split(trained, "val")
    return [
        Source(index.image_path(i), Path(f"{index.image_ids[i]}.jpg"), bool(index.apply_exif[i]))
        for i in spread(len(index), count)
    ]


def _predict(
    trained: Trained, config: Config, sources: Sequence[Source], folder: Path, unreadable: Unreadable
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Draw the objects of each source; yield its index and its entry of predictions.json."""
    settings = config.predict
    predictor = Predictor.of(trained.loaded)
    images = _read(sources, unreadable, predictor.pixel_range)
    found = predictor.objects(images, batch_size=settings.batch_size, score_threshold=settings.score_threshold)
    for i, objects in found:
        yield i, _describe(sources[i], objects, predictor, folder)


def _read(
    sources: Sequence[Source], unreadable: Unreadable, pixel_range: Sequence[float]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the index of each source with its decoded image."""
    for i, source in enumerate(track(sources, "predicting", transient=True)):
        try:
            yield i, read_image(source.path, apply_exif=source.apply_exif, pixel_range=pixel_range)
        except UNREADABLE as error:
            unreadable.append({"file": _text(source.path), "reason": why_path_unreadable(source.path, error)})


def _describe(source: Source, objects: list[Object], predictor: Predictor, folder: Path) -> dict[str, Any]:
    """Draw an image's objects; return its entry of predictions.json."""
    target = folder / source.drawing
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = read_image(source.path, apply_exif=source.apply_exif, pixel_range=predictor.pixel_range)
    drawing = draw_objects(pixels, objects, predictor.class_names)
    drawing.save(target, quality=92)
    return {
        "file": _text(source.path),
        "drawing": _text(source.drawing),
        "size": list(pixels.shape[:2]),
        "detections": objects,
    }


def _text(path: Path) -> str:
    """Path as JSON and terminals can hold it: bytes of a name that are not UTF-8 are written as `\\udcXX`."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
