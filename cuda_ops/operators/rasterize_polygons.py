"""Polygons cropped to boxes and filled on a small grid, bit for bit as pycocotools fills them.

Shapes: N images, R boxes an image, B boxes at a time, G instances an image, V vertices, T parts, E edges of one
instance (padded), M side of the grid. Boxes are (x1, y1, x2, y2) in pixels of the polygons.

pycocotools rounds vertices to fifths of a cell, walks along each edge in steps of a fifth, notes where the walk passes
the middle of a column (from fifth 5c + 2 to 5c + 3), and fills each column below an odd number of such crossings. An
edge passes the middle of a column at most once, so edges × columns, all at once, tell the same; only the arithmetic of
a step must agree.
Source: COCO API, rleFrPoly; the crop is detectron2's rasterize_polygons_within_box.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cuda_ops import examples
from cuda_ops.checks import is_integer, kind, require, require_boxes, require_one_device, require_whole
from cuda_ops.declaration import Kernel, Operator

__all__ = ["rasterize_polygons"]

FIFTHS = 5
MIN_SIDE_PX = 0.1
FARTHEST = 2.0**50  # fifths of a cell; a point farther out is moved here, so that no walk along an edge meets infinity
CHUNK_CROSSINGS = 2**18  # edge × column pairs at once: some 30 MiB of temporaries, little enough to stay in cache


class PackedPolygons(Protocol):
    """Instance i owns parts instance_offsets[i] to [i + 1], part t owns vertices part_offsets[t] to [t + 1].

    An offset beyond the last part or vertex counts as the end, one below an earlier one as that one.
    """

    @property
    def xy(self) -> Tensor: ...  # [V, 2] float, pixels
    @property
    def part_offsets(self) -> Tensor: ...  # [T + 1] int
    @property
    def instance_offsets(self) -> Tensor: ...  # [N·G + 1] int
    @property
    def max_vertices(self) -> int: ...  # at least the vertices of any one instance
    @property
    def max_parts(self) -> int: ...  # at least the parts of any one instance


def rasterize_polygons(boxes: Tensor, instance_idxs: Tensor, polygons: PackedPolygons, size: int) -> Tensor:
    """Cut instances out by boxes and fill them: the targets of a mask head.

    Args:
        boxes: [N, R, 4] float, pixels of the polygons.
        instance_idxs: [N, R] int, row of the instance in its image, 0 … G - 1; any other row is an empty instance.
        polygons: N·G instances, packed; an instance without parts is empty everywhere.
        size: side of a mask in cells; a box is stretched over size × size of them, its sides taken as at least 0.1 px.

    Returns:
        [N, R, size, size] float32 of 0 and 1, whatever the numbers: a coordinate of a box that is nan counts as 0, a
        box of infinite length cuts out nothing, and a vertex that is nan lies on the first corner of its box.

    Raises:
        ValueError: if a shape or dtype is not as above, or the instances do not divide evenly among the images.

    Source: equals, bit for bit, detectron2's rasterize_polygons_within_box on pycocotools (frPyObjects, merge, decode).
    """
    op = "rasterize_polygons"
    require_boxes(boxes, op, "boxes", dims=(3,))
    shape = boxes.shape[:2]
    require(
        is_integer(instance_idxs) and instance_idxs.shape == shape,
        op,
        "instance_idxs",
        f"{list(shape)} int",
        kind(instance_idxs),
    )
    _require_polygons(polygons)
    num_instances = polygons.instance_offsets.numel() - 1
    is_even = num_instances % shape[0] == 0 if shape[0] else num_instances == 0
    require(is_even, op, "polygons", f"the same number of instances for {shape[0]} images", num_instances)
    require(size > 0, op, "size", "positive", size)
    require_whole(op, size=size)
    tensors = {"xy": polygons.xy, "part_offsets": polygons.part_offsets, "instance_offsets": polygons.instance_offsets}
    require_one_device(op, boxes=boxes, instance_idxs=instance_idxs, **tensors)
    return OPERATOR.on(boxes.device)(boxes, instance_idxs, _within_bounds(polygons), size)


def _require_polygons(polygons: PackedPolygons) -> None:
    xy = polygons.xy
    is_right = xy.dim() == 2 and xy.shape[1] == 2 and xy.is_floating_point()
    require(is_right, "rasterize_polygons", "polygons.xy", "[V, 2] float", kind(xy))
    for name, offsets in (("part", polygons.part_offsets), ("instance", polygons.instance_offsets)):
        is_right = is_integer(offsets) and offsets.dim() == 1 and offsets.numel() > 0
        require(is_right, "rasterize_polygons", f"polygons.{name}_offsets", "[1 or more] int", kind(offsets))


def _within_bounds(polygons: PackedPolygons) -> "Polygons":
    """Polygons whose offsets point at what is there and never fall: kernels read memory at them, and the host would
    have to wait for the device to refuse wrong ones.
    """
    return Polygons(
        polygons.xy,
        _ascending(polygons.part_offsets, len(polygons.xy)),
        _ascending(polygons.instance_offsets, polygons.part_offsets.numel() - 1),
        polygons.max_vertices,
        polygons.max_parts,
    )


def _ascending(offsets: Tensor, end: int) -> Tensor:
    wide = offsets.to(torch.promote_types(offsets.dtype, torch.int32))
    return wide.clamp(0, end).cummax(0).values


@torch.no_grad()
def _reference(boxes: Tensor, instance_idxs: Tensor, polygons: PackedPolygons, size: int) -> Tensor:
    num_images, num_boxes = instance_idxs.shape
    num_edges = min(polygons.max_vertices, len(polygons.xy))
    num_instances = polygons.instance_offsets.numel() - 1
    if not (num_edges and num_instances) or not instance_idxs.numel() or polygons.part_offsets.numel() < 2:
        return torch.zeros(num_images, num_boxes, size, size, device=boxes.device)
    per_image = num_instances // num_images
    is_row = (instance_idxs >= 0) & (instance_idxs < per_image)
    first = torch.arange(num_images, device=boxes.device)[:, None] * per_image
    instances = (instance_idxs.long().clamp(0, per_image - 1) + first).flatten()
    next_vertex, part = _edges(polygons.part_offsets.long(), len(polygons.xy))
    chunk = max(1, CHUNK_CROSSINGS // (num_edges * size))
    masks = []
    rows = zip(*(values.split(chunk) for values in (boxes.reshape(-1, 4), instances, is_row.flatten())), strict=True)
    for crop, idx, exists in rows:
        first_part = polygons.instance_offsets[idx].long()
        start = polygons.part_offsets[first_part].long()
        stop = polygons.part_offsets[polygons.instance_offsets[idx + 1].long()].long()
        vertex = start[:, None] + torch.arange(num_edges, device=boxes.device)  # [B, E]
        is_real = (vertex < stop[:, None]) & exists[:, None]
        vertex = vertex.clamp_(max=len(polygons.xy) - 1)
        ends = torch.stack((vertex, next_vertex[vertex]))
        x, y = _to_fifths(polygons.xy[ends], crop, size).unbind(-1)  # [2, B, E] each
        local_part = (part[vertex] - first_part[:, None]).clamp_(0, polygons.max_parts - 1)
        row = _crossings(x, y, size).masked_fill_(~is_real[..., None], size)
        masks.append(_fill(row, local_part, polygons.max_parts))
    return torch.cat(masks).view(num_images, num_boxes, size, size)


def _edges(part_offsets: Tensor, num_vertices: int) -> tuple[Tensor, Tensor]:
    """Successor of each vertex around its part, and its part: [V] int64 both."""
    vertex = torch.arange(num_vertices, device=part_offsets.device)
    part = torch.searchsorted(part_offsets, vertex, right=True).sub_(1).clamp_(0, len(part_offsets) - 2)
    following = torch.where(vertex + 1 == part_offsets[part + 1], part_offsets[part], vertex + 1)
    return following.clamp_(max=num_vertices - 1), part


def _to_fifths(xy: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Points [2, B, E, 2] in the frame of boxes [B, 4], in whole fifths of a cell, as float64 that holds integers."""
    boxes = boxes.double().nan_to_num()
    side = (boxes[:, 2:] - boxes[:, :2]).clamp_(min=MIN_SIDE_PX)
    scale = (
        torch.full_like(side, size) / side
    )  # torch divides a number by a tensor as reciprocal times number: rounded twice
    xy = (xy.double() - boxes[:, None, :2]).mul_(scale[:, None])
    xy.nan_to_num_(0.0, FARTHEST, -FARTHEST).mul_(FIFTHS).add_(0.5).trunc_()  # towards 0, as a C cast does
    return xy.clamp_(-FARTHEST, FARTHEST)


