"""From pixels of any size to the objects in them, as people and other programs take them: what `maskrcnn predict` and a registered
model share.

An object is {"label": 1, 2, …, "class": its name, "score": 0 to 1, "bbox": [x1, y1, x2, y2], "segmentation": COCO RLE with text counts}, in
pixels of the image that was given; without a segmentation where the network has no masks.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import DataConfig
from model.data.collate import collate, smallest_bucket
from model.data.dataset import Sample
from model.data.transforms import Pixels, resize_image, resized_size
from model.engine.checkpoint import LoadedModel, load_model
from model.inference.postprocess import to_coco_results
from model.inference.predict import predict
from model.network.mask_rcnn import NAMES_OF_PROPOSALS, MaskRCNN
from model.structures import Batch, Detections

Object = dict[str, Any]


class Predictor:
    """A network, with the image sizes, classes and dtype it is trained with."""

    def __init__(
        self, model: MaskRCNN, data: DataConfig, dtype: str, class_names: Sequence[str], category_ids: Sequence[int]
    ) -> None:
        """
        Args:
            data: its image sizes and buckets.
            dtype: train.dtype.
            class_names, category_ids: of label k at k - 1.
        """
        self._model, self._data, self._dtype = model, data, dtype
        self._class_names, self._category_ids = tuple(class_names), tuple(category_ids)

    @classmethod
    def of(cls, loaded: LoadedModel) -> "Predictor":
        """The predictor of a trained network."""
        data = DataConfig.model_validate_json(json.dumps(loaded.config["data"]))
        dtype = loaded.config["train"]["dtype"]
        return cls(loaded.model, data, dtype, loaded.class_names, loaded.category_ids)

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device) -> "Predictor":
        """The predictor of a checkpoint file.

        Raises:
            CheckpointError: if the file is absent or no checkpoint.
        """
        return cls.of(load_model(checkpoint, device))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of labels 1, 2, …; proposals are of one class."""
        return NAMES_OF_PROPOSALS if self._model.task == "proposals" else self._class_names

    def objects(
        self, images: Iterable[tuple[int, Pixels]], *, batch_size: int, score_threshold: float
    ) -> Iterator[tuple[int, list[Object]]]:
        """Each image's number with the objects found in it, the surest first; images come out in the order of their batches.

        Args:
            images: numbers of the caller's choice, each once, with [h, w, 3] uint8 RGB. Taken as they are needed.
            batch_size: images of one bucket that are looked at together.
            score_threshold: objects of less are left out.

        Raises:
            UserError: if no bucket of the model holds an image.
        """
        batches = batched_by_bucket(map(self._sample, images), self._data, batch_size)
        device = next(self._model.parameters()).device
        for batch, detections in predict(self._model, batches, device, self._dtype):
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
        outlines = [{"segmentation": mask["segmentation"]} for mask in masks] or [{}] * len(boxes)
        for box, outline in zip(boxes, outlines, strict=True):
            if box["score"] < score_threshold:
                continue
            place = category_ids.index(box["category_id"])
            x, y, width, height = box["bbox"]
            found[box["image_id"]].append(
                {
                    "label": place + 1,
                    "class": class_names[place],
                    "score": box["score"],
                    "bbox": [x, y, x + width, y + height],
                }
                | outline
            )
        return found


def batched_by_bucket(samples: Iterable[Sample], data: DataConfig, batch_size: int) -> Iterator[Batch]:
    """Batches of images that share a bucket; what is left over at the end comes in smaller ones."""
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
