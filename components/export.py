"""Export a trained network for programs without this package: one file per bucket in data.buckets.

--format onnx: standard ONNX operators (opset 18), for ONNX Runtime in any language, and for compilers.
--format torch (default): torch.export programs, which need torch and the operators' library (cuda_ops/_C.abi3.so).
--format aoti: the same, compiled for this kind of machine by AOTInductor; needs a C++ compiler.

Files compute in float32, whatever train.dtype was, and are checked against the network on images of evaluate.split.
Test-time scales, flips and soft-NMS are not included. The input is [N, 3, H, W] uint8 RGB and [N, 2] int32 (height,
width) of the images within it. export.json has the classes, the sizes for resizing images, and each file's largest
differences. docs/export.md has examples in Python and JavaScript.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.cli import add_checkpoint, parse, path_argument, stage_parser, terminal, user_errors
from components.config import Config
from components.runs.result import final_checkpoint, named_checkpoint, require_as_trained
from model.data.index import CocoIndex
from model.errors import UserError

PACKAGES: dict[str, tuple[str, ...]] = {  # format → packages beyond those of every installation
    "torch": (),
    "onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    "aoti": (),
}


@dataclass(frozen=True)
class ExportResult:
    """Result of an export."""

    folder: Path
    programs: list[dict[str, Any]]  # entries of export.json


def run(
    config: Config, *, checkpoint: str | None = None, output: Path | None = None, file_format: str = "torch"
) -> ExportResult:
    """Export a checkpoint into a folder.

    Args:
        checkpoint: `last`, `best` or a path; by default training's result.
        output: the folder; by default `<train.output_dir>/export`, in which other formats have a folder of their own.
        file_format: one of PACKAGES.

    Raises:
        ExportError: if the operators are not compiled for train.device, or a program disagrees with the network.
        UserError: if the checkpoint, prepared data with its classes, or a package or compiler of the format is missing.
    """
    checkpoint = checkpoint or final_checkpoint(config.train.output_dir, config.train)
    # Missing files and packages are reported before torch is loaded.
    named_checkpoint(config.train.output_dir, checkpoint)
    CocoIndex.open(config.data.prepared_dir, config.evaluate.split)
    require_tools(file_format)
    from components.inference.programs import export

    own = config.train.output_dir / "export"
    folder = output or (own if file_format == "torch" else own / file_format)
    return ExportResult(folder, export(config, checkpoint, folder, file_format))


def require_tools(file_format: str) -> None:
    """Raise a UserError if a package or the compiler that the format needs is not installed."""
    missing = [name for name in PACKAGES[file_format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"export: --format {file_format} needs the packages {', '.join(PACKAGES[file_format])}, of which "
            f"{', '.join(missing)} cannot be imported; install them: pip install 'maskrcnn-mlops[{file_format}]', or "
            f"pip install {' '.join(missing)}"
        )
    compiler = os.environ.get("CXX", "g++")  # torch chooses the same
    if file_format == "aoti" and shutil.which(compiler) is None:
        raise UserError(
            f"export: --format aoti needs a C++ compiler, got {compiler}, which is not on PATH; install g++ or clang, "
            "and set CXX if it has another name; or use --format torch or onnx, which need none"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn export`."""
    parser = stage_parser("export", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--format", choices=PACKAGES, default="torch", help="kind of files (%(default)s)")
    parser.add_argument(
        "--output", type=path_argument, help="folder for the files (<train.output_dir>/export, or export/FORMAT)"
    )
    with user_errors():
        args, config = parse(parser, argv)
        require_as_trained(config, args.checkpoint, args.overrides)
        result = run(config, checkpoint=args.checkpoint, output=args.output, file_format=args.format)
        console = terminal(soft_wrap=True)
        for program in result.programs:
            count, objects = program["checked_images"], program["checked_objects"]
            difference = max(program["largest_differences"].values(), default=0.0)
            agreement = (
                f"equal to the network within {difference:.2g} on {count} images with {objects} objects"
                if count
                else "not checked: no image has its size"
            )
            console.print(f"{result.folder / program['file']}: {agreement}")


if __name__ == "__main__":
    main()
