"""The folder that `data.source=custom` reads, written from the images and objects of another tool.

images_train/  instances_train.json
images_val/    instances_val.json
problems.csv   what was left out, and why, where something was
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.progress import track

from components.formats.options import ImportOptions, require_free
from components.formats.records import LabelledImage, LabelledSet, Part, annotations_of
from model.data.findings import Finding, Findings, count_kinds, described, write_findings
from model.data.layout import SPLITS, Split
from model.data.splitting import val_part
from model.data.values import CONTROL, is_text
from model.errors import UserError
from model.files import real

DEFAULT_FRACTION = 0.2
_SHOWN = 10


@dataclass(frozen=True)
class PartReport:
    """Contents of a written split."""

    images: int
    objects: int
    boxes: int  # objects without a mask
    empty: int  # images without objects


@dataclass(frozen=True)
class ImportReport:
    """Contents of the written folder, and how it came about."""

    parts: dict[Split, PartReport]
    class_names: list[str]
    rule: str  # for the split, in words
    findings: list[Finding]


def take_over(
    read: Callable[[Path, Findings], LabelledSet], src: Path, dst: Path, options: ImportOptions
) -> ImportReport:
    """Read a folder of another tool, and write `dst` at once, or not at all.

    Raises:
        UserError: if there is nothing to take over, or with on_invalid=error something cannot be used.
    """
    findings = Findings(repairs=True)
    source = read(src, findings)
    names = _class_names(source, src, findings)
    images = _once(sorted(source.images, key=lambda image: str(image.path)), findings)
    # An image may be in train and in val: what is wrong with it is reported once.
    once = {real(image.path): image for image in images}
    of_path = {path: list(annotations_of(image, options.boxes, findings)) for path, image in once.items()}
    objects = {id(image): of_path[real(image.path)] for image in images}
    _require_usable(findings, src, options)
    if not images:
        raise UserError(f"{src}: must have labelled images, has none{_reason(findings)}")
    names_in_src = (os.path.relpath(image.path, src) for image in images)
    if bad := next((name for name in names_in_src if not is_text(name)), None):
        raise UserError(f"{src}: the name of an image must be UTF-8, got {bad!r}; rename it in a copy of the folder")
    parts, rule = _split(images, src, options, findings)
    _require_usable(findings, src, options)
    if not names or not any(objects[id(image)] for image in parts["train"]):
        raise UserError(
            f"{src}: must have an object in train, has none in {len(parts['train'])} images{_reason(findings)}"
        )
    files = _file_names([image for part in SPLITS for image in parts[part]], src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as temporary:
        folder = Path(temporary, "set")
        folder.mkdir()
        trees = _trees(parts, objects, files, names)
        reports = {}
        for part in SPLITS:
            target = folder / f"images_{part}"
            target.mkdir()
            for image in track(parts[part], f"{'linking' if options.link else 'copying'} {part}"):
                _put(image, target / files[id(image)], link=options.link)
            tree = {"info": {"description": f"maskrcnn import; {rule}"}, "licenses": [], **trees[part]}
            text = json.dumps(tree, ensure_ascii=False, allow_nan=False)
            (folder / f"instances_{part}.json").write_text(text, encoding="utf-8")
            boxes = sum("segmentation" not in one for one in tree["annotations"])
            empty = sum(not objects[id(image)] for image in parts[part])
            reports[part] = PartReport(len(parts[part]), len(tree["annotations"]), boxes, empty)
        if findings.all:
            write_findings(folder / "problems.csv", findings.all)
        require_free(dst)  # again, since copying takes minutes
        folder.rename(dst)
    return ImportReport(reports, names, rule, findings.all)


def _class_names(source: LabelledSet, src: Path, findings: Findings) -> list[str]:
    """The names of the source, each once."""
    for name in source.class_names:
        if not is_text(name) or re.search(CONTROL, name):
            raise UserError(
                f"{src}: a class must have a name of one line without control characters, got {name!r}; correct it in "
                "a copy of the folder"
            )
    names = list(dict.fromkeys(source.class_names))
    for name in names:
        if (times := source.class_names.count(name)) > 1:
            findings.where = str(src)
            findings.warn("class name twice", f"{times} classes are called {name!r}; they become one")
    return names


def _once(images: list[LabelledImage], findings: Findings) -> list[LabelledImage]:
    """The images, each once in a part; other labels of the same file are a fault."""
    found: dict[Path, LabelledImage] = {}
    kept: dict[tuple[Path, Part], LabelledImage] = {}
    for image in images:
        path = real(image.path)
        first = found.setdefault(path, image)
        if first.source != image.source:
            text = f"it labels {image.path}, which {first.source} labels, too; an image must have one file of labels"
            findings.all.append(Finding("image labelled twice", text, str(image.source)))
        else:
            kept.setdefault((path, image.part), image)
    return list(kept.values())


def _split(
    images: list[LabelledImage], src: Path, options: ImportOptions, findings: Findings
) -> tuple[dict[Split, list[LabelledImage]], str]:
    """The images of each part, and the rule in words; an image, or an equal file, is in one part only."""
    usable = [image for image in images if image.part != "test"]
    equal = _equal_files(usable, src)
    if options.val_fraction is None and {"train", "val"} <= {image.part for image in usable}:
        parts = _own_parts(usable, equal, findings)
        rule = "the split is that of the source"
    else:
        fraction = DEFAULT_FRACTION if options.val_fraction is None else options.val_fraction
        usable = list({real(image.path): image for image in usable}.values())  # one may be in train and in val
        val = val_part({*equal.values()}, fraction, options.seed, where=str(src))
        parts = {
            "train": [image for image in usable if equal[id(image)] not in val],
            "val": [image for image in usable if equal[id(image)] in val],
        }
        rule = f"{fraction:g} of the images are val, by file names and seed {options.seed}"
    if left_out := sum(image.part == "test" for image in images):
        rule += f"; {left_out} images of test are left out"
    return parts, rule


def _own_parts(
    images: list[LabelledImage], equal: dict[int, str], findings: Findings
) -> dict[Split, list[LabelledImage]]:
    """The parts of the source; train without what is in val, too."""
    of_val = {equal[id(image)] for image in images if image.part == "val"}
    parts: dict[Split, list[LabelledImage]] = {"train": [], "val": []}
    for image in images:
        findings.where = str(image.path)
        if image.part == "val":
            parts["val"].append(image)
        elif image.part != "train":
            findings.warn("image in no part", "it belongs to neither train nor val; it is left out")
        elif equal[id(image)] in of_val:
            text = "it is in train and in val, or an equal file is; --val-fraction 0.2 splits the images anew"
            findings.all.append(Finding("image in both parts", text, findings.where))
        else:
            parts["train"].append(image)
    return parts


def _equal_files(images: list[LabelledImage], src: Path) -> dict[int, str]:
    """For each image, by its id(), the path within the source of the first one whose file is equal."""
    by_size: dict[int, list[LabelledImage]] = defaultdict(list)
    for image in images:
        by_size[len(image.content) if image.content is not None else image.path.stat().st_size].append(image)
    first: dict[tuple[int, str], str] = {}
    found: dict[int, str] = {}
    for size, same in by_size.items():
        for image in same:
            key = (size, _digest(image) if len(same) > 1 else "")
            found[id(image)] = first.setdefault(key, Path(os.path.relpath(image.path, src)).as_posix())
    return found


def _digest(image: LabelledImage) -> str:
    if image.content is not None:
        return hashlib.sha256(image.content).hexdigest()
    with image.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_usable(findings: Findings, src: Path, options: ImportOptions) -> None:
    errors = [finding for finding in findings.all if finding.severity == "error"]
    if not errors or options.on_invalid == "skip":
        return
    lines = [f"{src}: unusable records: {len(errors)}", *described(errors, _SHOWN)]
    raise UserError("\n".join([*lines, "Correct them, or leave them out and count them with --on-invalid skip."]))


def _reason(findings: Findings) -> str:
    kinds = count_kinds(findings.all, "error") | count_kinds(findings.all, "warning")
    first = f"; the first: {findings.all[0]}" if findings.all else ""
    return "".join(f", {number} × {kind}" for kind, number in kinds.items()) + first


def _file_names(images: list[LabelledImage], src: Path) -> dict[int, str]:
    """File names in the new folders, by id(): those of the source, with its folders where a name occurs twice."""
    short = Counter(image.path.name.casefold() for image in images)
    found: dict[int, str] = {}
    for image in images:
        longer = "__".join(part for part in Path(os.path.relpath(image.path, src)).parts if part != "..")
        found[id(image)] = image.path.name if short[image.path.name.casefold()] == 1 else longer
    if twice := [name for name, times in Counter(found.values()).items() if times > 1]:
        raise UserError(f"{src}: two images would be called {twice[0]}; rename one of them in a copy of the folder")
    return found


def _put(image: LabelledImage, target: Path, *, link: bool) -> None:
    if image.content is not None:
        target.write_bytes(image.content)
    elif link:
        target.symlink_to(real(image.path))
    else:
        shutil.copyfile(image.path, target)


def _trees(
    parts: dict[Split, list[LabelledImage]],
    objects: dict[int, list[tuple[str, dict[str, Any]]]],
    files: dict[int, str],
    names: list[str],
) -> dict[Split, dict[str, list[Any]]]:
    """COCO JSON of the parts; no two of them share an id."""
    numbers = {name: number for number, name in enumerate(names, 1)}
    found: dict[Split, dict[str, list[Any]]] = {}
    image_ids, object_ids = count(1), count(1)
    for part in SPLITS:
        records, annotations = [], []
        for image in parts[part]:
            image_id, (height, width) = next(image_ids), image.size
            records.append({"id": image_id, "file_name": files[id(image)], "height": height, "width": width})
            for label, entry in objects[id(image)]:
                ids = {"id": next(object_ids), "image_id": image_id, "category_id": numbers[label]}
                annotations.append(ids | entry)
        categories = [{"id": number, "name": name} for name, number in numbers.items()]
        found[part] = {"images": records, "annotations": annotations, "categories": categories}
    return found
