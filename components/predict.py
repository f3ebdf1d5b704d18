"""Detect and segment objects in images: `maskrcnn predict IMAGE_OR_FOLDER …`.

    maskrcnn predict photo.jpg --weights coco_v2              no training, no parameter file: COCO's 80 classes
    maskrcnn predict photos --weights runs/bolts --classes bolt,nut --threshold best
    maskrcnn predict aerial.tif --weights models:/maskrcnn@champion --tile 1024 --masks png --crop

Folders are searched recursively, without hidden files. Writes a drawing of each image, and predictions.json, into
--output (default: ./predictions). Without images it uses some of the prepared val split, and writes into
<train.output_dir>/predictions. Until the end, predictions.part.jsonl has the predictions, a line per image. Boxes are
(x1, y1, x2, y2) and masks COCO run-length encodings; coordinates are in pixels of the EXIF-rotated image.

--weights: coco or coco_v2 (torchvision's), the weights of a detector, a checkpoint, a run's folder, or MLflow's
models:/NAME@ALIAS. With it, params.yaml is read only if --params names it; with the path of a checkpoint, it may be
absent.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.cli import (
    DEFAULT_PARAMS,
    add_checkpoint,
    parse_words,
    path_argument,
    read_config,
    set_waiting,
    stage_parser,
    terminal,
    user_errors,
)
from components.config import Config, PredictConfig
from components.inference.images import described, find_images, input_path
from components.inference.networks import require_network
from components.runs.result import final_checkpoint, named_checkpoint, overrides_of_training, require_as_trained
from model.data.index import CocoIndex
from model.engine.pointers import POINTERS
from model.errors import UserError

# Option → key of `predict`, and its meaning.
_SETTINGS = {
    "threshold": ("score_threshold", "lowest score of an object, or best: each class's own, as `evaluate` found it"),
    "classes": ("classes", "only objects of these classes, such as person,dog; names with commas in quotes"),
    "masks": ("masks", "masks in predictions.json: rle, polygons, or png for a file each"),
    "crop": ("crop", "write each object's part of the image, too"),
    "tile": ("tile_px", "side of tiles in px, in which large images are predicted, too"),
    "tiles-only": ("tile_whole", "with --tile, do not predict the whole image, too"),
    "overlap": ("tile_overlap", "part of a tile's side that it shares with the next"),
    "dtype": ("dtype", "precision of the network, as train.dtype; bfloat16 is fast on processors that have it"),
}


@dataclass(frozen=True)
class PredictResult:
    """Predictions, and the files that could not be read."""

    output: Path
    count: int  # images with predictions
    objects: int
    unreadable: list[dict[str, str]] = field(default_factory=list)

    @property
    def images(self) -> list[dict[str, Any]]:
        """Entries of predictions.json, read from there."""
        return json.loads((self.output / "predictions.json").read_text(encoding="utf-8"))["images"]


def run(
    config: Config,
    inputs: Sequence[Path] = (),
    *,
    checkpoint: str | None = None,
    weights: str | None = None,
    output: Path | None = None,
) -> PredictResult:
    """Predict on images and folders, or by default on `predict.images` images of the val split.

    Files that cannot be read are skipped and listed in the result.

    Args:
        checkpoint: last, best or a path; by default the result of `train.output_dir`.
        weights: in place of a checkpoint, see components/inference/networks.py; needs inputs.

    Raises:
        UserError: if there is no checkpoint, a path does not exist, a folder has no image, a drawing would replace
            an input, another stage writes there, or without inputs no val split is prepared.
    """
    network = weights or checkpoint or final_checkpoint(config.train.output_dir, config.train)
    if weights is None:
        named_checkpoint(config.train.output_dir, network)
    else:
        require_network(weights)
        if not inputs:
            raise UserError("--weights: must be used with images, got none; name images or folders")
    folder = output or (Path("predictions") if inputs else config.train.output_dir / "predictions")
    found = find_images(inputs, folder)
    if not inputs:
        CocoIndex.open(config.data.prepared_dir, "val")  # reported, if missing, before torch is loaded
    from components.inference.predictions import predict

    is_own = not inputs and output is None  # a folder given by the user may have other files
    result = PredictResult(folder, *predict(config, network, found.sources, folder, is_own=is_own))
    _print(result, described(found.passed_over), config.predict.score_threshold)
    return result


def _print(result: PredictResult, passed_over: str, threshold: float | Literal["best"]) -> None:
    console = terminal()
    least = "their class's best threshold" if threshold == "best" else f"{threshold:g}"
    found = f"{result.objects} objects with a score of {least} or more"
    images = "1 image" if result.count == 1 else f"{result.count} images"
    console.print(f"{found} in {images}: {result.output}", soft_wrap=True)
    if passed_over:
        console.print(f"passed over: {passed_over}", soft_wrap=True)
    for image in result.unreadable:
        console.print(f"cannot read {image['file']}: {image['reason']}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn predict`; exits with status 1 if an image could not be read."""
    parser = stage_parser(
        "predict", __doc__, operands="IMAGE_OR_FOLDER", operands_help="images, or folders searched recursively"
    )
    network = parser.add_mutually_exclusive_group()
    add_checkpoint(network)
    network.add_argument("--weights", help="the network, if not of train.output_dir; see above")
    parser.add_argument("--output", type=path_argument, help="folder for drawings and predictions.json (./predictions)")
    _add_settings(parser)
    with user_errors():
        args = parse_words(parser, argv)
        config = _config(args)
        set_waiting("OMP_WAIT_POLICY", "passive")  # gains nothing measurable by spinning
        if args.weights is None:
            require_as_trained(config, args.checkpoint, args.overrides)
        elif decided := overrides_of_training(args.overrides):
            raise UserError(f"override {decided[0]!r}: must be left out with --weights, whose network decides it")
        inputs = [input_path(word) for word in args.operands]
        result = run(config, inputs, checkpoint=args.checkpoint, weights=args.weights, output=args.output)
    if result.unreadable:
        sys.exit(1)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Options that are short for overrides of `predict.*`."""
    for option, (key, text) in _SETTINGS.items():
        default = PredictConfig.model_fields[key].default
        shown = f"predict.{key}" if default in ((), False, True) else f"predict.{key}, {default}"
        is_flag = isinstance(default, bool)
        constant = {"action": "store_const", "const": str(not default).lower()}
        kind: dict[str, Any] = constant if is_flag else {"metavar": "VALUE"}
        parser.add_argument(f"--{option}", dest=key, help=f"{text} ({shown})", **kind)


def _given(args: argparse.Namespace) -> dict[str, str]:
    """The overrides that options of the command line stand for, each with the option as it was written."""
    overrides = {}
    for option, (key, _) in _SETTINGS.items():
        if (value := getattr(args, key)) is not None:
            default = PredictConfig.model_fields[key].default
            written = f"--{option}" if isinstance(default, bool) else f"--{option} {value}"
            if key == "classes":  # a line of CSV: a name may have commas within quotes
                names = next(csv.reader([value], skipinitialspace=True), [""])
                value = json.dumps([name.strip() for name in names], ensure_ascii=False)
            overrides[f"predict.{key}={value}"] = written
    return overrides


def _config(args: argparse.Namespace) -> Config:
    """The configuration of the parameter file, or the defaults where there is none and none is needed."""
    given = _given(args)
    overrides = [*args.overrides, *given]
    needs_file = args.weights is None and (args.checkpoint in (None, *POINTERS) or args.params.exists())
    if needs_file and args.params == DEFAULT_PARAMS and not args.params.exists():
        raise UserError(
            f"{args.params}: no such parameter file, which says where the run is; name a network with --weights (coco "
            "needs no run), or write a parameter file by `maskrcnn recipe shapes_demo`"
        )
    try:
        config = read_config(args, overrides, needs_file=needs_file)
    except UserError as error:
        text = str(error)
        for override, option in given.items():
            text = text.replace(f"override {override!r}", option)
        raise UserError(text) from error
    if not config.predict.tile_px and (args.tile_whole or args.tile_overlap):
        raise UserError(
            "--overlap and --tiles-only: must be used with --tile, such as --tile 1024, but there are no tiles"
        )
    return config


if __name__ == "__main__":
    main()
