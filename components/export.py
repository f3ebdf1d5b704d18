"""Export a trained network for programs without this package: one torch.export program per bucket in data.buckets.

Programs compute in float32, whatever train.dtype was, and are checked against the network on images of evaluate.split.
Test-time scales, flips and soft-NMS are not included.
A program needs only torch and the operators' library:

    torch.ops.load_library(".../cuda_ops/_C.abi3.so")
    detect = torch.export.load("runs/shapes_demo/export/128x128.pt2").module()
    found = detect(images, image_sizes)  # [N, 3, 128, 128] uint8 RGB, [N, 2] int32 (height, width)

The result is a dictionary of tensors.

export.json has the classes, the sizes for resizing images, and each program's largest differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.cli import add_checkpoint, parse, path_argument, stage_parser, terminal, user_errors
from components.config import Config
from model.data.index import CocoIndex
from model.engine.pointers import require_checkpoint


@dataclass(frozen=True)
class ExportResult:
    """Result of an export."""

    folder: Path
    programs: list[dict[str, Any]]  # entries of export.json


def run(config: Config, *, checkpoint: str | None = None, output: Path | None = None) -> ExportResult:
    """Export a checkpoint into a folder.

    Args:
        checkpoint: `last`, `best` or a path; by default training's result.
        output: the folder; `<train.output_dir>/export` by default.

    Raises:
        ExportError: if the operators are not compiled for train.device, or a program disagrees with the network.
        UserError: if the checkpoint or prepared data with its classes is missing.
    """
    checkpoint = checkpoint or config.train.final_checkpoint
    # Missing files are reported before torch is loaded.
    require_checkpoint(config.train.output_dir, checkpoint)
    CocoIndex.open(config.data.prepared_dir, config.evaluate.split)
    from components.inference.programs import export

    folder = output or config.train.output_dir / "export"
    return ExportResult(folder, export(config, checkpoint, folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn export`."""
    parser = stage_parser("export", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--output", type=path_argument, help="folder for the programs (<train.output_dir>/export)")
    with user_errors():
        args, config = parse(parser, argv)
        result = run(config, checkpoint=args.checkpoint, output=args.output)
    console = terminal(soft_wrap=True)
    for program in result.programs:
        count, difference = program["checked_images"], max(program["largest_differences"].values(), default=0.0)
        agreement = (
            f"equal to the network within {difference:.2g} on {count} images"
            if count
            else "not checked: no image has its size"
        )
        console.print(f"{result.folder / program['file']}: {agreement}")


if __name__ == "__main__":
    main()
