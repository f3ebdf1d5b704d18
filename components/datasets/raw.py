"""Presence of the raw data that `maskrcnn prepare` reads."""

from model.config import DataConfig
from model.data.annotations import AnnotationError, require_annotations
from model.data.layout import SPLITS, split_paths


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
