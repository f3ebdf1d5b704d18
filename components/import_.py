"""Take over a data set of another tool: a new folder in the layout that `data.source=custom` reads.

    maskrcnn import yolo|voc|labelme|cvat|datumaro|png-masks SRC DST

SRC is the unpacked export; it is never changed. DST must not exist; it gets images_train, instances_train.json,
images_val and instances_val.json at once, or, after an error, nothing. A split of SRC is kept; else, or with
--val-fraction, a share of the images is val, which depends on file names and --seed alone. Images of SRC's test are
left out. What cannot be used is an error; with --on-invalid skip it is left out. Whatever is left out is counted, and
listed in DST/problems.csv.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli import path_argument, user_errors
from components.formats.options import ImportOptions, require_free
from model.errors import UserError
from model.files import real

if TYPE_CHECKING:
    from components.formats.coco_folder import ImportReport

FORMATS = {
    "yolo": "YOLO's text files with data.yaml, classes.txt or obj.names",
    "voc": "Pascal VOC's XML, and PNG masks in SegmentationObject",
    "labelme": "labelme's JSON files",
    "cvat": "CVAT's XML 1.1, for images or video",
    "datumaro": "Datumaro's JSON",
    "png-masks": "folders images and masks: PNG with the numbers of objects, or a PNG for each object",
}


def run(kind: str, src: Path, dst: Path, options: ImportOptions | None = None) -> "ImportReport":
    """Write the data set of `src`, in a format of FORMATS, to the new folder `dst`.

    Raises:
        UserError: if `src` is no such data set, `dst` exists, or with on_invalid=error a record cannot be used.
    """
    if not src.is_dir():
        found = "is a file; unpack an archive first, and name its folder" if src.exists() else "does not exist"
        raise UserError(f"{src}: must be the folder of a data set, but {found}")
    if real(dst).is_relative_to(real(src)):
        raise UserError(f"{dst}: must lie outside of {src}, which stays as it is")
    require_free(dst)
    from components.formats import cvat, datumaro, labelme, png_masks, voc, yolo
    from components.formats.coco_folder import take_over

    readers = {
        "yolo": yolo.read,
        "voc": voc.read,
        "labelme": labelme.read,
        "cvat": cvat.read,
        "datumaro": datumaro.read,
        "png-masks": png_masks.read,
    }
    return take_over(readers[kind], src, dst, options or ImportOptions())


def _summary(report: "ImportReport", dst: Path) -> Iterator[str]:
    """Lines of counts, of what was left out, and the commands that come next."""
    from model.data.findings import Severity, count_kinds

    yield f"{dst}: {len(report.class_names)} classes ({', '.join(report.class_names)}); {report.rule}"
    for part, counts in report.parts.items():
        boxes = f", {counts.boxes} of them boxes without masks" if counts.boxes else ""
        empty = f" ({counts.empty} of them without objects)" if counts.empty else ""
        yield f"{part}: {counts.images} images{empty}, {counts.objects} objects{boxes}"
    examples = {finding.kind: str(finding) for finding in reversed(report.findings)}
    words_of: dict[Severity, str] = {"error": "skipped", "repaired": "repaired", "warning": "warning"}
    for severity, word in words_of.items():
        for kind, count in count_kinds(report.findings, severity).items():
            yield f"{word}: {count} × {kind}, such as {examples[kind]}"
    if report.findings:
        yield f"{dst / 'problems.csv'} has all of them"
    all_boxes = sum(counts.boxes for counts in report.parts.values())
    words = ["maskrcnn", "recipe", "finetune_small", f"data.raw_dir={dst}"]
    if all_boxes:
        words += ["model.task=box", "data.augment.copy_paste=0"]
    if 0 < all_boxes < sum(counts.objects for counts in report.parts.values()):
        yield (
            "masks cannot be learned from boxes: the commands below train for boxes alone; for masks, import into "
            "another folder with --boxes skip or --boxes mask"
        )
    yield f"next:\n  {shlex.join(words)}\n  maskrcnn prepare"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn import`."""
    parser = argparse.ArgumentParser(
        prog="maskrcnn import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("kind", metavar="FORMAT", choices=FORMATS, help=formats)
    parser.add_argument("src", metavar="SRC", type=path_argument, help="folder of the data set")
    parser.add_argument("dst", metavar="DST", type=path_argument, help="folder to write, which must not exist")
    parser.add_argument(
        "--val-fraction", type=_fraction, help="share of the images that is val, in place of SRC's split"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of that split (%(default)s)")
    parser.add_argument(
        "--boxes",
        choices=("keep", "mask", "skip"),
        default="keep",
        help="a box without a mask stays one, becomes a rectangular mask, or is left out (%(default)s)",
    )
    parser.add_argument(
        "--on-invalid", choices=("error", "skip"), default="error", help="what cannot be used (%(default)s)"
    )
    parser.add_argument("--link", action="store_true", help="link the images (symbolic links) instead of copying them")
    args = parser.parse_args(argv)
    with user_errors():
        options = ImportOptions(args.val_fraction, args.seed, args.boxes, args.on_invalid, args.link)
        report = run(args.kind, args.src, args.dst, options)
        for line in _summary(report, args.dst):
            print(line)


def _fraction(word: str) -> float:
    with suppress(ValueError):
        if 0 < float(word) < 1:
            return float(word)
    raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1, got {word}")


if __name__ == "__main__":
    main()
