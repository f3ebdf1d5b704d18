"""Put the raw data into `data.raw_dir`: generate it, fetch COCO, or check your own folder.

`data.source=shapes` is generated. `coco2014` and `coco2017` are fetched from `data.base_url`, resumed after a cut,
checked and unpacked. For `custom`, the files are only checked. Completed work is not repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from model.config import DataConfig
from model.data.layout import SPLITS, split_paths


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
    from components.datasets.shared import link_raw

    data = config.data
    link_raw(data)
    if data.source == "shapes":
        from model.data.synthetic import write_shapes

        changed = write_shapes(data.shapes, data.raw_dir, data.workers)
    elif data.source == "custom":
        _require_custom(data)
        changed = False
    else:
        from components.datasets.coco import fetch_coco

        changed = fetch_coco(data)
    return DownloadResult(data.raw_dir, changed)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn download`."""
    with user_errors():
        _, config = parse(stage_parser("download", __doc__), argv)
        result = run(config)
        print(f"{result.raw_dir}: {'complete' if result.changed else 'already complete'}")


def _require_custom(data: DataConfig) -> None:
    from components.datasets.transfer import DownloadError

    for split in SPLITS:
        paths = split_paths(data, split)
        if not (data.raw_dir / paths.images).is_dir():
            raise DownloadError(
                f"{data.raw_dir / paths.images}: no such image folder; set data.{split}_images, relative to "
                "data.raw_dir"
            )
        if not (data.raw_dir / paths.annotations).is_file():
            raise DownloadError(
                f"{data.raw_dir / paths.annotations}: no such annotation file; set data.{split}_annotations, relative "
                "to data.raw_dir"
            )


if __name__ == "__main__":
    main()
