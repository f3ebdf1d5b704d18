"""Put the raw data into `data.raw_dir`: generate it, fetch COCO, or check your own folder.

`data.source=shapes` is generated. `coco2014` and `coco2017` are fetched from `data.base_url`, resumed after a cut,
checked and unpacked. For `custom`, the files are only checked. Completed work is not repeated.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.datasets.archives import Archive, fetch_archives, missing_archives, was_begun
from components.datasets.transfer import DownloadError
from model.config import DataConfig
from model.data.layout import SPLITS, split_paths
from model.data.synthetic import write_shapes

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


@dataclass(frozen=True)
class DownloadResult:
    """Location of the raw data, and if this call wrote any of it."""

    raw_dir: Path
    changed: bool


def run(config: Config) -> DownloadResult:
    """Make the data set of `config.data` available in `data.raw_dir`.

    Raises:
        DownloadError: if it cannot be fetched completely, the disk is too small, or a custom path does not exist.
        UserError: if raw_dir holds other data in place of the generated set.
    """
    data = config.data
    if data.source == "shapes":
        changed = write_shapes(data.shapes, data.raw_dir, data.workers)
    elif data.source == "custom":
        _require_custom(data)
        changed = False
    else:
        missing = missing_archives(_ARCHIVES[data.source], data.raw_dir)
        # Files unpacked here are checked by size, files from elsewhere by name.
        is_there = not was_begun(missing, data.raw_dir) and _is_unpacked(data)
        changed = bool(missing) and not is_there
        if changed:
            fetch_archives(missing, data.base_url, data.raw_dir)
    return DownloadResult(data.raw_dir, changed)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn download`."""
    with user_errors():
        _, config = parse(stage_parser("download", __doc__), argv)
        result = run(config)
        print(f"{result.raw_dir}: {'complete' if result.changed else 'already complete'}")


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


def _require_custom(data: DataConfig) -> None:
    for split in SPLITS:
        paths = split_paths(data, split)
        if not (data.raw_dir / paths.images).is_dir():
            raise DownloadError(
                f"{data.raw_dir / paths.images}: no such image folder; set data.{split}_images, relative to data.raw_dir"
            )
        if not (data.raw_dir / paths.annotations).is_file():
            raise DownloadError(
                f"{data.raw_dir / paths.annotations}: no such annotation file; set data.{split}_annotations, relative to data.raw_dir"
            )


if __name__ == "__main__":
    main()
