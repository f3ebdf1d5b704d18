"""Index of a prepared split: flat arrays on disk, memory-mapped, without a Python object per annotation.

Arrays, one .npy each, for n images, m instances, t polygon parts, v vertices:
    image_ids [n] int64, sizes [n, 2] int32 (height, width), apply_exif [n] bool,
    file_names [bytes] uint8 UTF-8, file_name_offsets [n + 1] int64,
    image_offsets [n + 1] int64: image i owns instances image_offsets[i] to [i + 1],
    is_empty [n] bool,
    boxes [m, 4] float32 (x1, y1, x2, y2) in original pixels, labels [m] int64 from 1, is_crowd [m] bool,
    instance_offsets [m + 1] int64 into parts, part_offsets [t + 1] int64 into vertices,
    xy [v, 2] float32 original pixels.
`meta.json` holds the classes, the location of the images, the hash of annotations and image files, and the origin.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.origin import places_of, require_annotations, require_values
from model.errors import UserError

_META = "meta.json"


@dataclass(frozen=True)
class CocoInstances:
    """Annotations of one image, including crowds, in original pixels. Read-only views of the index."""

    boxes: NDArray[np.float32]  # [k, 4] xyxy
    labels: NDArray[np.int64]  # [k] 1 … classes
    is_crowd: NDArray[np.bool_]  # [k]
    xy: NDArray[np.float32]  # [v, 2]
    part_offsets: NDArray[np.int64]  # [t + 1] into xy
    instance_offsets: NDArray[np.int64]  # [k + 1] into parts


@dataclass(frozen=True)
class IndexedImage:
    """One image as checked by `prepare`, for `write_index`."""

    record: ImageRecord
    apply_exif: bool
    instances: list[Instance]
    is_annotated: bool = False  # True if there are annotations, usable or not; implied by instances


class CocoIndex:
    """A prepared split. Cheap to open, to pickle and to share between processes.

    Attributes:
        image_ids: [n] int64, COCO's, ascending.
        sizes: [n, 2] int32 (height, width) as annotated.
        apply_exif: [n] bool, True if decoding must apply the EXIF orientation.
        has_instances: [n] bool, True if the image has an instance other than crowds.
        is_empty: [n] bool, True if the image has no annotation at all, not even one that could not be used.
        has_masks: True if each instance has a mask, also the crowds, whose outlines are not in the index.
        class_names, category_ids: name and COCO id of label k at index k - 1.
        pixel_range: data.pixel_range, as images were checked with.
        data_hash: hash of annotations and image files, independent of their location.
        ground_truth_path: clean COCO JSON of the same images.
        timeout_s: data.timeout_s, for reading an image outside of the loader's workers.
    """

    def __init__(self, prepared_dir: Path, split: str, timeout_s: float) -> None:
        self._prepared_dir, self._split, self.timeout_s = prepared_dir, split, timeout_s
        folder = prepared_dir / split
        if not (folder / _META).is_file():
            raise UserError(
                f"{folder}: must hold prepared data, but has none. Run `maskrcnn prepare` with the same "
                "data.prepared_dir first."
            )
        try:
            self._read(folder)
        except (OSError, EOFError, ValueError, TypeError, LookupError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # the system's fault, such as too many open files, not that of the data
            raise UserError(
                f"{folder}: must hold prepared data as it was written, but it is damaged ({error}). Run `maskrcnn "
                "prepare` again."
            ) from error

    def _read(self, folder: Path) -> None:
        prepared_dir, split = self._prepared_dir, self._split
        self._meta = meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["arrays"]}
        self._images_dir = _images_dir(meta, prepared_dir)
        self.class_names = tuple(meta["class_names"])
        self.category_ids = tuple(meta["category_ids"])
        self.data_hash: str = meta["data_hash"]
        self.ground_truth_path = prepared_dir / f"{split}.json"
        self.image_ids, self.sizes = self._arrays["image_ids"], self._arrays["sizes"]
        self.apply_exif = self._arrays["apply_exif"]
        ordinary = np.concatenate([[0], np.cumsum(~self._arrays["is_crowd"])])
        # Folders of older versions do not have the array.
        self.is_empty = self._arrays.get("is_empty", np.diff(self._arrays["image_offsets"]) == 0)
        self.pixel_range = tuple(meta.get("pixel_range", ()))
        self.has_masks: bool = meta.get("has_masks", True)  # always so in folders of older versions
        self.has_instances = np.diff(ordinary[self._arrays["image_offsets"]]) > 0

    @classmethod
    def open(cls, prepared_dir: Path, split: str, timeout_s: float = DataConfig().timeout_s) -> "CocoIndex":
        """Open the index that `maskrcnn prepare` wrote for a split, train or val.

        Raises:
            UserError: if there is none, or it is damaged.
            OSError: if the system cannot open its files.
        """
        return cls(prepared_dir, split, timeout_s)

    def require_masks(self, task: str) -> None:
        """Refuse boxes without masks for the task `mask`.

        Raises:
            UserError: if an instance has no mask.
        """
        if task == "mask" and not self.has_masks:
            raise UserError(
                f"{self._prepared_dir / self._split}: model.task=mask needs a mask for each instance, but some have a "
                "box alone, prepared with model.task=box or proposals. Set model.task to box or proposals, or add "
                "segmentations and run `maskrcnn prepare model.task=mask`."
            )

    def require_pixel_range(self, pixel_range: Sequence[float]) -> None:
        """Refuse to decode images otherwise than they were checked.

        Raises:
            UserError: if the split was prepared with another data.pixel_range.
        """
        if tuple(pixel_range) != self.pixel_range:
            wanted, got = (", ".join(f"{value:g}" for value in values) for values in (pixel_range, self.pixel_range))
            raise UserError(
                f"{self._prepared_dir / self._split}: must be prepared with data.pixel_range [{wanted}], got "
                f"[{got}]; run `maskrcnn prepare` with the same value, which belongs to the weights"
            )

    def require_values(self, data: DataConfig) -> None:
        """Refuse values of `data` other than those that the split was prepared with.

        Raises:
            UserError: if a value differs that decides the split's content.
        """
        require_values(self._meta, data, self._prepared_dir / self._split)

    def require_annotations(self, data: DataConfig | None = None) -> None:
        """Refuse a split whose annotation file is there, but has another content since; it is read for this.

        Args:
            data: names the file; by default it is where it was.

        Raises:
            UserError: if its content is not that of `prepare`.
        """
        require_annotations(self._meta, self._prepared_dir / self._split, data)

    def __reduce__(self) -> tuple[Any, ...]:
        return CocoIndex, (self._prepared_dir, self._split, self.timeout_s)  # each worker maps the files itself

    def __len__(self) -> int:
        return len(self.image_ids)

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of image i."""
        height, width = self.sizes[i].tolist()
        return height, width

    def image_path(self, i: int) -> Path:
        """Path of image i."""
        start, stop = self._arrays["file_name_offsets"][i : i + 2]
        return self._images_dir / self._arrays["file_names"][start:stop].tobytes().decode()

    def ordinary_labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The image and the label of each instance other than crowds: [k], [k], in the order of the images."""
        images = np.repeat(np.arange(len(self)), np.diff(self._arrays["image_offsets"]))
        is_ordinary = ~self._arrays["is_crowd"]
        return images[is_ordinary], self._arrays["labels"][is_ordinary]

    def instances(self, i: int) -> CocoInstances:
        """Annotations of image i."""
        arrays = self._arrays
        first, last = arrays["image_offsets"][i : i + 2]
        instance_offsets = arrays["instance_offsets"][first : last + 1]
        part_offsets = arrays["part_offsets"][instance_offsets[0] : instance_offsets[-1] + 1]
        return CocoInstances(
            boxes=arrays["boxes"][first:last],
            labels=arrays["labels"][first:last],
            is_crowd=arrays["is_crowd"][first:last],
            xy=arrays["xy"][part_offsets[0] : part_offsets[-1]],
            part_offsets=part_offsets - part_offsets[0],
            instance_offsets=instance_offsets - instance_offsets[0],
        )


def spread(count: int, wanted: int) -> list[int]:
    """Indices of up to `wanted` of `count` items, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int)).tolist()


