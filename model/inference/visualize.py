"""Drawing of instances on images: filled masks, outlines, boxes and labels, one colour per instance.

Boxes are (x1, y1, x2, y2) and masks COCO RLE, both in pixels of the image. Small images are enlarged to make labels
legible.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from model.inference.predictor import Object

Color = tuple[int, int, int]

_MIN_SIDE_PX = 512  # minimum of the longer side of a drawing
_FILL = 0.45  # opacity of a mask
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class _Style:
    """Widths in pixels that suit the size of a drawing."""

    scale: int  # ratio of the drawing's size to the image's
    line: int
    font: Any

    @staticmethod
    def of(width: int, height: int) -> "_Style":
        scale = max(1, -(-_MIN_SIDE_PX // max(width, height)))
        longer = scale * max(width, height)
        return _Style(scale, max(2, longer // 400), ImageFont.load_default(max(11, longer // 55)))


def draw_detections(
    image: NDArray[np.uint8],
    boxes: ArrayLike,
    labels: Sequence[int],
    *,
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: Sequence[dict[str, Any]] | None = None,
) -> Image.Image:
    """Draw detections, or ground truth if there are no scores.

    Args:
        image: [H, W, 3] uint8 RGB.
        boxes: [n, 4] xyxy.
        labels: [n], from 1; the name of label k is class_names[k - 1].
        scores: [n], 0 to 1.
        masks: [n] COCO RLE of H × W; without them only boxes are drawn.

    Returns:
        The drawing, an integer multiple of the image's size.
    """
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4)
    height, width = image.shape[:2]
    style = _Style.of(width, height)
    canvas = Image.fromarray(image).resize((width * style.scale, height * style.scale), Image.Resampling.BICUBIC)
    order = np.argsort(scores, kind="stable") if scores is not None else np.arange(len(labels))  # highest score on top
    if masks is not None:
        for i in order:
            _draw_mask(canvas, coco_mask.decode(masks[i]), _color(i), style)
    draw = ImageDraw.Draw(canvas)
    for i in order:
        draw.rectangle((corners[i] * style.scale).tolist(), outline=_color(i), width=style.line)
    for i in order:
        name = class_names[labels[i] - 1]
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        _draw_label(draw, text, corners[i] * style.scale, _color(i), style)
    return canvas


def draw_objects(image: NDArray[np.uint8], objects: Sequence[Object], class_names: Sequence[str]) -> Image.Image:
    """Draw the objects of a Predictor on their image."""
    return draw_detections(
        image,
        [found["bbox"] for found in objects],
        [found["label"] for found in objects],
        class_names=class_names,
        scores=[found["score"] for found in objects],
        masks=[found["segmentation"] for found in objects if "segmentation" in found] or None,
    )


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Join pictures in one row, each below its title."""
    gap = 8
    font = ImageFont.load_default(max(14, pictures[0].width // 32))
    top = font.getbbox("Ag")[3] + 2 * gap
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (int(width), int(top + max(picture.height for picture in pictures))), _WHITE)
    draw = ImageDraw.Draw(row)
    left = 0
    for picture, title in zip(pictures, titles, strict=True):
        row.paste(picture, (left, int(top)))
        draw.text((left + gap, gap), title, fill=_BLACK, font=font)
        left += picture.width + gap
    return row


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    """Join pictures in one column."""
    column = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), _WHITE)
    top = 0
    for row in rows:
        column.paste(row, (0, top))
        top += row.height
    return column


def _draw_mask(canvas: Image.Image, mask: NDArray[np.uint8], color: Color, style: _Style) -> None:
    """Fill a mask with a translucent colour and give it a solid outline."""
    if not mask.any():
        return
    area = Image.fromarray(mask * np.uint8(255)).resize(canvas.size, Image.Resampling.NEAREST)
    left, upper, right, lower = area.getbbox() or (0, 0, 0, 0)
    margin = style.line + 1  # the outline filter needs pixels outside the mask's edge
    frame = (max(left - margin, 0), max(upper - margin, 0), right + margin, lower + margin)
    area = area.crop(frame)
    inside = area.filter(ImageFilter.MinFilter(2 * (style.line // 2) + 1))
    opacity = Image.composite(area.point(lambda value: int(value * _FILL)), area, inside)
    canvas.paste(color, frame, opacity)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, box: NDArray[np.float64], color: Color, style: _Style) -> None:
    """Draw a tag on the box's upper left corner, kept inside the picture."""
    canvas_width, canvas_height = draw.im.size
    _, _, right, lower = draw.textbbox((0, 0), text, font=style.font)
    width, height = right + 6, lower + 4
    x = min(max(box[0], 0), max(canvas_width - width, 0))
    y = box[1] - height if box[1] >= height else min(max(box[1], 0), canvas_height - height)
    draw.rectangle((x, y, x + width, y + height), fill=color)
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    draw.text((x + 3, y + 2), text, fill=_BLACK if luminance > 140 else _WHITE, font=style.font)


def _color(i: int) -> Color:
    """Colour of instance i; hues advance by the golden ratio, so that consecutive instances differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + i * 0.618034) % 1.0, (0.9, 0.65)[i % 2], (1.0, 0.85)[i // 2 % 2])
    return int(red * 255), int(green * 255), int(blue * 255)