def _crossings(x: Tensor, y: Tensor, size: int) -> Tensor:
    """The row from which on each edge inverts each column: x, y [2, B, E] → [B, E, M] int64; M where it does not.

    Steps of a fifth are taken along the longer axis, from its lower end, whichever way the edge runs.
    """
    dx, dy = (x[1] - x[0]).abs_(), (y[1] - y[0]).abs_()
    is_flat = dx >= dy
    is_flipped = torch.where(is_flat, x[0] > x[1], y[0] > y[1])
    x0, x1 = torch.where(is_flipped, x.flip(0), x)
    y0, y1 = torch.where(is_flipped, y.flip(0), y)
    slope = torch.where(is_flat, (y1 - y0) / dx, (x1 - x0) / dy)[..., None]
    left = torch.arange(size, device=x.device, dtype=x.dtype) * FIFTHS + 2  # [M]: the last fifth left of the middle
    lowest, highest = torch.minimum(x0, x1)[..., None], torch.maximum(x0, x1)[..., None]
    is_crossing = (lowest <= left) & (left < highest)
    x0, y0, is_flat = x0[..., None], y0[..., None], is_flat[..., None]
    row = torch.where(is_flat, _flat_rows(left, x0, y0, slope), _steep_rows(left, x0, y0, slope))
    row.add_(2).div_(FIFTHS).floor_().clamp_(0, size)  # the first cell whose middle is not above
    return row.masked_fill_(~is_crossing, size).long()


