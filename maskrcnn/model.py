"""Networks to call from Python; see the package's docstring."""

import itertools
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from maskrcnn.found import Found, Instance
from maskrcnn.pictures import pixels_of

if TYPE_CHECKING:
    from components.inference.networks import Network
_BATCHES = 8  # read ahead by `stream`, so that images of one shape share a batch


class Options(TypedDict, total=False):
    """Options of a call.

    threshold: lowest score of an object (0.5); best: each class's own, as `maskrcnn evaluate` found it.
    classes: only objects of these; empty: all.
    tile: side in pixels of tiles, 32 or more, in which larger images are predicted; 0: whole images alone.
    overlap: part of a tile's side that it shares with the next (0.2); objects up to it are whole in a tile.
    whole: with tiles, the whole image is predicted, too, for objects larger than a tile (True).
    """

    threshold: float | Literal["best"]
    classes: Sequence[str]
    tile: int
    overlap: float
    whole: bool


def load(
    weights: str | PathLike[str] = "coco",
    *,
    device: str = "auto",
    class_names: Sequence[str] = (),
    batch_size: int = 4,
    dtype: Literal["trained", "float32", "tf32", "bfloat16", "float16"] = "trained",
) -> "Model":
    """Load a network.

    Args:
        weights: coco, coco_v2 (torchvision's, fetched once); the path of a checkpoint, of a run's folder, or of the
            weights of a torchvision, Detectron2 or maskrcnn-benchmark detector; models:/NAME@ALIAS of MLflow.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        batch_size: images that the network takes at once.
        dtype: precision of its matrix products and convolutions: that of its training, or another. bfloat16 halves the
            time on processors and GPUs that have it; scores and boxes change a little.
        class_names: names of the classes of weights that have none; by default COCO's 80 if the number is theirs.

    Raises:
        ValueError: if there is no such device.
        model.errors.UserError: if there is no such network, or it cannot be fetched or read.
    """
    from components.inference.networks import load_network
    from components.params import build_config

    if isinstance(class_names, str):
        raise ValueError(f"class_names: must be a list of names, got {class_names!r}")
    _require_device(device)
    config = build_config({"train": {"device": device}, "predict": {"batch_size": batch_size, "dtype": dtype}})
    return Model(load_network(config, os.fsdecode(weights), class_names), batch_size, dtype)


class Model:
    """A network that finds objects in images; call it."""

    def __init__(self, network: "Network", batch_size: int, dtype: str) -> None:
        from model.inference.predictor import Predictor

        self._network, self._predictor = network, Predictor.of(network.trained.loaded, dtype)
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"<Model {self._network.trained.name}: {len(self.class_names)} classes>"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._predictor.class_names

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], **options: Unpack[Options]) -> list[Found]: ...

    @overload
    def __call__(self, images: Any, **options: Unpack[Options]) -> Found: ...

    def __call__(self, images: Any, **options: Unpack[Options]) -> Found | list[Found]:
        """Find the objects in an image, or in each of a list.

        Args:
            images: a path; the bytes of an image file; a picture of Pillow; an array [H, W] or [H, W, 3] (RGB)
                uint8, or [H, W, 4], whose alpha is dropped; a tensor [3, H, W] uint8, or float from 0 to 1; or a list
                of these.
            options: see Options.

        Returns:
            What was found; for a list, a list. EXIF orientation is applied to files and pictures.

        Raises:
            ValueError: if an image is none of these, or an option is out of range.
            model.errors.UserError: if a file is none that can be read, or the network has no such class.
        """
        is_list = isinstance(images, list | tuple)
        found = self.stream(images if is_list else [images], **options)
        return list(found) if is_list else next(found)

    def stream(
        self,
        images: Iterable[Any],
        *,
        threshold: float | Literal["best"] = 0.5,
        classes: Sequence[str] = (),
        tile: int = 0,
        overlap: float = 0.2,
        whole: bool = True,
    ) -> Iterator[Found]:
        """Find the objects of many images, such as frames of a video: what is found comes in the images' order.

        Images are taken as they are needed, up to eight batches ahead. Options and errors are those of a call.
        """
        from model.inference.tiles import Tiling, find_objects

        if isinstance(images, str | bytes | PathLike):
            raise ValueError(f"images: must be several to stream, got {images!r}; call the model with a single one")
        _require_options(threshold, classes, tile, overlap)
        tiling = Tiling(int(tile), overlap, whole) if tile else None
        lowest = self._network.lowest_scores(threshold, tuple(classes))
        if caution := self._network.caution(threshold, in_tiles=tiling is not None):
            warnings.warn(caution, stacklevel=2)
        pixels = (pixels_of(image, self._predictor.pixel_range) for image in images)
        for part in _parts(pixels, self._batch_size * _BATCHES):
            found = find_objects(
                self._predictor, enumerate(part), lowest, tiling=tiling, batch_size=self._batch_size
            )  # fmt: skip
            objects_of = dict(found)
            for number, image in enumerate(part):
                instances = [self._instance(one) for one in objects_of[number]]
                yield Found(instances, image, self.class_names)

    def _instance(self, one: dict[str, Any]) -> Instance:
        x1, y1, x2, y2 = one["bbox"]
        return Instance(
            label=one["class"],
            score=one["score"],
            box=(x1, y1, x2, y2),
            class_index=one["label"] - 1,
            category_id=one["category_id"],
            rle=one.get("segmentation"),
        )


def _require_device(device: str) -> None:
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device: must be auto, cpu, cuda or cuda:N, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: must be cpu or auto where torch finds no GPU, as here, got {device}")


def _require_options(threshold: Any, classes: Any, tile: Any, overlap: Any) -> None:
    from components.config import MIN_TILE_PX

    is_list = isinstance(classes, Iterable) and not isinstance(classes, str | bytes)
    for name, value, is_right, must in (
        ("threshold", threshold, threshold == "best" or (_is_number(threshold) and 0 <= threshold <= 1),
         "from 0 to 1, or best"),
        ("classes", classes, is_list, "a list of names"),
        ("tile", tile, _is_number(tile) and int(tile) == tile and (tile == 0 or tile >= MIN_TILE_PX),
         f"0 or a side of at least {MIN_TILE_PX} pixels"),
        ("overlap", overlap, _is_number(overlap) and 0 < overlap <= 0.9, "above 0 and at most 0.9"),
    ):  # fmt: skip
        if not is_right:
            raise ValueError(f"{name}: must be {must}, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _parts(images: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` images."""
    while part := list(itertools.islice(images, size)):
        yield part
