"""Colours of classes: one class has one colour in every picture, ground truth and predictions alike.

The seven hues are distinct with each kind of colour blindness. Source: Okabe and Ito, Color Universal Design (2008),
without black. With more classes the hues come again, darker, then lighter, then from the start.
"""

Color = tuple[int, int, int]  # RGB, 0 to 255

HUES: tuple[Color, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
)
_SHADES = ((0, 0.0), (0, 0.45), (255, 0.5))  # value and weight of the gray that is mixed in


def class_color(label: int) -> Color:
    """Colour of a label, 1 for the first class."""
    rank = label - 1
    gray, weight = _SHADES[rank // len(HUES) % len(_SHADES)]
    red, green, blue = (round(value + (gray - value) * weight) for value in HUES[rank % len(HUES)])
    return red, green, blue
