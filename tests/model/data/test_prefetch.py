"""Batches one ahead on the device; what overlaps can be seen on a GPU only."""

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.data.collate import collate
from model.data.dataset import Sample
from model.data.index import CocoInstances
from model.data.prefetch import prefetch
from model.structures import Batch

CPU = torch.device("cpu")


def numbered(k: int, size: int = 32) -> Batch:
    """A batch whose every value tells its number."""
    instances = CocoInstances(
        boxes=np.full((1, 4), k, dtype=np.float32),
        labels=np.array([k]),
        is_crowd=np.zeros(1, dtype=bool),
        xy=np.full((3, 2), k, dtype=np.float32),
        part_offsets=np.array([0, 3]),
        instance_offsets=np.array([0, 1]),
    )
    image = np.full((size, size, 3), k % 256, dtype=np.uint8)
    return collate([Sample(image, k, (size, size), seed=k, instances=instances)] * 2, ((size, size),))


def leaves(record: Any) -> Iterator[Any]:
    for field in fields(record):
        value = getattr(record, field.name)
        if hasattr(value, "__dataclass_fields__"):
            yield from leaves(value)
        else:
            yield value


def test_on_the_cpu_batches_pass_through_one_by_one():
    asked: list[int] = []

    def source() -> Iterator[Batch]:
        for k in count():
            asked.append(k)
            yield batches[k]

    batches = [numbered(k) for k in range(5)]
    passed = list(islice(prefetch(source(), CPU), 3))
    assert all(one is other for one, other in zip(passed, batches, strict=False))
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_none_is_lost_at_the_end(number: int):
    assert [int(batch.seeds[0]) for batch in prefetch(map(numbered, range(number)), CPU)] == list(range(number))


def test_a_batch_that_lies_elsewhere_is_moved_but_for_its_ids():
    (moved,) = prefetch([numbered(3)], torch.device("meta"))
    assert moved.images.is_meta
    assert moved.targets is not None
    assert moved.targets.polygons.xy.is_meta
    assert moved.image_ids.tolist() == [3, 3]


class Copies(TorchDispatchMode):
    """Notes the shapes of what is copied to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_image_ids_are_never_copied_to_the_device():
    batch = replace(numbered(3), image_ids=torch.arange(7))  # a shape of their own
    with Copies() as copies:
        batch.to(torch.device("meta"))
    assert len(copies.shapes) == sum(isinstance(leaf, torch.Tensor) for leaf in leaves(batch)) - 1
    assert (7,) not in copies.shapes


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 1, 2, 20])
def test_on_a_gpu_batches_come_in_order_with_their_contents(number: int):
    """Each is used up at once and large enough that its memory is wanted again, so a copy that came too early would
    show.
    """
    device = torch.device("cuda")
    batches = [numbered(k, size=512) for k in range(number)]
    sums: list[tuple[Batch, torch.Tensor]] = []
    for batch in prefetch((batch.pin_memory() for batch in batches), device):
        torch.cuda._sleep(2_000_000)
        sums.append((batch.to(CPU) if len(sums) % 5 == 0 else batch, batch.images.long().sum()))
    assert len(sums) == number
    for (moved, total), expected in zip(sums, batches, strict=True):
        assert int(total) == int(expected.images.long().sum())
        for one, other in zip(leaves(moved), leaves(expected), strict=True):
            assert torch.equal(one.cpu(), other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.gpu
def test_on_a_gpu_memory_is_not_used_again_too_early():
    """The consumer drops each batch while the device still reads it."""
    device, totals = torch.device("cuda"), []
    for batch in prefetch((numbered(k, size=1024).pin_memory() for k in range(30)), device):
        torch.cuda._sleep(5_000_000)
        totals.append(batch.images.long().sum())
        del batch
    assert [int(total) for total in totals] == [k * 2 * 3 * 1024 * 1024 for k in range(30)]


@pytest.mark.gpu
def test_on_a_gpu_the_next_copy_is_over_while_the_present_batch_is_still_computed_with():
    pinned = [numbered(k, size=512).pin_memory() for k in range(3)]
    asked: list[int] = []

    def source() -> Iterator[Batch]:
        for k in range(3):
            asked.append(k)
            yield pinned[k]

    batches = prefetch(source(), torch.device("cuda"))
    next(batches)
    assert asked == [0, 1]
    torch.cuda._sleep(2_000_000_000)  # about a second of work on the present stream
    busy = torch.cuda.current_stream().record_event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert asked == [0, 1, 2]
    assert not busy.query(), "the host has waited for the device"
