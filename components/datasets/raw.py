"""Checks of what `maskrcnn prepare` reads and replaces, before minutes of work."""

from pathlib import Path

from model.config import DataConfig
from model.data.coco_json import AnnotationError
from model.data.layout import SPLITS, split_paths
from model.data.other_formats import names_below

REPORT = "report.json"  # in data.prepared_dir
PROBLEMS = "problems.csv"  # there too; after an error, <data.prepared_dir>.problems.csv
AUGMENTED = "augmented.png"  # and, with data.augment, there

_SHOWN = 8  # files that an error lists


def require_raw(data: DataConfig) -> None:
    """Refuse a data set without the annotation file or the image folder of a split.

    Raises:
        AnnotationError: if one of them does not exist.
    """
    for split in SPLITS:
        paths = split_paths(data, split)
        file, folder = data.raw_dir / paths.annotations, data.raw_dir / paths.images
        if not file.is_file():
            raise AnnotationError(_missing(data, f"{file}: no such annotation file", f"data.{split}_annotations"))
        if not folder.is_dir():
            raise AnnotationError(_missing(data, f"{folder}: no such image folder", f"data.{split}_images"))


def _missing(data: DataConfig, fault: str, key: str) -> str:
    """Complete an error about a missing path: how to get it, and what raw_dir has instead."""
    if data.source != "custom":
        return f"{fault}. Fetch it with `maskrcnn download`, or set {key}."
    remedy = f"{fault}; put it there, or set data.raw_dir ({data.raw_dir}) or {key}, relative to it"
    if not data.raw_dir.is_dir():
        return f"{remedy}. There is no folder {data.raw_dir}."
    present = sorted(path.name + "/" * path.is_dir() for path in data.raw_dir.iterdir())
    listed = ", ".join(present[:_SHOWN]) + (f", … ({len(present)} in all)" if len(present) > _SHOWN else "")
    return "\n".join(
        [
            f"{remedy}. The folder has {listed or 'nothing'}.",
            *(f"Found there: {name}." for name in names_below(data.raw_dir)),
        ]
    )


def require_replaceable(prepared_dir: Path) -> None:
    """Refuse to replace what `maskrcnn prepare` has not written.

    Raises:
        AnnotationError: if it is a file, or a folder with other files.
    """
    if prepared_dir.is_dir():
        is_ours, found = (prepared_dir / REPORT).is_file() or not any(prepared_dir.iterdir()), "has other files"
    else:
        is_ours, found = not prepared_dir.exists(), "is a file"
    if not is_ours:
        raise AnnotationError(
            f"{prepared_dir}: must be empty or written by `maskrcnn prepare`, but {found}; "
            "set data.prepared_dir to another folder."
        )
