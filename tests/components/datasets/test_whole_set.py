"""Checks of a whole data set: rotations that a size does not tell, dark images, many objects, shared images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.datasets.whole_set import check_whole_set
from model.config import DataConfig
from model.data.annotations import CocoFile, ImageRecord, Instance
from model.data.file_names import FileNames
from model.data.measure import ImageFacts, measure_image

Facts = dict[str, list[ImageFacts]]


def fact(name: str = "a.jpg", **changes: Any) -> ImageFacts:
    return ImageFacts(**{"file_name": name, "apply_exif": True, "sha256": name} | changes)


def turned(*rotations: Any) -> list[ImageFacts]:
    """As measure_image gives them."""
    return [fact(f"{r}_{k}.jpg", rotation=r, apply_exif=r != "stored") for k, r in enumerate(rotations)]


def checked(
    train: list[ImageFacts], val: list[ImageFacts], instances: dict[int, list[Instance]] | None = None, **settings: Any
) -> tuple[dict[str, list[bool]], list[tuple[str, str]]]:
    """apply_exif of each image, and (split and image, kind) of each warning."""
    facts = {"train": dict(enumerate(train)), "val": dict(enumerate(val))}
    files = {name: CocoFile(Path(name), {}, {}, instances or {}, {}) for name in facts}
    check_whole_set(DataConfig(**settings), files, facts)  # type: ignore[arg-type]
    applied = {name: [one.apply_exif for one in of_split.values()] for name, of_split in facts.items()}
    findings = [finding for coco in files.values() for finding in coco.findings]
    assert {finding.severity for finding in findings} <= {"warning"}
    return applied, [(finding.where, finding.kind) for finding in findings]


def test_rotations_that_a_size_does_not_tell_follow_those_that_it_tells() -> None:
    cases: list[tuple[list[str], list[str], list[bool], list[bool], int]] = [
        # rotations of train and of val, whether they are applied, number of warnings
        (["stored", "unknown", "none"], ["unknown"], [False, False, True], [False], 2),
        (["turned", "unknown", "none"], ["unknown"], [True, True, True], [True], 0),
        (["unknown"], ["none"], [True], [True], 1),
        (["stored", "stored", "turned", "unknown"], [], [False, False, True, False], [], 4),
        (["turned", "unknown"], ["stored", "unknown"], [True, True], [False, False], 1),
        (["stored", "none"], ["none"], [False, True], [True], 0),
    ]
    for train, val, applied_train, applied_val, count in cases:
        applied, warnings = checked(turned(*train), turned(*val))
        assert applied == {"train": applied_train, "val": applied_val}, (train, val)
        assert [kind for _, kind in warnings].count("EXIF rotation") == count, (train, val)


def test_settings_of_exif_leave_nothing_to_settle() -> None:
    for exif in ("apply", "ignore"):
        applied, warnings = checked(turned("stored", "unknown", "turned"), [], exif=exif)
        assert applied["train"] == [False, True, True]  # as measure_image decided
        assert warnings == []


def test_dark_images_and_ranges_that_do_not_suit_are_counted() -> None:
    images = [fact(flaw="dark"), fact(flaw="dark", values=(0, 4095)), fact(flaw="cut", values=(0, 9)), fact()]
    _, warnings = checked(images, [])
    assert warnings == [
        ("train: image 0", "dark image"), ("train: image 1", "pixel range"), ("train: image 2", "pixel range")
    ]  # fmt: skip


def test_more_objects_than_count_and_images_of_both_splits_are_counted() -> None:
    ordinary, crowd = (Instance(1, (0, 0, 1, 1), [], is_crowd, was_clipped=False) for is_crowd in (False, True))
    instances = {0: [ordinary] * 101, 1: [ordinary] * 100 + [crowd] * 50}
    _, warnings = checked([fact("a.jpg")], [fact("b.jpg"), fact("c.jpg", sha256="a.jpg")], instances)
    assert warnings == [
        ("train: image 0", "more than 100 objects"),
        ("val: image 0", "more than 100 objects"),
        ("val: image 1", "also in train"),
    ]


def picture(seed: int) -> Image.Image:
    colors = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((160, 96), Image.Resampling.BICUBIC)


def warned_of(folder: Path) -> list[str]:
    """Texts of the warnings about the images of two folders, train and val."""
    files, facts = {}, {}
    for split in ("train", "val"):
        names = sorted(path.name for path in (folder / split).iterdir())
        records = {}
        for i, name in enumerate(names):
            with Image.open(folder / split / name) as image:
                size = image.size if image.getexif().get(0x0112) == 6 else image.size[::-1]
            records[i] = ImageRecord(i, name, *size)
        files[split] = CocoFile(Path(split), {}, records, {}, {})
        found = [
            measure_image(folder / split, FileNames(folder / split), DataConfig(), one) for one in records.values()
        ]
        facts[split] = {i: one for i, one in enumerate(found) if isinstance(one, ImageFacts)}
        assert len(facts[split]) == len(names)
    check_whole_set(DataConfig(), files, facts)  # type: ignore[arg-type]
    return [finding.text for coco in files.values() for finding in coco.findings]


def test_copies_in_other_files_are_found_and_lookalikes_are_not(tmp_path: Path) -> None:
    train, val = tmp_path / "train", tmp_path / "val"
    train.mkdir()
    val.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right displays it upright
    for seed in range(6):
        picture(seed).save(train / f"{seed}.jpg", quality=90)
    for k in range(4):  # a fixed camera
        picture(7).save(train / f"series_{k}.png", compress_level=k)
    Image.new("RGB", (160, 96), "gray").save(train / "flat.png")
    Image.open(train / "0.jpg").save(val / "0.png")
    Image.open(train / "1.jpg").save(val / "1.jpg", quality=40)
    Image.open(train / "2.jpg").save(val / "2.webp", quality=60)
    picture(3).transpose(Image.Transpose.ROTATE_90).save(val / "3.jpg", exif=exif, quality=90)
    Image.open(train / "4.jpg").resize((320, 192), Image.Resampling.NEAREST).save(val / "4_larger.png")
    moved = picture(5)
    moved.paste(moved.crop((10, 10, 30, 30)), (70, 50))
    moved.save(val / "5_moved.png")
    picture(5).point(lambda value: min(value + 10, 255)).save(val / "5_brighter.png")
    picture(6).save(val / "6_new.jpg")
    picture(7).save(val / "7.jpg")
    Image.new("RGB", (160, 96), (130, 130, 130)).save(val / "flat.png")
    names = [("0.png", "0.jpg"), ("1.jpg", "1.jpg"), ("2.webp", "2.jpg"), ("3.jpg", "3.jpg")]
    assert warned_of(tmp_path) == [
        f"{copy} shows the same picture as {original} of train, in another file, so that scores are too high"
        for copy, original in names
    ]
