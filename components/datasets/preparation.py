"""Preparation of a data set: every record checked, the index and the clean annotations written."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask
from rich.progress import track

from components.datasets.raw import PROBLEMS, REPORT, require_replaceable
from components.datasets.report import SplitReport, draw_report, split_report
from model.config import DataConfig
from model.data.annotations import AnnotationError, CocoFile, ImageRecord, read_coco
from model.data.findings import Finding, write_findings
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.data.layout import SPLITS, Split, split_paths
from model.data.measure import ImageFacts, measure_images

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class CheckedSplit:
    """Usable records of a split, and the facts of each image by id."""

    coco: CocoFile
    facts: dict[int, ImageFacts]


def prepare(data: DataConfig) -> dict[str, SplitReport]:
    """Check a data set and replace `data.prepared_dir` as a whole; return the report of each split.

    Raises:
        AnnotationError: if the data cannot be used; it lists the first invalid records, and names a file with all.
    """
    checked = {split: _check_split(data, split) for split in SPLITS}
    findings = [finding for split in checked.values() for finding in split.coco.findings]
    refused = data.prepared_dir.with_name(f"{data.prepared_dir.name}.{PROBLEMS}")
    if data.on_invalid == "error" and any(finding.severity == "error" for finding in findings):
        refused.parent.mkdir(parents=True, exist_ok=True)
        write_findings(refused, findings)
        raise AnnotationError(_list_errors(findings, refused))
    _require_same_categories(checked["train"].coco, checked["val"].coco)
    with _replacing(data.prepared_dir) as folder:
        reports: dict[str, SplitReport] = {}
        for split in SPLITS:
            reports[split] = _write_split(folder, data, split, checked[split])
        text = json.dumps({split: asdict(report) for split, report in reports.items()}, indent=1, ensure_ascii=False)
        (folder / REPORT).write_text(text, encoding="utf-8")
        write_findings(folder / PROBLEMS, findings)
        draw_report(folder / "report.png", reports, CocoIndex.open(folder, "train"))
    refused.unlink(missing_ok=True)
    return reports


def _check_split(data: DataConfig, split: Split) -> CheckedSplit:
    paths = split_paths(data, split)
    coco = read_coco(data.raw_dir / paths.annotations, {"train": data.train_limit, "val": data.val_limit}[split])
    folder, records = data.raw_dir / paths.images, list(coco.images.values())
    facts: dict[int, ImageFacts] = {}
    results = measure_images(folder, records, threads=max(data.workers, 1))
    for record, result in zip(records, track(results, f"checking {split}", total=len(records)), strict=True):
        where = f"{coco.path}: image {record.id}"
        if isinstance(result, Finding):
            coco.drop_image(record.id, replace(result, where=where))
        else:
            coco.findings += [replace(finding, where=where) for finding in result.findings]
            facts[record.id] = result
    return CheckedSplit(coco, facts)


def _list_errors(findings: list[Finding], path: Path) -> str:
    errors = [finding for finding in findings if finding.severity == "error"]
    rest = len(errors) - _SHOWN_PROBLEMS
    return "\n".join(
        [f"unusable records: {len(errors)}", *map(str, errors[:_SHOWN_PROBLEMS])]
        + ([f"… and {rest} more"] if rest > 0 else [])
        + [f"All are in {path}. Fix them, or drop and count them with data.on_invalid=skip."]
    )


def _require_same_categories(train: CocoFile, val: CocoFile) -> None:
    if train.categories != val.categories:
        different = sorted(train.categories.items() ^ val.categories.items())
        raise AnnotationError(
            f"{val.path}: categories must be those of {train.path}; they differ in (id, name) "
            f"{different[:_SHOWN_PROBLEMS]}. "
            "Give both files the same `categories`."
        )


def _write_split(folder: Path, data: DataConfig, split: Split, checked: CheckedSplit) -> SplitReport:
    coco = checked.coco
    text = json.dumps(_ground_truth(coco), ensure_ascii=False)
    (folder / f"{split}.json").write_text(text, encoding="utf-8")
    digest = hashlib.sha256(text.encode())
    for image_id in coco.images:
        digest.update(checked.facts[image_id].sha256.encode())
    write_index(
        folder / split,
        [
            IndexedImage(record, checked.facts[i].apply_exif, coco.instances[i], str(i) in coco.annotated)
            for i, record in coco.images.items()
        ],
        categories=coco.categories,
        data_hash=digest.hexdigest(),
        location=images_location(data.raw_dir, split_paths(data, split).images, data.prepared_dir),
    )
    return split_report(coco, digest.hexdigest())


def _ground_truth(coco: CocoFile) -> dict[str, Any]:
    """Make COCO JSON of the usable records; annotations are unchanged, so scores equal those of the original file."""
    return {
        "info": {},
        "licenses": [],
        "images": [asdict(record) for record in coco.images.values()],
        "annotations": [_complete(entry, record) for i, record in coco.images.items() for entry in coco.raw[i]],
        "categories": [{"id": category_id, "name": name} for category_id, name in coco.categories.items()],
    }


def _complete(entry: dict[str, Any], image: ImageRecord) -> dict[str, Any]:
    """Select the keys that evaluation reads; by default iscrowd is 0 and area that of the mask."""
    keys = ("id", "image_id", "category_id", "bbox", "segmentation")
    area = entry["area"] if isinstance(entry.get("area"), (int, float)) else _mask_area(entry["segmentation"], image)
    return {key: entry[key] for key in keys} | {"area": area, "iscrowd": entry.get("iscrowd", 0)}


def _mask_area(segmentation: Any, image: ImageRecord) -> int:
    packed = isinstance(segmentation, dict) and isinstance(segmentation["counts"], str)
    rle = segmentation if packed else coco_mask.frPyObjects(segmentation, image.height, image.width)
    return int(coco_mask.area(coco_mask.merge(rle) if isinstance(rle, list) else rle))


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