def write_index(
    folder: Path,
    images: Sequence[IndexedImage],
    *,
    categories: dict[int, str],
    data_hash: str,
    origin: Mapping[str, Any],
    pixel_range: Sequence[float] = (),
) -> None:
    """Write a split's arrays and meta.json into a new folder.

    Args:
        categories: id → name, in label order.
        origin: the return value of `images_location` and, for data of `prepare`, that of `origin.origin`.
        pixel_range: data.pixel_range.
    """
    arrays = _image_arrays(images) | _instance_arrays(
        [x for image in images for x in image.instances], list(categories)
    )
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {
        "arrays": list(arrays),
        "category_ids": list(categories),
        "class_names": list(categories.values()),
        "data_hash": data_hash,
        "has_masks": all(instance.has_mask for image in images for instance in image.instances),
        "pixel_range": list(pixel_range),
        **origin,
    }
    (folder / _META).write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")


def images_location(raw_dir: Path, images: Path, prepared_dir: Path) -> dict[str, str]:
    """Location of the images for meta.json, from the working directory and from prepared_dir."""
    return {
        "images_dir": str(raw_dir / images),
        "images_dir_from_prepared": os.path.relpath(raw_dir / images, prepared_dir),
    }


def _images_dir(meta: dict[str, Any], prepared_dir: Path) -> Path:
    places = places_of(meta["images_dir"], prepared_dir, meta["images_dir_from_prepared"])
    return next((place for place in places if place.is_dir()), places[0])


def _image_arrays(images: Sequence[IndexedImage]) -> dict[str, NDArray[Any]]:
    records = [image.record for image in images]
    names = [record.file_name.encode() for record in records]
    return {
        "image_ids": np.array([record.id for record in records], dtype=np.int64),
        "sizes": np.array([(record.height, record.width) for record in records], dtype=np.int32).reshape(-1, 2),
        "apply_exif": np.array([image.apply_exif for image in images], dtype=bool),
        "file_names": np.frombuffer(b"".join(names), dtype=np.uint8),
        "file_name_offsets": offsets([len(name) for name in names]),
        "image_offsets": offsets([len(image.instances) for image in images]),
        "is_empty": np.array([not (image.instances or image.is_annotated) for image in images], dtype=bool),
    }


def _instance_arrays(instances: Sequence[Instance], category_ids: list[int]) -> dict[str, NDArray[Any]]:
    labels = {category_id: label for label, category_id in enumerate(category_ids, 1)}
    polygons = [polygon for instance in instances for polygon in instance.polygons]
    return {
        "boxes": np.array([instance.box for instance in instances], dtype=np.float32).reshape(-1, 4),
        "labels": np.array([labels[instance.category_id] for instance in instances], dtype=np.int64),
        "is_crowd": np.array([instance.is_crowd for instance in instances], dtype=bool),
        "instance_offsets": offsets([len(instance.polygons) for instance in instances]),
        "part_offsets": offsets([len(polygon) for polygon in polygons]),
        "xy": np.concatenate([np.zeros((0, 2), dtype=np.float32), *polygons]),
    }


def offsets(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets [n + 1] of n consecutive items: item i takes up offsets[i] to offsets[i + 1]; the last is the total."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
