"""CUDA graphs of whole training steps (`train.cuda_graph`): forward, backward and update become one launch.

A graph replays the same kernels on the same memory, so it fits one shape of batch. Images come in few shapes
(`data.buckets`); ground truth comes in powers of two (`model.data.collate`) and is padded to the maximum of all batches
so far, so that each bucket soon has one graph.
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

WARMUP_STEPS = 3  # steps per shape before its capture: cuDNN tries its kernels, caches fill
Update: TypeAlias = Callable[[Batch], Outcome]
BatchShape: TypeAlias = tuple[object, ...]


class GraphCaptureError(UserError):
    """A step could not be captured; the state that the attempt left behind must not be used."""


def graph_obstacle(train: TrainConfig, device: torch.device) -> str | None:
    """Reason why steps of this process cannot be CUDA graphs; None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if world_size() > 1:
        return f"{world_size()} processes train together"
    if train.accumulation_steps > 1:
        return "a step has several micro-batches"
    return None


@dataclass(frozen=True)
class TargetSizes:
    """Sizes that ground truth is padded to; see `model.structures`."""

    rows: int = 1
    parts: int = 1
    vertices: int = 1
    max_vertices: int = 1
    max_parts: int = 1

    def to_hold(self, targets: Targets) -> "TargetSizes":
        """Return these sizes, enlarged where the targets need more."""
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
    """Pad ground truth to these sizes. Does not wait for the device."""
    images, rows = targets.gt_labels.shape
    more, polygons = sizes.rows - rows, targets.polygons
    # Padding rows own no part: their offsets repeat the end of the image.
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
    """Update of the weights that is replayed as a CUDA graph once a shape is warmed up; until then it runs normally.

    The update must never wait for the device, must not branch on the host, and must keep whatever changes from step to
    step (the learning rate) in tensors.
    """

    def __init__(self, update: Update, device: torch.device) -> None:
        self._update = update
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # graphs run one after another, so they may share memory
        self._sizes = TargetSizes()
        self._seen: Counter[BatchShape] = Counter()
        self._graphs: dict[BatchShape, _Graph] = {}

    def __call__(self, batch: Batch) -> Outcome:
        """Update the weights with one batch that is on the device already. The outcome is never overwritten.

        Raises:
            GraphCaptureError: if capture fails. This process must not use anything on the device afterwards.
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
        if sizes != self._sizes:  # graphs for smaller ground truth are obsolete
            self._sizes = sizes
            self._graphs.clear()
            self._seen.clear()
            # torch frees a pool with its last graph and refuses it afterwards.
            self._pool = torch.cuda.graph_pool_handle()
        return replace(batch, targets=pad_targets(batch.targets, sizes))

    def _on_side_stream(self, batch: Batch) -> Outcome:
        """Run a warm-up step on the side stream, so that a later capture finds no state of the default stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outcome = self._update(batch)
        current.wait_stream(self._stream)

        def keep(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)
            return tensor

        return outcome.map(keep)

    def _capture(self, shape: BatchShape, batch: Batch) -> None:
        inputs = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (the loader's pinning thread) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self._update(inputs)
        except RuntimeError as error:
            # Half a backward pass leaves gradients, the loss scaler and the allocator in an unknown state. Ending the
            # capture fails too, without a reason; the exception before it has one.
            reasons = [str(raised).strip().partition("\n")[0] for raised in (error.__context__, error) if raised]
            reason = "; then ".join(reasons)
            raise GraphCaptureError(
                f"train.cuda_graph=true: each step must be captured as a CUDA graph, but one could not be ({reason}); "
                "set train.cuda_graph=false and run the same command: it continues from the last checkpoint"
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


def _shape(batch: Batch) -> BatchShape:
    assert batch.targets is not None
    polygons = batch.targets.polygons
    return (*(tensor.shape for tensor in _tensors(batch)), polygons.max_vertices, polygons.max_parts)


def _tensors(batch: Batch) -> list[Tensor]:
    """Tensors of a batch that the network reads, in a fixed order; image ids stay on the host."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replace(batch, image_ids=batch.seeds).map(note)
    return found
