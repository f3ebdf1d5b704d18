"""Exports of other tools, imitated, and what an import makes of them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from components.formats.coco_folder import ImportReport
from components.formats.options import ImportOptions
from components.import_ import run


@pytest.fixture(scope="session")
def exports() -> ModuleType:
    """The module exports.py beside this file."""
    spec = importlib.util.spec_from_file_location("exports", Path(__file__).parent / "exports.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Imported:
    """The folder that an import wrote."""

    def __init__(self, folder: Path, report: ImportReport) -> None:
        self.folder, self.report = folder, report
        self.trees: dict[str, Any] = {
            part: json.loads((folder / f"instances_{part}.json").read_text()) for part in ("train", "val")
        }

    def files(self, part: str) -> list[str]:
        return [record["file_name"] for record in self.trees[part]["images"]]

    def objects(self, name: str) -> list[dict[str, Any]]:
        """Annotations of the image whose file name ends so, each with its label."""
        for tree in self.trees.values():
            labels = {entry["id"]: entry["name"] for entry in tree["categories"]}
            for record in tree["images"]:
                if record["file_name"].endswith(name):
                    of_image = [entry for entry in tree["annotations"] if entry["image_id"] == record["id"]]
                    return [entry | {"label": labels[entry["category_id"]]} for entry in of_image]
        raise AssertionError(f"no image {name}")

    def masks(self, name: str) -> list[tuple[str, np.ndarray]]:
        """Label and mask of each object of an image."""
        return [(entry["label"], mask_of(entry["segmentation"])) for entry in self.objects(name)]

    def counts(self, severity: str) -> dict[str, int]:
        kinds = [finding.kind for finding in self.report.findings if finding.severity == severity]
        return {kind: kinds.count(kind) for kind in kinds}


def mask_of(segmentation: Any, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))).astype(bool)
    return coco_mask.decode(segmentation).astype(bool)


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Imported]:
    """Imports a folder into another one: take("yolo", folder, val_fraction=0.5)."""

    def import_(kind: str, src: Path, **options: Any) -> Imported:
        dst = tmp_path / "imported"
        return Imported(dst, run(kind, src, dst, ImportOptions(**options)))

    return import_
