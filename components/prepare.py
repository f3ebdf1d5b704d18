"""Check a data set once, and write the index that training and evaluation read.

Every image is decoded and measured, every annotation checked. `data.prepared_dir` then has, for each split, the
memory-mapped index (`train/`, `val/`) and the clean annotations for evaluation (`train.json`, `val.json`), and a report
(`report.json`, `report.png`), and a table of every fault and warning (`problems.csv`). With data.augment,
`augmented.png` shows images as training will see them. Invalid records are an error; with `data.on_invalid=skip` they
are dropped and counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.datasets.raw import AUGMENTED, PROBLEMS, require_raw, require_replaceable

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

    result = PrepareResult(config.data.prepared_dir, prepare(config.data, masks=config.model.task == "mask"))
    for line in _summary(result):
        print(line)
    return result


def _summary(result: PrepareResult) -> Iterator[str]:
    """Lines of counts and warnings, and the paths of the files that show more."""
    for split, report in result.splits.items():
        dropped = [f"dropped {count} ({kind})" for kind, count in report.dropped.items()]
        empty = report.images_without_instances
        images = f"{report.images} images" + (f" ({empty} without instances)" if empty else "")
        counts = (images, f"{report.instances} instances", f"{report.crowds} crowds")
        yield f"{split}: {', '.join([*counts, *dropped])}"
        for what, kinds in (("repaired", report.repaired), ("warning", report.warnings)):
            for kind, count in kinds.items():
                yield f"{what}: {split}: {count} × {kind}, such as {report.examples[kind]}"
    for name in ("report.png", AUGMENTED):
        if (result.prepared_dir / name).is_file():
            yield str(result.prepared_dir / name)
    if any(report.examples for report in result.splits.values()):
        yield f"{result.prepared_dir / PROBLEMS} has every dropped and repaired record, and every warning"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn prepare`."""
    with user_errors():
        _, config = parse(stage_parser("prepare", __doc__), argv)
        run(config)


if __name__ == "__main__":
    main()
