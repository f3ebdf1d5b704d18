"""Checks of a whole data set: rotations that a size does not tell, dark images, many objects, shared images."""

from pathlib import Path
from typing import Any

from components.datasets.whole_set import check_whole_set
from model.config import DataConfig
from model.data.annotations import CocoFile, Instance
from model.data.measure import ImageFacts

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
