"""Damaged exports: an import writes a whole folder that can be read, or ends with an error and without a trace."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model.data.annotations import read_coco
from model.errors import UserError

KINDS = {
    "yolo": "yolo",
    "label_studio_yolo": "yolo",
    "voc": "voc",
    "cvat_masks": "voc",
    "labelme": "labelme",
    "cvat": "cvat",
    "datumaro": "datumaro",
    "png_numbers": "png-masks",
    "png_objects": "png-masks",
}
VALUES: list[Any] = [None, True, -1, 0, 1e30, float("nan"), "", "a", [], {}, [[]], [1], "é\0", 10**40, [None], {"a": 1}]
WORDS = ["", "-1", "1e30", "nan", "inf", "a", "0", "9999999999999", "1.5", "-5,3", "é", "{", "["]


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys of every value in a JSON tree."""
    if place:
        yield place
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from places(value, (*place, key))


def damage(path: Path, rng: random.Random) -> None:
    """Change a value, a word, or some bytes of a file, or cut it."""
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.85:
        tree = json.loads(content)
        *above, key = rng.choice(list(places(tree)))
        holder = tree
        for step in above:
            holder = holder[step]
        holder[key] = rng.choice(VALUES)
        path.write_text(json.dumps(tree))
    elif path.suffix in (".xml", ".txt", ".yaml") and rng.random() < 0.85:
        text = content.decode()
        start, end = rng.choice([match.span() for match in re.finditer(r"[\w.-]+", text)])
        path.write_text(text[:start] + rng.choice(WORDS) + text[end:])
    elif rng.random() < 0.3:
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)


def check(src: Path, take: Callable[..., Any], kind: str, rng: random.Random) -> None:
    """Damage a file of an export, and import it."""
    files = sorted(path for path in src.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix not in (".png", ".jpg")]
    damage(rng.choice(texts if texts and rng.random() < 0.8 else files), rng)
    dst = src.with_name("imported")
    boxes = rng.choice(["keep", "mask", "skip"])
    try:
        take(kind, src, on_invalid=rng.choice(["error", "skip"]), boxes=boxes)
    except UserError:
        assert [path.name for path in src.parent.iterdir()] == ["src"]
        return
    for part in ("train", "val"):
        coco = read_coco(dst / f"instances_{part}.json", masks=boxes != "keep")
        assert [finding for finding in coco.findings if finding.severity != "warning"] == []
        assert all((dst / f"images_{part}" / image.file_name).is_file() for image in coco.images.values())


@pytest.mark.parametrize("export", KINDS)
def test_a_damaged_export_is_an_error_or_a_set_that_can_be_read(
    tmp_path: Path, exports: ModuleType, take: Callable[..., Any], export: str
):
    check(getattr(exports, export)(tmp_path / "src"), take, KINDS[export], random.Random(export))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
@pytest.mark.parametrize("export", KINDS)
def test_many_damaged_exports(tmp_path: Path, exports: ModuleType, take: Callable[..., Any], export: str, seed: int):
    check(getattr(exports, export)(tmp_path / "src"), take, KINDS[export], random.Random(f"{export} {seed}"))
