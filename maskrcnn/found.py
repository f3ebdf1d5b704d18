"""What a model finds in an image: instances with class, score, box and mask, and other tools' forms of them.

Boxes are (x1, y1, x2, y2); all coordinates are pixels of the given image. Shapes: N instances, H × W the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import supervision
    from PIL.Image import Image

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Instance:
    """One object."""

    label: str  # name of its class
    score: float  # 0 to 1
    box: Box
    class_index: int  # of the model's class_names, from 0
    category_id: int  # COCO's
    rle: dict[str, Any] | None  # mask as COCO's run-length encoding, with text counts; None if the network has none

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """The mask, [H, W]; None if the network has none."""
        from model.inference.outlines import mask_of

        return None if self.rle is None else mask_of(self.rle)

    @property
    def polygons(self) -> list[NDArray[np.float32]] | None:
        """The mask's outlines, [V, 2] each, exact along the pixels' edges; None if the network has no masks."""
        from model.inference.outlines import polygons_of

        return None if self.rle is None else polygons_of(self.rle)


class Found(Sequence[Instance]):
    """The instances of one image, highest score first."""

    def __init__(self, instances: Sequence[Instance], pixels: NDArray[np.uint8], class_names: Sequence[str]) -> None:
        """Bind instances to their image.

        Args:
            pixels: [H, W, 3] uint8 RGB.
            class_names: all names that the model knows.
        """
        self._instances, self.pixels, self.class_names = tuple(instances), pixels, tuple(class_names)

    @overload
    def __getitem__(self, i: int) -> Instance: ...

    @overload
    def __getitem__(self, i: slice | list[int] | NDArray[Any]) -> "Found": ...

    def __getitem__(self, i: int | slice | list[int] | NDArray[Any]) -> "Instance | Found":
        """One instance; or those of a slice, of numbers, or of a condition such as `found.scores > 0.9`."""
        if isinstance(i, slice | list | np.ndarray):
            chosen = np.arange(len(self))[i].tolist()
            return Found([self._instances[k] for k in chosen], self.pixels, self.class_names)
        return self._instances[i]

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[Instance]:
        return iter(self._instances)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for one in self:
            counts[one.label] = counts.get(one.label, 0) + 1
        height, width = self.size
        found = ", ".join(f"{count} {label}" for label, count in counts.items()) or "nothing"
        return f"<{found} in {width} × {height} px>"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4] (x1, y1, x2, y2)."""
        return np.array([one.box for one in self], dtype=np.float32).reshape(-1, 4)

    @property
    def scores(self) -> NDArray[np.float32]:
        """[N]."""
        return np.array([one.score for one in self], dtype=np.float32)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, N."""
        return [one.label for one in self]

    @property
    def masks(self) -> NDArray[np.bool_] | None:
        """[N, H, W]; None if the network has no masks."""
        masks = [mask for one in self if (mask := one.mask) is not None]
        if len(masks) < len(self):
            return None
        return np.stack(masks) if masks else np.zeros((0, *self.size), dtype=bool)

    def draw(self) -> "Image":
        """A picture of the image with masks, boxes and labels, one colour for each class; small images are enlarged."""
        from model.inference.visualize import draw_objects

        objects = [
            {"label": one.class_index + 1, "bbox": one.box, "score": one.score, "segmentation": one.rle} for one in self
        ]
        return draw_objects(self.pixels, objects, self.class_names)

    def to_coco(self, image_id: int | str = 0) -> list[dict[str, Any]]:
        """Results in COCO's format: image_id, category_id, bbox (x, y, width, height), score, segmentation (RLE)."""
        results = []
        for one in self:
            x1, y1, x2, y2 = one.box
            result = {"image_id": image_id, "category_id": one.category_id, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(result | {"score": one.score} | ({"segmentation": one.rle} if one.rle else {}))
        return results

    def to_supervision(self) -> "supervision.Detections":
        """`supervision.Detections`, for its annotators, trackers and zones.

        Raises:
            ImportError: if supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision; pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=np.array([one.class_index for one in self], dtype=int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )
