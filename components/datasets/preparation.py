"""Preparation of a data set: every record checked, the index and the clean annotations written."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from rich.progress import track

from components.datasets.raw import AUGMENTED, PROBLEMS, REPORT, require_replaceable
from components.datasets.report import SplitReport, draw_augmented, draw_report, split_report
from components.datasets.whole_set import check_whole_set
from model.config import AugmentConfig, DataConfig
from model.data.annotations import CocoFile, ImageRecord, read_coco
from model.data.coco_json import AnnotationError
from model.data.file_names import FileNames
from model.data.findings import Fault, Finding, count_kinds, write_findings
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.layout import SPLITS, Split, split_paths
from model.data.measure import EXIF_QUARTER_TURNS, ImageFacts, measure_image, measure_images
from model.data.origin import origin
from model.data.splitting import val_part
from model.data.transforms import UNREADABLE
from model.files import SlowFileError, require_file, within

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class CheckedSplit:
    """Usable records of a split, and the facts of each image by id."""

    coco: CocoFile
    facts: dict[int, ImageFacts]


def prepare(data: DataConfig, *, masks: bool = True) -> dict[str, SplitReport]:
    """Check a data set and replace `data.prepared_dir` as a whole; return the report of each split.

    Args:
        masks: each annotation needs a segmentation; else boxes suffice.

    Raises:
        AnnotationError: if the data cannot be used; it lists the first invalid records, and names a file with all.
    """
    origins = {split: origin(data, split) for split in SPLITS}  # before they are read: later changes are noticed
    files = {split: _read(data, split, masks=masks) for split in SPLITS}
    if data.val_fraction:  # findings of the file itself were made twice
        both = set(files["train"].findings)
        files["val"].findings[:] = [one for one in files["val"].findings if one not in both]
    _require_same_categories(files["train"], files["val"])
    _require_instances(data, files)  # before minutes of decoding
    checked = {split: _check_images(data, split, files[split]) for split in SPLITS}
    check_whole_set(data, files, {split: checked[split].facts for split in SPLITS})
    _require_usable(data, files)
    _require_instances(data, files)
    _warn_of_no_instances(files["val"])
    with _replacing(data.prepared_dir) as folder:
        reports: dict[str, SplitReport] = {}
        for split in SPLITS:
            reports[split] = _write_split(folder, data, split, checked[split], origins[split])
        text = json.dumps({split: asdict(report) for split, report in reports.items()}, indent=1, ensure_ascii=False)
        (folder / REPORT).write_text(text, encoding="utf-8")
        write_findings(folder / PROBLEMS, _all_findings(files))
        train = CocoIndex.open(folder, "train", data.timeout_s)
        draw_report(folder / "report.png", reports, train)
        if data.augment != AugmentConfig() and (train.has_masks or not data.augment.copy_paste):
            draw_augmented(folder / AUGMENTED, train, data)
    _refused(data).unlink(missing_ok=True)
    return reports


def _read(data: DataConfig, split: Split, *, masks: bool) -> CocoFile:
    paths = split_paths(data, split)
    folder = data.raw_dir / paths.images
    names = FileNames(folder)
    return read_coco(
        data.raw_dir / paths.annotations,
        {"train": data.train_limit, "val": data.val_limit}[split],
        chosen=lambda ids: _ids_of_split(data, split, ids),
        masks=masks,
        repairs=data.on_invalid == "mend",
        size_of=lambda file_name: _size_of(folder, names, data, file_name),
    )


def _ids_of_split(data: DataConfig, split: Split, ids: list[int]) -> list[int]:
    """The image ids of a split: all of its own file, or with data.val_fraction a part of the one file."""
    if not data.val_fraction:
        return ids
    where = str(data.raw_dir / split_paths(data, split).annotations)
    val = val_part([str(one) for one in ids], data.val_fraction, data.split_seed, where=where)
    return [one for one in ids if (str(one) in val) == (split == "val")]


def _size_of(folder: Path, names: FileNames, data: DataConfig, file_name: str) -> tuple[int, int] | None:
    """(height, width) of an image file as displayed, or with data.exif=ignore as stored; None if it cannot be read.

    Raises:
        Fault: if it cannot be read; the reason why.
        SlowFileError: if it cannot be read in time.
    """
    path = folder / file_name
    try:
        if not path.exists() and data.on_invalid == "mend" and (near := names.near(file_name)) and near.is_safe:
            path = folder / near.names[0]
        return within(data.timeout_s, path, partial(_displayed_size, path, data))
    except SlowFileError:
        raise
    except UNREADABLE:
        fault = measure_image(folder, names, data, ImageRecord(0, file_name, 1, 1))
        if isinstance(fault, Finding):
            raise Fault(fault.kind, fault.text) from None
        return None  # readable after all: it came meanwhile


def _displayed_size(path: Path, data: DataConfig) -> tuple[int, int]:
    require_file(path)
    with Image.open(path) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in EXIF_QUARTER_TURNS
        return image.size if is_turned and data.exif != "ignore" else image.size[::-1]


def _check_images(data: DataConfig, split: Split, coco: CocoFile) -> CheckedSplit:
    folder, records = data.raw_dir / split_paths(data, split).images, list(coco.images.values())
    facts: dict[int, ImageFacts] = {}
    results = measure_images(folder, records, data)
    for record, result in zip(records, track(results, f"checking {split}", total=len(records)), strict=True):
        where = f"{coco.path}: image {record.id}"
        if isinstance(result, Finding):
            coco.drop_image(record.id, replace(result, where=where))
        else:
            coco.findings += [replace(finding, where=where) for finding in result.findings]
            facts[record.id] = result
            coco.images[record.id] = replace(record, file_name=result.file_name)
    return CheckedSplit(coco, facts)


def _all_findings(files: dict[Split, CocoFile]) -> list[Finding]:
    return [finding for coco in files.values() for finding in coco.findings]


def _refused(data: DataConfig) -> Path:
    """Table of findings of a data set that was not prepared, beside prepared_dir, which keeps the last good one."""
    return data.prepared_dir.with_name(f"{data.prepared_dir.name}.{PROBLEMS}")


def _require_usable(data: DataConfig, files: dict[Split, CocoFile]) -> None:
    findings = _all_findings(files)
    errors = [finding for finding in findings if finding.severity == "error"]
    if data.on_invalid != "error" or not errors:
        return
    path = _refused(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_findings(path, findings)
    rest = len(errors) - _SHOWN_PROBLEMS
    lines = (
        [f"unusable records: {len(errors)}", *map(str, errors[:_SHOWN_PROBLEMS])]
        + ([f"… and {rest} more"] if rest > 0 else [])
        + [f"warning: {count} × {kind}" for kind, count in count_kinds(findings, "warning").items()]
        + [f"All are in {path}. Fix them, or drop and count them: set data.on_invalid=skip."]
    )
    raise AnnotationError("\n".join(lines))


def _require_instances(data: DataConfig, files: dict[Split, CocoFile]) -> None:
    train = files["train"]
    if train.num_instances:
        return
    _require_usable(data, files)
    dropped = count_kinds(train.findings, "error")
    remedy = "Repair them" if dropped else "Add annotations"
    more = f", or raise data.train_limit, which is {data.train_limit} (0 takes all images)" if data.train_limit else ""
    first = next((f"The first: {finding}. " for finding in train.findings if finding.severity == "error"), "")
    reasons = "".join(f", {count} records dropped ({kind})" for kind, count in dropped.items())
    raise AnnotationError(
        f"{train.path}: must have an instance that is not a crowd, got none in {len(train.images)} images{reasons}. "
        f"{first}{remedy}{more}."
    )


def _warn_of_no_instances(val: CocoFile) -> None:
    if not val.num_instances:
        text = f"none of {len(val.images)} images has an instance that is not a crowd; evaluation has nothing to find"
        val.findings.append(Finding("no instances", text, str(val.path), "warning"))


def _require_same_categories(train: CocoFile, val: CocoFile) -> None:
    if train.categories != val.categories:
        different = sorted(train.categories.items() ^ val.categories.items())
        raise AnnotationError(
            f"{val.path}: categories must be those of {train.path}; they differ in (id, name) "
            f"{different[:_SHOWN_PROBLEMS]}. "
            "Give both files the same `categories`."
        )


def _write_split(
    folder: Path, data: DataConfig, split: Split, checked: CheckedSplit, origin: dict[str, Any]
) -> SplitReport:
    coco = checked.coco
    text = json.dumps(_ground_truth(coco), ensure_ascii=False, allow_nan=False)
    (folder / f"{split}.json").write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode())
    for image_id in coco.images:
        digest.update(checked.facts[image_id].sha256.encode())
        digest.update(_decoding(data, checked.facts[image_id]))
    write_index(
        folder / split,
        [
            IndexedImage(record, checked.facts[i].apply_exif, coco.instances[i], str(i) in coco.annotated)
            for i, record in coco.images.items()
        ],
        categories=coco.categories,
        data_hash=digest.hexdigest(),
        origin=origin | images_location(data.raw_dir, split_paths(data, split).images, data.prepared_dir),
        pixel_range=data.pixel_range,
    )
    return split_report(coco, digest.hexdigest())


def _decoding(data: DataConfig, facts: ImageFacts) -> bytes:
    """Description of how an image is decoded; empty unless settings or other images decide it."""
    exif = "" if facts.apply_exif == (facts.rotation != "stored") else f"exif {facts.apply_exif}"
    return (exif + (str(data.pixel_range) if data.pixel_range and facts.values else "")).encode()


def _ground_truth(coco: CocoFile) -> dict[str, Any]:
    """Make COCO JSON of the usable records; sound annotations are unchanged, so scores equal those of the original."""
    return {
        "info": {},
        "licenses": [],
        "images": [asdict(record) for record in coco.images.values()],
        "annotations": [entry for i in coco.images for entry in coco.raw[i]],
        "categories": [{"id": category_id, "name": name} for category_id, name in coco.categories.items()],
    }


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `target` if the context ends without an error."""
    require_replaceable(target)  # again, since checking takes minutes
    fresh, stale = (target.with_name(f".{target.name}.{state}") for state in ("new", "old"))
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if target.exists():
            target.rename(stale)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(stale, ignore_errors=True)
