"""Detect and segment objects in images: `maskrcnn predict IMAGE_OR_FOLDER …`.

Folders are searched recursively, without hidden files. Writes a drawing of each image, and predictions.json, into
--output (default: ./predictions). Without images it uses some of the prepared val split, and writes into
<train.output_dir>/predictions. Until the end, predictions.part.jsonl has the predictions, a line per image. Boxes are
(x1, y1, x2, y2) and masks COCO run-length encodings; coordinates are in pixels of the EXIF-rotated image.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.cli import add_checkpoint, parse, path_argument, stage_parser, terminal, user_errors
from components.config import Config
from components.inference.images import described, find_images, input_path
from components.runs.result import final_checkpoint
from model.data.index import CocoIndex
from model.engine.pointers import require_checkpoint


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
    config: Config, inputs: Sequence[Path] = (), *, checkpoint: str | None = None, output: Path | None = None
) -> PredictResult:
    """Predict on images and folders, or by default on `predict.images` images of the val split.

    Files that cannot be read are skipped and listed in the result.

    Raises:
        UserError: if there is no checkpoint, a path does not exist, a folder has no image, a drawing would replace
            an input, another stage writes there, or without inputs no val split is prepared.
    """
    checkpoint = checkpoint or final_checkpoint(config.train.output_dir, config.train)
    require_checkpoint(config.train.output_dir, checkpoint)
    folder = output or (Path("predictions") if inputs else config.train.output_dir / "predictions")
    found = find_images(inputs, folder)
    if not inputs:
        CocoIndex.open(config.data.prepared_dir, "val")  # reported, if missing, before torch is loaded
    from components.inference.predictions import predict

    is_own = not inputs and output is None  # a folder given by the user may have other files
    result = PredictResult(folder, *predict(config, checkpoint, found.sources, folder, is_own=is_own))
    _print(result, described(found.passed_over))
    return result


def _print(result: PredictResult, passed_over: str) -> None:
    console = terminal()
    console.print(f"{result.objects} objects in {result.count} images: {result.output}", soft_wrap=True)
    if passed_over:
        console.print(f"passed over: {passed_over}", soft_wrap=True)
    for image in result.unreadable:
        console.print(f"cannot read {image['file']}: {image['reason']}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn predict`; exits with status 1 if an image could not be read."""
    parser = stage_parser(
        "predict", __doc__, operands="IMAGE_OR_FOLDER", operands_help="images, or folders searched recursively"
    )
    add_checkpoint(parser)
    parser.add_argument("--output", type=path_argument, help="folder for drawings and predictions.json (./predictions)")
    with user_errors():
        args, config = parse(parser, argv)
        result = run(
            config, [input_path(word) for word in args.operands], checkpoint=args.checkpoint, output=args.output
        )
    if result.unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
