"""Drawing of a generated image: background, shapes, and the visible part of each shape.

Shapes: h × w the image, S times as fine on the canvas where outlines are filled; K drawn shapes in painter's order, the
last on top. Coordinates are (x, y) in pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Outline = list[NDArray[np.float64]]  # parts [V, 2]
Size = tuple[int, int]  # (height, width)

_SUPERSAMPLING = 3
_DIAMETERS = (0.10, 0.55)  # fractions of the image's shorter side
_CROWD_MEMBERS = (6, 12)


@dataclass(frozen=True)
class DrawnShape:
    """One shape to paint: class label from 1, outline in pixels, colour [3] 0 to 255."""

    label: int
    outline: Outline
    colour: NDArray[np.float64]
    crowd: bool = False  # member of a cluster that is annotated as a whole


def _circle() -> Outline:
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _square() -> Outline:
    return [np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])]


def _triangle() -> Outline:
    angles = np.arange(3) * 2 * np.pi / 3
    return [np.stack([np.cos(angles), np.sin(angles)], axis=1)]


def _star() -> Outline:
    angles, radii = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.42, 1.0)
    return [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]


def _bars() -> Outline:
    bar = np.array([(-0.85, 0.2), (0.85, 0.2), (0.85, 0.65), (-0.85, 0.65)])
    return [bar, -bar]


# Outlines in the unit circle; label k is the k-th, counted from 1.
_OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "bars": _bars}
CLASS_NAMES = tuple(_OUTLINES)


def ground(size: Size, rng: Generator) -> NDArray[np.float64]:
    """A textured background [h, w, 3], 0 to 255: soft patches of muted colours, and grain."""
    height, width = size
    base = rng.uniform(60, 195, 3)
    patches = np.clip(base + rng.normal(0, 22, (6, 6, 3)), 0, 255).astype(np.uint8)
    soft = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    fine = rng.normal(0, 1, (-(-height // 2), -(-width // 2), 1)).repeat(2, axis=0).repeat(2, axis=1)
    return soft + 7 * fine[:height, :width] + rng.normal(0, 4, (height, width, 1))


def place_shapes(
    size: Size, max_objects: int, *, crowd: bool, mean_colour: NDArray[np.float64], rng: Generator
) -> list[DrawnShape]:
    """Draw one to max_objects shapes, in painter's order; below them a cluster of tiny ones if `crowd`."""
    shapes = _cluster(size, mean_colour, rng) if crowd else []
    discs = np.zeros((0, 3))  # (x, y, radius) of the shapes so far
    colours = [mean_colour]
    for _ in range(int(rng.integers(1, max_objects + 1))):
        disc = _free_disc(size, discs, rng)
        colours.append(_distinct_colour(colours, rng))
        shapes.append(_shape(int(rng.integers(len(CLASS_NAMES))) + 1, disc, colours[-1], rng))
        discs = np.vstack([discs, disc])
    return shapes


def coverage(shapes: list[DrawnShape], size: Size) -> NDArray[np.float64]:
    """Visible fraction of each shape in each pixel: [K, h, w], 0 to 1; later shapes hide earlier ones."""
    height, width = size
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for rank, shape in enumerate(shapes, 1):
        for part in shape.outline:
            # PIL's coordinates are pixel centres, ours the continuous plane: half a fine pixel apart.
            draw.polygon((part * _SUPERSAMPLING - 0.5).ravel().tolist(), fill=rank)
    fine = np.asarray(canvas)
    cover = np.zeros((len(shapes), height, width))
    steps = range(_SUPERSAMPLING)
    for sample in [fine[i::_SUPERSAMPLING, j::_SUPERSAMPLING] for i in steps for j in steps]:
        cover += sample == np.arange(1, len(shapes) + 1)[:, None, None]
    return cover / _SUPERSAMPLING**2


def area(shape: DrawnShape) -> float:
    """Area of the whole shape in square pixels, including hidden parts and parts outside the frame."""
    total = 0.0
    for part in shape.outline:
        x, y = part.T
        total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return total


def paint(
    background: NDArray[np.float64], shapes: list[DrawnShape], seen: NDArray[np.float64], rng: Generator
) -> NDArray[np.uint8]:
    """Blend the shapes' colours over the background by coverage `seen` [K, h, w], and add grain: [h, w, 3] uint8."""
    pixels = background * (1 - seen.sum(axis=0))[..., None]
    for shape, share in zip(shapes, seen, strict=True):
        pixels += share[..., None] * shape.colour
    return np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)


def _cluster(size: Size, mean_colour: NDArray[np.float64], rng: Generator) -> list[DrawnShape]:
    """Draw a cluster of tiny shapes of one class."""
    reach = 0.22 * min(size)
    centre = rng.uniform(reach, np.array(size[::-1]) - reach)
    label, colour = int(rng.integers(len(CLASS_NAMES))) + 1, _distinct_colour([mean_colour], rng)
    offsets = rng.uniform(-reach, reach, (int(rng.integers(*_CROWD_MEMBERS)), 2)) * 0.8
    radius = 0.035 * min(size)
    return [_shape(label, np.array([*(centre + offset), radius]), colour, rng, crowd=True) for offset in offsets]


def _shape(
    label: int, disc: NDArray[np.float64], colour: NDArray[np.float64], rng: Generator, *, crowd: bool = False
) -> DrawnShape:
    """Make a shape at a random angle inside a disc (x, y, radius)."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    outline = [disc[:2] + disc[2] * part @ turn for part in _OUTLINES[CLASS_NAMES[label - 1]]()]
    return DrawnShape(label, outline, colour, crowd)


def _free_disc(size: Size, discs: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    """Draw three discs (x, y, radius) and return the one that hides least; it may extend beyond the frame."""
    radius = min(size) / 2 * np.exp(rng.uniform(*np.log(_DIAMETERS)))
    centres = rng.uniform(0.7 * radius, np.array(size[::-1]) - 0.7 * radius, (3, 2))
    gaps = np.linalg.norm(centres[:, None] - discs[None, :, :2], axis=2) - discs[:, 2] - radius
    best = int(np.minimum(gaps, 0).sum(axis=1).argmax())
    return np.array([*centres[best], radius])


def _distinct_colour(others: list[NDArray[np.float64]], rng: Generator) -> NDArray[np.float64]:
    """Draw twelve colours and return the one farthest from all others."""
    candidates = rng.uniform(0, 255, (12, 3))
    distances = np.linalg.norm(candidates[:, None] - np.stack(others)[None], axis=2)
    return np.asarray(candidates[distances.min(axis=1).argmax()])
