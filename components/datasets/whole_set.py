"""Checks of a whole data set, once each image and annotation has been checked on its own.

They settle EXIF rotations that a size alone does not tell, and warn of images that look black, of images with more
objects than detections count, and of images that are in both splits, also as copies in another file format or quality.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from model.config import DataConfig
from model.data.annotations import CocoFile
from model.data.findings import Finding
from model.data.layout import Split
from model.data.measure import ImageFacts
from model.scoring.names import COCO_MAX_DETECTIONS

# Largest difference of a gray value in thumbnails of one picture. Measured: at most 3 after saving as JPEG of quality
# 40 and above; at least 40 between different pictures.
_SAME_VALUE = 4
_MANY_ALIKE = 3  # a picture with more lookalikes in train is one of a series, such as a fixed camera's

Facts = dict[int, ImageFacts]  # id of an image → its facts


def check_whole_set(data: DataConfig, files: Mapping[Split, CocoFile], facts: Mapping[Split, Facts]) -> None:
    """Add warnings to the findings of `files`; change `apply_exif` of `facts` where data.exif is auto."""
    if data.exif == "auto":
        _settle_exif(files, facts)
    for split, coco in files.items():
        _warn_of_dark_images(data, coco, facts[split])
        for image_id, instances in coco.instances.items():
            classes = Counter(instance.category_id for instance in instances if not instance.is_crowd)
            if classes.total() > COCO_MAX_DETECTIONS:
                text = (
                    f"{classes.total()} objects, up to {max(classes.values())} of a class; by default "
                    f"model.detections_per_image and evaluate.max_detections (per class) are {COCO_MAX_DETECTIONS}"
                )
                _warn(coco, image_id, f"more than {COCO_MAX_DETECTIONS} objects", text)
    _warn_of_shared_images(files, facts)


def _settle_exif(files: Mapping[Split, CocoFile], facts: Mapping[Split, Facts]) -> None:
    """Treat images whose size does not tell like most images of their split, or else of the whole set, that tell."""
    votes = {split: Counter(one.rotation for one in of_split.values()) for split, of_split in facts.items()}
    of_all = sum(votes.values(), Counter[str]())
    for split, of_split in facts.items():
        tells = votes[split] if votes[split]["stored"] + votes[split]["turned"] else of_all
        stored, turned = tells["stored"], tells["turned"]
        applies = turned >= stored  # without evidence as viewers do
        is_doubtful = not (turned and not stored)  # all that tell are annotated as displayed: so are the others
        for image_id, one in of_split.items():
            if one.rotation == "unknown":
                of_split[image_id] = replace(one, apply_exif=applies)
            is_mixed = one.rotation in ("stored", "turned") and stored and turned
            if is_mixed or (one.rotation == "unknown" and is_doubtful):
                text = (
                    f"{one.file_name}: its EXIF rotation is {'' if of_split[image_id].apply_exif else 'not '}applied; "
                    f"of the images whose size tells, {turned} are annotated as displayed, {stored} as stored; "
                    "data.exif=apply or ignore decides for all"
                )
                _warn(files[split], image_id, "EXIF rotation", text)


def _warn_of_dark_images(data: DataConfig, coco: CocoFile, facts: Facts) -> None:
    values = [one.values for one in facts.values() if one.values is not None]
    low, high = min((one[0] for one in values), default=0.0), max((one[1] for one in values), default=0.0)
    used = ", ".join(f"{value:g}" for value in data.pixel_range) or "by default 0, 65535; of floats 0, 255"
    for image_id, one in facts.items():
        if one.flaw and one.values is not None:
            text = (
                f"{one.file_name}: its values of {one.values[0]:g} to {one.values[1]:g} do not suit data.pixel_range "
                f"({used}); all images of more than 8 bits have {low:g} to {high:g}: set data.pixel_range to what your "
                "camera or scanner gives"
            )
            _warn(coco, image_id, "pixel range", text)
        elif one.flaw:
            text = f"{one.file_name}: no pixel exceeds 1/16 of white; is it a label map, or has it more than 8 bits?"
            _warn(coco, image_id, "dark image", text)


def _warn_of_shared_images(files: Mapping[Split, CocoFile], facts: Mapping[Split, Facts]) -> None:
    train = {one.sha256: one.file_name for one in facts["train"].values()}
    lookalikes = _Lookalikes(files["train"], facts["train"])
    for image_id, one in facts["val"].items():
        if one.sha256 in train:
            text = f"{one.file_name} is the same file as {train[one.sha256]} of train, so that scores are too high"
            _warn(files["val"], image_id, "also in train", text)
        elif 0 < len(names := lookalikes.of(files["val"], image_id, one)) <= _MANY_ALIKE:
            text = (
                f"{one.file_name} shows the same picture as {names[0]} of train, in another file, so that scores are "
                "too high"
            )
            _warn(files["val"], image_id, "same picture in train", text)


class _Lookalikes:
    """Images of a split by size and thumbnail."""

    def __init__(self, coco: CocoFile, facts: Facts) -> None:
        groups = defaultdict[tuple[int, int], list[ImageFacts]](list)
        for image_id, one in facts.items():
            if one.thumbnail:
                groups[_size(coco, image_id)].append(one)
        self._groups = {}
        for size, group in groups.items():
            thumbnails = np.frombuffer(b"".join(one.thumbnail for one in group), dtype=np.uint8)
            thumbnails = thumbnails.reshape(len(group), -1)  # [n, values]
            means = thumbnails.mean(axis=1)
            order = np.argsort(means)
            self._groups[size] = means[order], thumbnails[order], [group[i].file_name for i in order]

    def of(self, coco: CocoFile, image_id: int, one: ImageFacts) -> list[str]:
        """Names of the images that show the same picture as an image of another split."""
        if not one.thumbnail or (size := _size(coco, image_id)) not in self._groups:
            return []
        means, thumbnails, names = self._groups[size]
        thumbnail = np.frombuffer(one.thumbnail, dtype=np.uint8)
        mean = thumbnail.mean()
        start, stop = np.searchsorted(means, [mean - _SAME_VALUE, mean + _SAME_VALUE + 1e-6])
        near = thumbnails[start:stop]
        differences = np.maximum(near, thumbnail) - np.minimum(near, thumbnail)
        return [names[start + i] for i in np.flatnonzero((differences <= _SAME_VALUE).all(axis=1))]


def _size(coco: CocoFile, image_id: int) -> tuple[int, int]:
    return coco.images[image_id].height, coco.images[image_id].width


def _warn(coco: CocoFile, image_id: int, kind: str, text: str) -> None:
    coco.findings.append(Finding(kind, text, f"{coco.path}: image {image_id}", "warning"))
