"""The archives of COCO 2014 and 2017, fetched where they are not unpacked yet."""

import json

from components.datasets.archives import Archive, fetch_archives, missing_archives, was_begun
from model.config import DataConfig
from model.data.layout import SPLITS, split_paths

# MD5 of the files at images.cocodataset.org, and ratios of unpacked size to zip size.
_JPEGS, _JSON = 1.02, 4.0
_ARCHIVES = {
    "coco2014": (
        Archive("zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", _JPEGS),
        Archive("zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", _JPEGS),
        Archive("annotations/annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd", _JSON),
    ),
    "coco2017": (
        Archive("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", _JPEGS),
        Archive("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", _JPEGS),
        Archive("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", _JSON),
    ),
}


def fetch_coco(data: DataConfig) -> bool:
    """Fetch and unpack what is missing of `data.source`; return False if nothing is.

    Raises:
        DownloadError: if it cannot be fetched completely, or the disk is too small.
    """
    missing = missing_archives(_ARCHIVES[data.source], data.raw_dir)
    # Files unpacked here are checked by size, files from elsewhere by name.
    if not missing or (not was_begun(missing, data.raw_dir) and _is_unpacked(data)):
        return False
    fetch_archives(missing, data.base_url, data.raw_dir)
    return True


def _is_unpacked(data: DataConfig) -> bool:
    """True if COCO was put here by other means: both annotation files, and every image that they list."""
    for split in SPLITS:
        paths = split_paths(data, split)
        annotations, images = data.raw_dir / paths.annotations, data.raw_dir / paths.images
        if not annotations.is_file() or not images.is_dir():
            return False
        try:
            named = {record["file_name"] for record in json.loads(annotations.read_text(encoding="utf-8"))["images"]}
        except (ValueError, KeyError, TypeError):  # truncated, for example: it is fetched again
            return False
        if not named <= {path.name for path in images.iterdir()}:
            return False
    return True
