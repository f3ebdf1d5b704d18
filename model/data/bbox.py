"""The bbox of an annotation: checked, compared with its segmentation, clipped to the frame."""

from typing import Any

from model.data.findings import Fault, Findings
from model.data.segmentation import Mask
from model.data.values import MAX_PX, Size, from_text, numbers, show

_OUT_OF_FRAME_PX = 1e-3  # a smaller excess over the frame is rounding and not worth a warning
_MIN_SIDE_PX = 1e-2  # float32 cannot keep less in a large image
SLACK_PX = 2.0  # between a box and the extent of its mask
_MIN_OVERLAP = 0.5  # IoU of the two; less is a warning

Box = tuple[float, float, float, float]


def read_bbox(bbox: Any, size: Size, mask: Mask | None, findings: Findings) -> list[float]:
    """The bbox (x, y, width, height), not clipped; that of the mask if it is faulty and repairs are asked for."""
    bbox = from_text(bbox, "bbox", findings)
    try:
        given = _checked_bbox(bbox, size)
    except Fault as fault:
        if mask is None:
            raise
        findings.repairable(fault.kind, str(fault))
        return _bbox_of(mask)
    if mask is None or _is_near(_corners(given), mask.box):
        return given
    if _is_near((given[0], given[1], given[2], given[3]), mask.box):
        text = f"bbox {show(given)} must be x, y, width, height, but is x1, y1, x2, y2 of its segmentation"
        if findings.repairs:
            findings.repaired("bbox as x1, y1, x2, y2", text)
            return _bbox_of(mask)
        findings.warn("bbox as x1, y1, x2, y2", f"{text}; data.on_invalid=mend repairs it")
    elif _iou(clip_bbox(given, size)[0], mask.box) < _MIN_OVERLAP:
        extent = show(_bbox_of(mask))
        findings.warn("bbox not around its segmentation", f"bbox is {show(given)}, the segmentation's {extent}")
    return given


def _checked_bbox(bbox: Any, size: Size) -> list[float]:
    if numbers(bbox) is None or len(bbox) != 4:
        raise Fault(
            "bad box", f"bbox must be four finite numbers (x, y, width, height) within ±{MAX_PX:,}, got {show(bbox)}"
        )
    if bbox[2] <= 0 or bbox[3] <= 0:
        raise Fault("box without area", f"bbox {show(bbox)} has no area; width and height must be > 0")
    (x1, y1, x2, y2), _ = clip_bbox(bbox, size)
    if x2 <= x1 or y2 <= y1:
        raise Fault(
            "box outside the image",
            f"bbox {show(bbox)} lies outside the image of {size[1]} × {size[0]} (width × height)",
        )
    if x2 - x1 < _MIN_SIDE_PX or y2 - y1 < _MIN_SIDE_PX:
        raise Fault("box without area", f"bbox {show(bbox)} has sides below {_MIN_SIDE_PX} px within the image")
    if x2 <= 1 < size[1] and y2 <= 1 < size[0]:
        raise Fault(
            "box within one pixel",
            f"bbox {show(bbox)} lies within the first pixel; it must be in pixels, not fractions of the image",
        )
    return list(bbox)


def clip_bbox(bbox: list[float], size: Size) -> tuple[Box, bool]:
    """A bbox as xyxy clipped to the frame, and whether clipping changed it."""
    x1, y1, x2, y2 = _corners(bbox)
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[1])), min(y2, float(size[0]))
    beyond = max(clipped[0] - x1, clipped[1] - y1, x2 - clipped[2], y2 - clipped[3])
    return clipped, beyond > _OUT_OF_FRAME_PX


def _corners(bbox: list[float]) -> Box:
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def _bbox_of(mask: Mask) -> list[float]:
    x1, y1, x2, y2 = mask.box
    return [x1, y1, x2 - x1, y2 - y1]


def _is_near(box: Box, other: Box) -> bool:
    return all(abs(a - b) <= SLACK_PX for a, b in zip(box, other, strict=True))


def _iou(box: Box, other: Box) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, other)]
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (sum(areas) - shared)
