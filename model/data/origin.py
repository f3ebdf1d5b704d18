"""Origin of a prepared split, for its meta.json: the values of `data` that decide its content, and its annotation file.

What a run says of itself would be wrong if other values were set for training than for `prepare`, or if the annotations
had changed in between.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from model.config import DataConfig
from model.data.layout import SPLITS, Split, split_paths
from model.errors import UserError

_DECIDING = {"source", "val_fraction", "split_seed", "on_invalid", "exif", "train_limit", "val_limit", "shapes"}


def origin(data: DataConfig, split: Split) -> dict[str, Any]:
    """The origin of a split whose annotations are read now."""
    annotations = data.raw_dir / split_paths(data, split).annotations
    return {
        "prepared_with": _values(data),
        "annotations": {
            "path": str(annotations),
            "path_from_prepared": os.path.relpath(annotations, data.prepared_dir),
            "sha256": _sha256(annotations),
        },
    }


def require_values(meta: dict[str, Any], data: DataConfig, folder: Path) -> None:
    """Refuse values of `data` that differ from those that a split was prepared with; folders of older versions pass.

    Raises:
        UserError: if a value differs.
    """
    values = _values(data)
    before = _values(DataConfig(source=data.source)) | meta.get("prepared_with", values)  # with keys of later versions
    for key in sorted(values.keys() | before.keys(), key=lambda key: (key != "val_fraction", key == "split_seed", key)):
        wanted, got = (json.dumps(one.get(key), ensure_ascii=False) for one in (values, before))
        if wanted != got and (values.get("val_fraction") or key != "split_seed"):
            raise UserError(
                f"{folder}: must be prepared with data.{key} {wanted}, as set here, got {got}; run `maskrcnn prepare` "
                f"with the same value, or set data.{key} to {got} here too"
            )


def require_annotations(meta: dict[str, Any], folder: Path, data: DataConfig | None = None) -> None:
    """Refuse a split that was prepared from another annotation file; one that cannot be read is not needed.

    Args:
        folder: the split's own, in that of all splits.
        data: names the file; by default it is where it was.

    Raises:
        UserError: if the file has another content.
    """
    of = meta.get("annotations")  # absent in folders of older versions
    if of is None:
        return
    split: Split = "train" if folder.name == "train" else "val"
    places = places_of(of["path"], folder.parent, of["path_from_prepared"])
    if data is not None:
        places.insert(0, data.raw_dir / split_paths(data, split).annotations)
    path = next((place for place in places if place.is_file() and os.access(place, os.R_OK)), None)
    if path is not None and _sha256(path) != of["sha256"]:
        raise UserError(
            f"{path}: must be as it was when {folder} was prepared, but is another file or has changed since; run "
            "`maskrcnn prepare` again"
        )


def places_of(path: str, prepared_dir: Path, path_from_prepared: str) -> list[Path]:
    """Possible places of raw data, the likeliest first: prepared data are used from other folders, and move with them.

    Args:
        path: the path as it was for `prepare`; a relative one starts at the working directory then, in which another
            project's data may lie at the same place.
        path_from_prepared: the path from prepared_dir.
    """
    direct, derived = Path(path), prepared_dir / path_from_prepared
    is_same = os.path.realpath(direct) == os.path.realpath(derived)
    return [direct, derived] if direct.is_absolute() or is_same else [derived, direct]


def _values(data: DataConfig) -> dict[str, Any]:
    """The values that decide the content of the splits, as JSON has them."""
    values = data.model_dump(mode="json", include=_DECIDING)
    if data.source != "shapes":
        del values["shapes"]
    for split in SPLITS:
        paths = split_paths(data, split)
        values[f"{split}_images"] = _below(data.raw_dir, paths.images)
        values[f"{split}_annotations"] = _below(data.raw_dir, paths.annotations)
    return values


def _below(raw_dir: Path, path: Path) -> str:
    """A path below raw_dir, however it is written; empty if it is elsewhere, which may be mounted at another place."""
    relative = os.path.relpath(raw_dir / path, raw_dir)
    return "" if relative.startswith("..") else relative


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