def _flat_rows(left: Tensor, x0: Tensor, y0: Tensor, slope: Tensor) -> Tensor:
    """y of the upper of the two steps at x = left and left + 1, in fifths."""
    step = (left - x0).add_(slope < 0)
    return step.mul_(slope).add_(y0).add_(0.5).floor_()


def _steep_rows(left: Tensor, x0: Tensor, y0: Tensor, slope: Tensor) -> Tensor:
    """y of the last step before x, rounded, passes from left to left + 1 or back, in fifths.

    The step is solved for in real numbers, then the very expression of the walk decides whether rounding came first.
    """
    step = ((left + 0.5 - x0) / slope).round_()
    x = (step * slope).add_(x0).add_(0.5)
    has_passed = torch.where(slope > 0, x >= left + 1, x < left + 1)
    return step.sub_(has_passed.to(step.dtype)).add_(y0)


def _fill(row: Tensor, part: Tensor, num_parts: int) -> Tensor:
    """Even-odd fill of each part, united: row [B, E, M] by column, part [B, E] → [B, M, M] float32."""
    num_boxes, _, size = row.shape
    column = torch.arange(size, device=row.device)
    stride = size + 1  # row M collects what crosses nothing
    slot = part[..., None].mul(size).add(column).mul_(stride).add_(row)
    inverted = torch.zeros(num_boxes, num_parts * size * stride, dtype=torch.uint8, device=row.device)
    ones = torch.ones((), dtype=torch.uint8, device=row.device).expand(slot.flatten(1).shape)
    inverted.scatter_add_(1, slot.flatten(1), ones)
    inverted = inverted.view(num_boxes, num_parts, size, stride)[..., :size]  # wraps at 256, which keeps parity
    is_inside = inverted.cumsum(-1, dtype=torch.int32).bitwise_and_(1).amax(dim=1)  # [B, column, row]
    return is_inside.transpose(1, 2).float()


@torch.no_grad()
def _compiled(boxes: Tensor, instance_idxs: Tensor, polygons: PackedPolygons, size: int) -> Tensor:
    is_double = torch.float64 in (boxes.dtype, polygons.xy.dtype)
    dtype = torch.float64 if is_double else torch.float32  # neither loses anything
    return torch.ops.cuda_ops.rasterize_polygons(
        boxes.to(dtype),
        instance_idxs.to(torch.int64),
        polygons.xy.to(dtype),
        polygons.part_offsets.to(torch.int32),
        polygons.instance_offsets.to(torch.int32),
        size,
    )


def _fake(
    boxes: Tensor, instance_idxs: Tensor, xy: Tensor, part_offsets: Tensor, instance_offsets: Tensor, size: int
) -> Tensor:
    return boxes.new_empty(boxes.shape[0], boxes.shape[1], size, size, dtype=torch.float32)


@dataclass(frozen=True)
class Polygons:
    """Packed polygons and nothing besides; `PackedPolygons` says what the fields are."""

    xy: Tensor
    part_offsets: Tensor
    instance_offsets: Tensor
    max_vertices: int
    max_parts: int


def _example(device: torch.device) -> dict[str, Any]:
    """Two images of two instances, a square each."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], device=device)
    xy = (corners[None] * 60 + examples.uniform(4, 1, 2, device=device) * 100).reshape(-1, 2)
    offsets = torch.arange(5, dtype=torch.int32, device=device)
    return {
        "boxes": examples.boxes(2, 20, device=device),
        "instance_idxs": torch.arange(40, device=device).view(2, 20) % 2,
        "polygons": Polygons(xy, offsets * 4, offsets, max_vertices=4, max_parts=1),
        "size": 28,
    }


OPERATOR = Operator(
    function=rasterize_polygons,
    reference=_reference,
    compiled=_compiled,
    kernels=(
        Kernel(
            "rasterize_polygons(Tensor boxes, Tensor instance_idxs, Tensor xy, Tensor part_offsets,"
            " Tensor instance_offsets, int size) -> Tensor",
            fake=_fake,
        ),
    ),
    example=_example,
)
