"""CUDA graphs of whole training steps (`train.cuda_graph`): forward, backward and update become one launch.

A graph replays the same kernels on the same memory, so it is made for one shape of batch. Images come in few shapes (`data.buckets`); ground
truth comes in powers of two (`model.data.collate`) and is padded to the most of any batch so far, so that soon each bucket has one graph.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, whole-network capture.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import TrainConfig
from model.distributed import world_size
from model.errors import UserError
from model.structures import Batch, Outcome, Targets

WARMUP_STEPS = 3  # of each shape, before its graph: cuDNN tries its kernels, caches fill
Update: TypeAlias = Callable[[Batch], Outcome]
Shape: TypeAlias = tuple[object, ...]


class GraphCaptureError(UserError):
    """A step could not be captured, and what the attempt left behind is not to be computed with."""


def why_not_graphed(train: TrainConfig, device: torch.device) -> str | None:
    """What keeps the steps of this process from being graphs; None where nothing does."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if world_size() > 1:
        return f"{world_size()} processes train together"
    if train.accumulation_steps > 1:
        return "a step is made of several micro-batches"
    return None


@dataclass(frozen=True)
class TargetSizes:
    """To what ground truth is padded; see `model.structures`."""

    rows: int = 1
    parts: int = 1
    vertices: int = 1
    max_vertices: int = 1
    max_parts: int = 1

    def to_hold(self, targets: Targets) -> "TargetSizes":
        """These sizes, enlarged where the targets need more."""
        polygons = targets.polygons
        needed = {
            "rows": targets.gt_labels.shape[1],
            "parts": len(polygons.part_offsets) - 1,
            "vertices": len(polygons.xy),
            "max_vertices": polygons.max_vertices,
            "max_parts": polygons.max_parts,
        }
        return TargetSizes(**{name: max(getattr(self, name), count) for name, count in needed.items()})


def pad_targets(targets: Targets, sizes: TargetSizes) -> Targets:
    """The same ground truth with more padding. Does not wait for the device."""
    images, rows = targets.gt_labels.shape
    more, polygons = sizes.rows - rows, targets.polygons
    # Padding rows of an image own no part: their offsets repeat where the image ends.
    row = torch.arange(sizes.rows, device=targets.gt_labels.device).clamp(max=rows)  # [G']
    first = torch.arange(images, device=row.device)[:, None] * rows + row  # [N, G']
    last = polygons.instance_offsets[-1:]
    padded = replace(
        polygons,
        xy=F.pad(polygons.xy, (0, 0, 0, sizes.vertices - len(polygons.xy))),
        part_offsets=_repeat_last(polygons.part_offsets, sizes.parts + 1),
        instance_offsets=torch.cat([polygons.instance_offsets[first.flatten()], last]),
        max_vertices=sizes.max_vertices,
        max_parts=sizes.max_parts,
    )
    return Targets(
        F.pad(targets.gt_boxes, (0, 0, 0, more)), F.pad(targets.gt_labels, (0, more)), targets.num_gt, padded
    )


def _repeat_last(offsets: Tensor, length: int) -> Tensor:
    return torch.cat([offsets, offsets[-1:].expand(length - len(offsets))])


class GraphedUpdates:
    """An update of the weights that is replayed as a CUDA graph once its shape is known; until then it runs as it is.

    The update must never wait for the device, take no decision on the host, and keep what changes from step to step (the learning rate)
    in tensors.
    """

    def __init__(self, update: Update, device: torch.device) -> None:
        self._update = update
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they may share memory
        self._sizes = TargetSizes()
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Graph] = {}

    def __call__(self, batch: Batch) -> Outcome:
        """Update the weights by one batch, on the device already. What is returned is never overwritten.

        Raises:
            GraphCaptureError: if a graph cannot be made. Nothing on the device is to be computed with any more, in this process.
        """
        batch = self._padded(batch)
        shape = _shape(batch)
        if shape not in self._graphs and self._seen[shape] >= WARMUP_STEPS:
            self._capture(shape, batch)
        if shape in self._graphs:
            return self._graphs[shape].replay(batch)
        self._seen[shape] += 1
        return self._on_side_stream(batch)

    def _padded(self, batch: Batch) -> Batch:
        assert batch.targets is not None
        sizes = self._sizes.to_hold(batch.targets)
        if sizes != self._sizes:  # graphs of smaller ground truth will not be met again
            self._sizes = sizes
            self._graphs.clear()
            self._seen.clear()
            # Torch frees a pool with its last graph, and then refuses it.
            self._pool = torch.cuda.graph_pool_handle()
        return replace(batch, targets=pad_targets(batch.targets, sizes))

    def _on_side_stream(self, batch: Batch) -> Outcome:
        """As a warm-up must be: a later capture finds nothing that belongs to the default stream."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            outcome = self._update(batch)
        present.wait_stream(self._stream)

        def keep(tensor: Tensor) -> Tensor:
            tensor.record_stream(present)
            return tensor

        return outcome.map(keep)

    def _capture(self, shape: Shape, batch: Batch) -> None:
        inputs = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (the loader's, which pins memory) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._update(inputs)
        except RuntimeError as error:
            # Half a backward pass has left gradients, the loss scaler and the allocator in a state that nothing can tell.
            # The end of a capture fails too, and knows no reason; what was raised before it does.
            told = [str(raised).strip().partition("\n")[0] for raised in (error.__context__, error) if raised]
            reason = "; then ".join(told)
            raise GraphCaptureError(
                f"train.cuda_graph=true: each step must be captured as a CUDA graph, but one could not be ({reason}); "
                "set train.cuda_graph=false, and the same command goes on from the last checkpoint"
            ) from error
        self._graphs[shape] = _Graph(graph, inputs, outputs)


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    outputs: Outcome

    def replay(self, batch: Batch) -> Outcome:
        for own, given in zip(_tensors(self.inputs), _tensors(batch), strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return replace(self.outputs.map(torch.clone), is_replayed=True)


def _shape(batch: Batch) -> Shape:
    assert batch.targets is not None
    polygons = batch.targets.polygons
    return (*(tensor.shape for tensor in _tensors(batch)), polygons.max_vertices, polygons.max_parts)


def _tensors(batch: Batch) -> list[Tensor]:
    """What the network sees of a batch, in a fixed order; image ids stay on the host."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replace(batch, image_ids=batch.seeds).map(note)
    return found
