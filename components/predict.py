"""Detect and segment objects in images: `maskrcnn predict IMAGE_OR_FOLDER …`.

Folders are searched recursively. Writes a drawing of each image, and predictions.json, into --output (default:
./predictions). Without images it uses some of the prepared val split, and writes into <train.output_dir>/predictions.
Boxes are (x1, y1, x2, y2) and masks COCO run-length encodings; coordinates are in pixels of the EXIF-rotated image.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.evaluation.plots import draw_objects, spread
from components.runs.trained import Trained, load_trained, open_split
from components.tracking.tracker import open_tracker
from model.data.transforms import UNREADABLE, Pixels, read_image
from model.errors import UserError
from model.files import write_atomically
from model.inference.predictor import Object, Predictor

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".jp2",
}  # files used in folders


@dataclass(frozen=True)
class Source:
    """One input image."""

    path: Path
    drawing: Path  # path of the drawing relative to the output folder
    apply_exif: bool = True


@dataclass(frozen=True)
class PredictResult:
    """Predictions, and the files that could not be read."""

    output: Path
    images: list[dict[str, Any]]  # entries of predictions.json
    unreadable: list[dict[str, str]] = field(default_factory=list)


def run(
    config: Config, inputs: Sequence[Path] = (), *, checkpoint: str = "last", output: Path | None = None
) -> PredictResult:
    """Predict on images and folders, or by default on `predict.images` images of the val split.

    Files that cannot be read are skipped and listed in the result.

    Raises:
        UserError: if a path does not exist, a folder has no image, or a drawing would replace an input.
    """
    trained = load_trained(config, checkpoint)
    folder = output or (Path("predictions") if inputs else config.train.output_dir / "predictions")
    sources = find_images(inputs, folder) if inputs else _val_images(trained, config.predict.images)
    if not inputs and output is None:  # a folder given by the user may have other files
        shutil.rmtree(folder, ignore_errors=True)  # drawings of an earlier checkpoint
    result = _predict(trained, config, sources, folder)
    document = {"checkpoint": trained.name, "images": result.images, "unreadable": result.unreadable}
    write_atomically(folder / "predictions.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if not inputs and output is None:
        with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False) as tracker:
            tracker.log_artifact(folder, "predictions")
    _print(result)
    return result


def find_images(inputs: Sequence[Path], output: Path) -> list[Source]:
    """List the given files and all images below given folders, in order; a drawing is named after its image.

    Raises:
        UserError: see `run`.
    """
    found: list[tuple[Path, Path]] = []  # file, and its path relative to the given folder
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: must be an image or a folder of images, but does not exist")
        if path.is_file():
            found.append((path, Path(path.name)))
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in SUFFIXES and not file.resolve().is_relative_to(output.resolve())
        ]
        if not inside:
            raise UserError(f"{path}: must hold images ({' '.join(sorted(SUFFIXES))}), but has none")
        found += [(file, file.relative_to(path)) for file in inside]
    sources = [Source(path, drawing) for (path, _), drawing in zip(found, _drawings(found), strict=True)]
    replaced = {path.resolve() for path, _ in found} & {(output / source.drawing).resolve() for source in sources}
    if replaced:
        raise UserError(f"--output {output}: drawings must not replace the images; set another folder")
    return sources


def _drawings(found: Sequence[tuple[Path, Path]]) -> Iterator[Path]:
    """Unique name of each drawing."""
    taken: set[Path] = set()
    for _, relative in found:
        suffix = relative.suffix.lower() if relative.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        name, number = relative.with_suffix(suffix), 1
        while name in taken:
            number += 1
            name = relative.with_name(f"{relative.stem}_{number}{suffix}")
        taken.add(name)
        yield name


def _val_images(trained: Trained, count: int) -> list[Source]:
    index = open_split(trained, "val")
    return [
        Source(index.image_path(i), Path(f"{index.image_ids[i]}.jpg"), bool(index.apply_exif[i]))
        for i in spread(len(index), count)
    ]


def _predict(trained: Trained, config: Config, sources: Sequence[Source], folder: Path) -> PredictResult:
    result = PredictResult(folder, [])
    images = _read(sources, result.unreadable)
    settings = config.predict
    folder.mkdir(parents=True, exist_ok=True)
    predictor = Predictor.of(trained.loaded)
    found = predictor.objects(images, batch_size=settings.batch_size, score_threshold=settings.score_threshold)
    entries = {i: _describe(sources[i], objects, predictor.class_names, folder) for i, objects in found}
    result.images.extend(entries[i] for i in sorted(entries))
    return result


def _read(sources: Sequence[Source], unreadable: list[dict[str, str]]) -> Iterator[tuple[int, Pixels]]:
    """Yield the index of each source with its decoded image."""
    for i, source in enumerate(track(sources, "predicting", transient=True)):
        try:
            yield i, read_image(source.path, apply_exif=source.apply_exif)
        except UNREADABLE as error:
            unreadable.append({"file": str(source.path), "reason": str(error)})


def _describe(source: Source, objects: list[Object], class_names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Draw an image's objects; return its entry of predictions.json."""
    target = folder / source.drawing
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = read_image(source.path, apply_exif=source.apply_exif)
    drawing = draw_objects(pixels, objects, class_names)
    drawing.save(target, quality=92)
    return {
        "file": str(source.path),
        "drawing": source.drawing.as_posix(),
        "size": list(pixels.shape[:2]),
        "detections": objects,
    }


def _print(result: PredictResult) -> None:
    objects = sum(len(image["detections"]) for image in result.images)
    console = Console()
    console.print(f"{objects} objects in {len(result.images)} images: {result.output}", highlight=False, soft_wrap=True)
    for image in result.unreadable:
        console.print(f"cannot read {image['file']}: {image['reason']}", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn predict`; exits with status 1 if an image could not be read."""
    parser = stage_parser("predict", __doc__, operands="IMAGE_OR_FOLDER", operands_help="images or folders to run on")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for drawings and predictions.json (./predictions)")
    with user_errors():
        args, config = parse(parser, argv)
        result = run(config, [Path(word) for word in args.operands], checkpoint=args.checkpoint, output=args.output)
    if result.unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
