"""Predictor: from images of any size to the objects in them, for `maskrcnn predict` and registered models.

An object is {"label": 1, 2, …, "category_id": COCO's id, "class": its name, "score": 0 to 1, "bbox": [x1, y1, x2, y2],
"segmentation": COCO RLE with text counts}, in pixels of the given image; it has no segmentation if the network has no
masks.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import DataConfig
from model.data.collate import collate, smallest_bucket
from model.data.dataset import Sample
from model.data.transforms import Pixels, resize_image, resized_size
from model.engine.checkpoint import LoadedModel, load_model
from model.errors import UserError
from model.inference.postprocess import to_coco_results
from model.inference.predict import predict
from model.network.mask_rcnn import NAMES_OF_PROPOSALS, MaskRCNN
from model.structures import Batch, Detections

Object = dict[str, Any]
_SHOWN = 10  # names of classes in an error


class Predictor:
    """Network with the image sizes, classes and, unless another is asked for, dtype it was trained with."""

    def __init__(
        self, model: MaskRCNN, data: DataConfig, dtype: str, class_names: Sequence[str], category_ids: Sequence[int]
    ) -> None:
        """Wrap a network.

        Args:
            data: image sizes and buckets.
            dtype: train.dtype.
            class_names, category_ids: name and COCO id of label k at index k - 1.
        """
        self._model, self._data, self._dtype = model, data, dtype
        self._class_names, self._category_ids = tuple(class_names), tuple(category_ids)

    @classmethod
    def of(cls, loaded: LoadedModel, dtype: str = "trained") -> "Predictor":
        """Make the predictor of a trained network, in the dtype of its training or another."""
        data = DataConfig.model_validate_json(json.dumps(loaded.config["data"]))
        if dtype == "trained":
            dtype = loaded.config["train"]["dtype"]
        return cls(loaded.model, data, dtype, loaded.class_names, loaded.category_ids)

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device) -> "Predictor":
        """Load the predictor of a checkpoint file.

        Raises:
            CheckpointError: if the file is missing or not a checkpoint.
        """
        return cls.of(load_model(checkpoint, device))

    @property
    def pixel_range(self) -> tuple[float, ...]:
        """data.pixel_range of the training, for `read_image`."""
        return self._data.pixel_range

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of labels 1, 2, …; proposals have a single class."""
        return NAMES_OF_PROPOSALS if self._model.task == "proposals" else self._class_names

    def require_classes(self, names: Iterable[str]) -> None:
        """Refuse names of classes that the network does not know.

        Raises:
            UserError: if there is one; it names the nearest.
        """
        for name in names:
            if name not in self.class_names:
                near = get_close_matches(name, self.class_names, n=1, cutoff=0.5)
                known = ", ".join(self.class_names[:_SHOWN]) + ", …" * (len(self.class_names) > _SHOWN)
                hint = f"did you mean {near[0]}?" if near else f"it knows {known}"
                raise UserError(f"classes: must be classes of this network, got {name}; {hint}")

    def objects(
        self, images: Iterable[tuple[int, Pixels]], *, batch_size: int, score_threshold: float
    ) -> Iterator[tuple[int, list[Object]]]:
        """Yield each image's number with its objects, highest score first; images are in the order of their batches.

        Args:
            images: pairs of a unique number of the caller's choice and [h, w, 3] uint8 RGB, consumed lazily.
            batch_size: images of one bucket per batch.
            score_threshold: objects with a lower score are left out.

        Raises:
            UserError: if no bucket of the model holds an image.
        """
        batches = batched_by_bucket(map(self._sample, images), self._data, batch_size)
        device = next(self._model.parameters()).device
        below = float(np.nextafter(np.float32(score_threshold), np.float32(0)))  # the network keeps what is above
        for batch, detections in predict(self._model, batches, device, self._dtype, below):
            yield from self._by_image(batch, detections, score_threshold).items()

    def _sample(self, image: tuple[int, Pixels]) -> Sample:
        number, pixels = image
        size = (pixels.shape[0], pixels.shape[1])
        resized = resize_image(pixels, resized_size(size, self._data.eval_min_size_px, self._data.eval_max_size_px))
        return Sample(image=resized, image_id=number, original_size=size, seed=0, instances=None)

    def _by_image(self, batch: Batch, detections: Detections, score_threshold: float) -> dict[int, list[Object]]:
        found: dict[int, list[Object]] = {number: [] for number in batch.image_ids.tolist()}
        category_ids, class_names = self._category_ids, self.class_names
        boxes, masks = to_coco_results(batch, detections, category_ids, self._model.conventions)
        for box, one in zip(boxes, objects_of(boxes, masks, category_ids, class_names), strict=True):
            if one["score"] >= score_threshold:
                found[box["image_id"]].append(one)
        return found


def objects_of(
    bbox_results: Sequence[dict[str, Any]],
    segm_results: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    class_names: Sequence[str] = (),
) -> list[Object]:
    """Turn COCO results into objects.

    Args:
        bbox_results: results with boxes.
        segm_results: results with masks, in the same order; empty if the network has none.
        category_ids: COCO id of label k at index k - 1.
        class_names: name of label k at index k - 1; without names, objects have no class.
    """
    outlines = [{"segmentation": result["segmentation"]} for result in segm_results] or [{}] * len(bbox_results)
    objects = []
    for result, outline in zip(bbox_results, outlines, strict=True):
        label, bbox = label_and_bbox(result, category_ids)
        ids = {"label": label, "category_id": result["category_id"]}
        name = {"class": class_names[label - 1]} if class_names else {}
        objects.append(ids | name | {"score": result["score"], "bbox": bbox} | outline)
    return objects


def label_and_bbox(record: dict[str, Any], category_ids: Sequence[int]) -> tuple[int, list[float]]:
    """Label, 1 for the first category, and corners of the box, of a COCO annotation or result."""
    x, y, width, height = record["bbox"]
    return category_ids.index(record["category_id"]) + 1, [x, y, x + width, y + height]


def batched_by_bucket(samples: Iterable[Sample], data: DataConfig, batch_size: int) -> Iterator[Batch]:
    """Yield batches of images that share a bucket; the last batch of each bucket may be smaller."""
    queues: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        height, width = sample.image.shape[:2]
        bucket = smallest_bucket([(height, width)], data.buckets)
        queue = queues.setdefault(bucket, [])
        queue.append(sample)
        if len(queue) == batch_size:
            yield collate(queues.pop(bucket), data.buckets)
    for queue in queues.values():
        yield collate(queue, data.buckets)
