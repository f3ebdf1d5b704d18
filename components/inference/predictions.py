"""Predictions on images: objects of each, drawings, and predictions.json."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image
from rich.progress import track

from components.config import Config
from components.inference.entries import entries_in
from components.inference.images import Source
from components.inference.networks import Network, load_network
from components.inference.outputs import as_text, write_image
from components.runs.lock import writing
from components.runs.trained import Trained, open_split, run_around
from components.tracking.tracker import open_tracker
from model.data.file_kinds import why_path_unreadable
from model.data.index import spread
from model.data.transforms import DARKEST, UNREADABLE, Pixels, read_image
from model.files import SlowFileError, within
from model.inference.predictor import Predictor
from model.inference.tiles import Tiling, find_objects

Unreadable = list[dict[str, str]]  # {"file", "reason"}


def predict(
    config: Config, network: str, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[int, int, Unreadable]:
    """Predict on images, draw them, and write predictions.json.

    Args:
        config: configuration of the stage.
        network: see components/inference/networks.py.
        sources: images; if there are none, `predict.images` images of the val split are taken.
        folder: where drawings and predictions.json go.
        is_own: the folder is the run's: drawings of an earlier checkpoint are removed, and MLflow gets the new ones.

    Returns:
        Number of images with an entry, number of objects in them, and the files that could not be read.

    Raises:
        RunInUseError: if another stage writes into the folder, or into the run that it belongs to.
        UserError: if there is no such network, or it does not know a class of `predict.classes`.
    """
    with writing(run_around(folder, config.train.output_dir), "predict"):
        return _predict_and_write(config, load_network(config, network), sources, folder, is_own=is_own)


def _predict_and_write(
    config: Config, network: Network, sources: Sequence[Source], folder: Path, *, is_own: bool
) -> tuple[int, int, Unreadable]:
    settings, trained = config.predict, network.trained
    predictor = Predictor.of(trained.loaded, settings.dtype)
    lowest = network.lowest_scores(settings.score_threshold, settings.classes)
    cut = Tiling(settings.tile_px, settings.tile_overlap, settings.tile_whole)
    tiling = cut if settings.tile_px else None
    if caution := network.caution(settings.score_threshold, in_tiles=tiling is not None):
        print(f"warning: {caution}", file=sys.stderr)
    sources = sources or _val_images(trained, settings.images)

    def read(source: Source) -> Pixels:
        decode = partial(read_image, source.path, apply_exif=source.apply_exif, pixel_range=predictor.pixel_range)
        return within(trained.config.data.timeout_s, source.path, decode)

    if is_own:
        shutil.rmtree(folder, ignore_errors=True)
    unreadable: Unreadable = []
    dark: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with _large_images(tiling is not None), entries_in(folder, trained.name, unreadable) as entries:
        images = _read(sources, unreadable, read)
        for i, objects in find_objects(
            predictor,
            images,
            lowest,
            tiling=tiling,
            batch_size=settings.batch_size,
        ):
            pixels = read(sources[i])
            dark += [sources[i].path] if pixels.max() < DARKEST else []
            entries.add(i, write_image(sources[i], pixels, objects, predictor.class_names, folder, settings))
    if dark:
        print(_of_dark_images(dark, predictor.pixel_range), file=sys.stderr)
    if is_own:
        with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
            tracker.log_artifact(folder, "predictions")
    return len(entries), entries.objects, unreadable


def _of_dark_images(paths: Sequence[Path], pixel_range: Sequence[float]) -> str:
    chosen = f"[{pixel_range[0]:g}, {pixel_range[1]:g}]" if pixel_range else "none"
    return (
        f"warning: {len(paths)} images look black, such as {paths[0]}; images of more than 8 bits are read with the "
        f"training's data.pixel_range, {chosen}: give them its range of values, or convert them to 8 bits"
    )


@contextmanager
def _large_images(is_so: bool) -> Iterator[None]:
    """Raise Pillow's limit of 179 million pixels to 4 billion: tiles are for large images, which are no attack."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 2**31 if is_so else limit  # it refuses twice as many
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _val_images(trained: Trained, count: int) -> list[Source]:
    index = open_split(trained, "val")
    return [
        Source(index.image_path(i), Path(f"{index.image_ids[i]}.jpg"), bool(index.apply_exif[i]))
        for i in spread(len(index), count)
    ]


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
            unreadable.append({"file": as_text(source.path), "reason": why_path_unreadable(source.path, error)})
