"""Predictions on images: objects of each, drawings, and predictions.json."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from components.config import Config
from components.inference.entries import Entries, entries_in
from components.inference.images import Source
from components.runs.lock import writing
from components.runs.trained import Trained, load_trained, open_split, run_around
from components.tracking.tracker import open_tracker
from model.data.file_kinds import why_path_unreadable
from model.data.index import spread
from model.data.transforms import UNREADABLE, Pixels, read_image
from model.files import SlowFileError, replacing, within
from model.inference.predictor import Object, Predictor
from model.inference.visualize import draw_objects

Unreadable = list[dict[str, str]]  # {"file", "reason"}


def predict(
    config: Config, checkpoint: str, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[int, int, Unreadable]:
    """Predict on images, draw them, and write predictions.json.

    Args:
        config: configuration of the stage.
        checkpoint: `last`, `best` or a path.
        sources: images; if there are none, `predict.images` images of the val split are taken.
        folder: where drawings and predictions.json go.
        is_own: the folder is the run's: drawings of an earlier checkpoint are removed, and MLflow gets the new ones.

    Returns:
        Number of images with an entry, number of objects in them, and the files that could not be read.

    Raises:
        RunInUseError: if another stage writes into the folder, or into the run that it belongs to.
    """
    with writing(run_around(folder, config.train.output_dir), "predict"):
        return _predict_and_write(config, checkpoint, sources, folder, is_own=is_own)


def _predict_and_write(
    config: Config, checkpoint: str, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[int, int, Unreadable]:
    trained = load_trained(config, checkpoint)
    sources = sources or _val_images(trained, config.predict.images)
    if is_own:
        shutil.rmtree(folder, ignore_errors=True)
    unreadable: Unreadable = []
    folder.mkdir(parents=True, exist_ok=True)
    with entries_in(folder, trained.name, unreadable) as entries:
        _predict(trained, config, sources, folder, entries, unreadable)
    if is_own:
        with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
            tracker.log_artifact(folder, "predictions")
    return len(entries), entries.objects, unreadable


def _val_images(trained: Trained, count: int) -> list[Source]:
    index = open_split(trained, "val")
    return [
        Source(index.image_path(i), Path(f"{index.image_ids[i]}.jpg"), bool(index.apply_exif[i]))
        for i in spread(len(index), count)
    ]


def _predict(
    trained: Trained,
    config: Config,
    sources: Sequence[Source],
    folder: Path,
    entries: Entries,
    unreadable: Unreadable,
) -> None:
    """Draw the objects of each source and add its entry."""
    settings = config.predict
    predictor = Predictor.of(trained.loaded)

    def read(source: Source) -> Pixels:
        decode = partial(read_image, source.path, apply_exif=source.apply_exif, pixel_range=predictor.pixel_range)
        return within(trained.config.data.timeout_s, source.path, decode)

    images = _read(sources, unreadable, read)
    found = predictor.objects(images, batch_size=settings.batch_size, score_threshold=settings.score_threshold)
    for i, objects in found:
        entries.add(i, _describe(sources[i], read(sources[i]), objects, predictor.class_names, folder))


def _read(
    sources: Sequence[Source], unreadable: Unreadable, read: Callable[[Source], Pixels]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the index of each source with its decoded image."""
    for i, source in enumerate(track(sources, "predicting", transient=True)):
        try:
            yield i, read(source)
        except SlowFileError:  # the next files of this disk would each wait as long
            raise
        except UNREADABLE as error:
            unreadable.append({"file": _text(source.path), "reason": why_path_unreadable(source.path, error)})


def _describe(
    source: Source, pixels: Pixels, objects: list[Object], class_names: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Draw an image's objects; return its entry of predictions.json."""
    target = folder / source.drawing
    target.parent.mkdir(parents=True, exist_ok=True)
    drawing = draw_objects(pixels, objects, class_names)
    with replacing(target) as partial:
        drawing.save(partial, quality=92)
    return {
        "file": _text(source.path),
        "drawing": _text(source.drawing),
        "size": list(pixels.shape[:2]),
        "detections": objects,
    }


def _text(path: Path) -> str:
    """Path as JSON and terminals can hold it: bytes of a name that are not UTF-8 are written as `\\udcXX`."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
