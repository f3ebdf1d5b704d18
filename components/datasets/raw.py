"""Checks of what `maskrcnn prepare` reads and replaces, before minutes of work."""

from pathlib import Path

from model.config import DataConfig
from model.data.annotations import AnnotationError, require_annotations
from model.data.layout import SPLITS, split_paths

REPORT = "report.json"  # in data.prepared_dir
PROBLEMS = "problems.csv"  # there too; after an error, <data.prepared_dir>.problems.csv


def require_raw(data: DataConfig) -> None:
    """Refuse a data set without the annotation file or the image folder of a split.

    Raises:
        AnnotationError: if one of them does not exist.
    """
    for split in SPLITS:
        paths = split_paths(data, split)
        require_annotations(data.raw_dir / paths.annotations)
        folder = data.raw_dir / paths.images
        if not folder.is_dir():
            raise AnnotationError(
                f"{folder}: no such image folder. Fetch it with `maskrcnn download`, or set data.{split}_images."
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
