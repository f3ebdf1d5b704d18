"""Drawing of instances on images: filled masks, outlines, boxes and labels, one colour per class.

Boxes are (x1, y1, x2, y2) and masks COCO RLE, both in pixels of the image. Small images are enlarged to make labels
legible. Labels do not cover one another: each takes the first free place at its box, the surest first; one without any
is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask

from model.inference.colors import Color, class_color
from model.inference.fonts import font_for, shortened
from model.inference.outlines import cropped_mask

Corners = tuple[float, float, float, float]  # xyxy

_MIN_SIDE_PX = 512  # minimum of the longer side of a drawing
_FILL = 0.45  # opacity of a mask
_SHOWN_CHARS = 40  # longest name; a longer one loses its middle
_GAP_PX = 8  # between pictures
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class _Style:
    """Size of a drawing, and widths in pixels that suit it."""

    width: int
    height: int
    line: int
    font_px: int

    @staticmethod
    def of(width: int, height: int, longer_side_px: int | None = None) -> "_Style":
        longer = max(width, height)
        scale = longer_side_px / longer if longer_side_px else max(1, -(-_MIN_SIDE_PX // longer))
        drawn = round(scale * longer)
        return _Style(
            width=max(round(scale * width), 1),
            height=max(round(scale * height), 1),
            line=max(2, drawn // 400),
            font_px=max(11, drawn // 55),
        )


def draw_objects(
    image: NDArray[np.uint8],
    objects: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    longer_side_px: int | None = None,
) -> Image.Image:
    """Draw the objects of a Predictor, or ground truth: objects without a score.

    Args:
        image: [H, W, 3] uint8 RGB.
        objects: {"label": from 1, "bbox": xyxy} each and, if there are, "score" and "segmentation" (COCO RLE of H × W).
        class_names: the name of label k at index k - 1.
        longer_side_px: size of the drawing; by default that of the image, or an integer multiple if it is small.
    """
    height, width = image.shape[:2]
    style = _Style.of(width, height, longer_side_px)
    factors = np.tile([style.width / width, style.height / height], 2)
    canvas = Image.fromarray(image).resize((style.width, style.height), Image.Resampling.BICUBIC)
    surest_first = sorted(objects, key=lambda one: -one.get("score", 0.0))
    for one in surest_first[::-1]:  # the surest on top
        if one.get("segmentation") is not None:
            _draw_mask(canvas, one["segmentation"], class_color(one["label"]), style)
    draw = ImageDraw.Draw(canvas)
    for one in surest_first[::-1]:
        draw.rectangle((one["bbox"] * factors).tolist(), outline=class_color(one["label"]), width=style.line)
    taken: list[Corners] = []  # labels drawn so far
    for one in surest_first:
        name = shortened(" ".join(class_names[one["label"] - 1].split()), _SHOWN_CHARS)
        font = font_for(name, class_names, style.font_px)
        text = _fitted(f"{name} {one['score']:.2f}" if "score" in one else name, font, style)
        if (place := _free_place(text, font, one["bbox"] * factors, style, taken)) is not None:
            _draw_label(draw, text, place, class_color(one["label"]), font)
            taken.append(place)
    return canvas


def side_by_side(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Join pictures in one row, each below its title."""
    return grid([pictures], titles)


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Join rows of pictures below the titles of their columns, in equal cells; a smaller picture is in their middle."""
    width, height = (max(picture.size[axis] for row in rows for picture in row) for axis in (0, 1))
    font = ImageFont.load_default(max(14, width // 32))
    width = max(width, *(int(font.getlength(title)) + 2 * _GAP_PX for title in titles))
    top = int(font.getbbox("Ag")[3]) + 2 * _GAP_PX
    size = (len(titles) * (width + _GAP_PX) - _GAP_PX, top + len(rows) * (height + _GAP_PX) - _GAP_PX)
    joined = Image.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(joined)
    for column, title in enumerate(titles):
        draw.text((column * (width + _GAP_PX) + _GAP_PX, _GAP_PX), title, fill=_BLACK, font=font)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            left = column * (width + _GAP_PX) + (width - picture.width) // 2
            upper = top + row * (height + _GAP_PX) + (height - picture.height) // 2
            joined.paste(picture, (left, upper))
    return joined


def _draw_mask(canvas: Image.Image, rle: Mapping[str, Any], color: Color, style: _Style) -> None:
    """Fill a mask with a translucent colour and give it a solid outline."""
    margin = style.line + 1  # the outline filter needs pixels outside the mask's edge
    if canvas.size == tuple(rle["size"][::-1]):
        mask, left, upper = cropped_mask(rle)
        area = Image.fromarray(mask.astype(np.uint8) * 255)
    else:
        whole = Image.fromarray(coco_mask.decode(rle) * np.uint8(255)).resize(canvas.size, Image.Resampling.NEAREST)
        left, upper, *_ = box = whole.getbbox() or (0, 0, 0, 0)
        area = whole.crop(box)
    if 0 in area.size:
        return
    frame = (max(left - margin, 0), max(upper - margin, 0))
    size = (left - frame[0] + area.width + margin, upper - frame[1] + area.height + margin)
    area = area.crop((frame[0] - left, frame[1] - upper, frame[0] - left + size[0], frame[1] - upper + size[1]))
    inside = area.filter(ImageFilter.MinFilter(2 * (style.line // 2) + 1))
    opacity = Image.composite(area.point(lambda value: int(value * _FILL)), area, inside)
    canvas.paste(color, frame, opacity)


def _fitted(text: str, font: Any, style: _Style) -> str:
    """The text, without its middle if it is wider than the picture."""
    most = len(text)
    while most > 2 and font.getlength(shortened(text, most)) > style.width - 6:
        most -= 1
    return shortened(text, most)


def _free_place(
    text: str, font: Any, box: NDArray[np.float64], style: _Style, taken: Sequence[Corners]
) -> Corners | None:
    """Place of a tag at its box, within the picture, where no other tag is."""
    _, _, right, lower = font.getbbox(text)
    width, height = right + 6, lower + 4
    x1, y1, x2, y2 = np.array(taken).reshape(-1, 4).T
    for x, y in _places(box, width, height):
        x, y = min(max(x, 0), max(style.width - width, 0)), min(max(y, 0), max(style.height - height, 0))
        if not ((x < x2) & (x1 < x + width) & (y < y2) & (y1 < y + height)).any():
            return x, y, x + width, y + height
    return None


def _draw_label(draw: ImageDraw.ImageDraw, text: str, place: Corners, color: Color, font: Any) -> None:
    x1, y1, x2, y2 = place
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    draw.text((x1 + 3, y1 + 2), text, fill=_BLACK if luminance > 140 else _WHITE, font=font)


def _places(box: NDArray[np.float64], width: float, height: float) -> Iterator[tuple[float, float]]:
    """Upper left corners for a tag: above the box, within, below; at its left edge, its right edge, then beside it."""
    x1, y1, x2, y2 = box.tolist()
    rows = [y1 + row * height for row in range(int((y2 - y1) // height))]
    for columns in ((x1, x2 - width), (x2, x1 - width)):
        for y in (y1 - height, *rows, y2, y1 - 2 * height, y2 + height):
            yield from ((x, y) for x in columns)
