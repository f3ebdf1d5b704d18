"""Copy-paste: objects of one training image on another (simple copy-paste, arXiv:2012.07177).

Both images are resized, cropped and flipped before. What is pasted hides what is below: a hidden object loses those
pixels and gets a new box, and is dropped if no pixel is left. Images are [h, w, 3] uint8 RGB; instances are in their
pixels and without crowds, which are never pasted, and of which training sees nothing.
"""

import numpy as np
import pycocotools.mask as coco_mask
from numpy.typing import NDArray

from model.data.crop import clip_polygon, crop_image, crop_instances
from model.data.index import CocoInstances
from model.data.outlines import Parts, pack_instances, parts_of_each
from model.data.polygons import mask_to_polygons
from model.data.transforms import Floats, Pixels, Size

_MAX_PASTED = 30  # bounds the time of a sample
Mask = NDArray[np.bool_]


def paste(
    image: Pixels,
    instances: CocoInstances,
    source: Pixels,
    source_instances: CocoInstances,
    rng: np.random.Generator,
) -> tuple[Pixels, CocoInstances]:
    """Paste a random subset of a source's objects onto an image, which stays as large as it is.

    The source is placed at random: within the image along each side that is shorter than the image's, else so that it
    covers the whole side.
    """
    source, source_instances, corner = _place(source, source_instances, image.shape[:2], rng)
    size, parts = image.shape[:2], parts_of_each(source_instances)
    order = rng.permutation(len(parts))
    wanted = order[: rng.integers(1, min(len(parts), _MAX_PASTED) + 1)] if len(parts) else order
    packed = {k: _pack_mask(parts[k], size) for k in wanted.tolist()}
    pasted = [k for k in sorted(packed) if coco_mask.area(packed[k])]
    if not pasted:
        return image, instances
    cover = coco_mask.merge([packed[k] for k in pasted])
    mask = coco_mask.decode(cover).astype(bool)
    boxes, visible, left = _visible(instances, cover, mask)
    both = pack_instances(
        boxes=[*boxes, *source_instances.boxes[pasted]],
        labels=np.concatenate([instances.labels[visible], source_instances.labels[pasted]]),
        is_crowd=np.concatenate([instances.is_crowd[visible], source_instances.is_crowd[pasted]]),
        parts=[*left, *(parts[k] for k in pasted)],
    )
    return _composed(image, source, corner, mask), both


def _place(
    source: Pixels, instances: CocoInstances, size: Size, rng: np.random.Generator
) -> tuple[Pixels, CocoInstances, tuple[int, int]]:
    """Cut the source to the image; return also its corner (top, left) there. Instances are in the image's pixels."""
    room = [own - other for own, other in zip(size, source.shape[:2], strict=True)]
    top, left = (int(rng.integers(abs(pixels) + 1)) for pixels in room)
    window = (
        top if room[0] < 0 else 0,
        left if room[1] < 0 else 0,
        min(size[0], source.shape[0]),
        min(size[1], source.shape[1]),
    )
    corner = (top if room[0] > 0 else 0, left if room[1] > 0 else 0)
    cut = crop_instances(instances, window)
    shift, limits = np.array(corner[::-1], dtype=np.float32), np.array(window[:1:-1], dtype=np.float32)
    # An outline may go beyond its image, where there are no pixels to paste.
    clipped = [[clip_polygon(part, limits) for part in of_instance] for of_instance in parts_of_each(cut)]
    parts = [[part + shift for part in of_instance if len(part) >= 3] for of_instance in clipped]
    moved = pack_instances([*(cut.boxes + np.tile(shift, 2))], cut.labels, cut.is_crowd, parts)
    return crop_image(source, window), moved, corner


def _composed(image: Pixels, source: Pixels, corner: tuple[int, int], mask: Mask) -> Pixels:
    """The image with the source's pixels where the mask [h, w] is set."""
    image = image.copy()
    (top, left), (height, width) = corner, source.shape[:2]
    frame = np.s_[top : top + height, left : left + width]
    np.copyto(image[frame], source, where=mask[frame][..., None])
    return image


def _visible(instances: CocoInstances, cover: object, mask: Mask) -> tuple[list[Floats], list[int], list[Parts]]:
    """Instances of which the cover leaves something: boxes, indices and parts; unchanged where it hides nothing."""
    boxes, visible, left = [], [], []
    for k, parts in enumerate(parts_of_each(instances)):
        packed, box = _pack_mask(parts, mask.shape), instances.boxes[k]
        if coco_mask.area(coco_mask.merge([packed, cover], intersect=True)):
            parts, box = _trace(coco_mask.decode(packed).astype(bool) & ~mask)
            if not parts:
                continue
        boxes.append(box)
        visible.append(k)
        left.append(parts)
    return boxes, visible, left


def _trace(mask: Mask) -> tuple[Parts, Floats]:
    """Outlines and box of a mask [h, w]; none, and (0, 0, 0, 0), if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [], np.zeros(4, dtype=np.float32)
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
    window = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return [outline + box[:2] for outline in mask_to_polygons(window)], box


def _pack_mask(parts: Parts, size: Size) -> object:
    """COCO RLE of an instance in an image of `size`."""
    polygons = [part.ravel().astype(float).tolist() for part in parts]
    empty = {"size": list(size), "counts": [size[0] * size[1]]}
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if parts else coco_mask.frPyObjects(empty, *size)
