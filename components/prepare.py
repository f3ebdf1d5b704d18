"""Check a data set once, and write the index that training and evaluation read.

Every image is decoded and measured, every annotation checked. `data.prepared_dir` then has, for each split, the
memory-mapped index (`train/`, `val/`) and the clean annotations for evaluation (`train.json`, `val.json`), and a report
(`report.json`, `report.png`). Invalid records are an error; with `data.on_invalid=skip` they are dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.datasets.raw import require_raw, require_replaceable

if TYPE_CHECKING:
    from components.datasets.report import SplitReport


@dataclass(frozen=True)
class PrepareResult:
    """Location and reports of the prepared splits."""

    prepared_dir: Path
    splits: "dict[str, SplitReport]"


def run(config: Config) -> PrepareResult:
    """Check the data of `config.data` and replace `data.prepared_dir` as a whole.

    Raises:
        AnnotationError: if the data cannot be used; it lists the first invalid records.
    """
    require_raw(config.data)
    require_replaceable(config.data.prepared_dir)
    from components.datasets.preparation import prepare

    return PrepareResult(config.data.prepared_dir, prepare(config.data))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn prepare`."""
    with user_errors():
        _, config = parse(stage_parser("prepare", __doc__), argv)
        result = run(config)
        for split, report in result.splits.items():
            dropped = "".join(f", dropped {count} ({kind})" for kind, count in report.dropped.items())
            print(f"{split}: {report.images} images, {report.instances} instances, {report.crowds} crowds{dropped}")
        print(result.prepared_dir / "report.png")


if __name__ == "__main__":
    main()
