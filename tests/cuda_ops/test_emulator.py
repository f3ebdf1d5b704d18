"""The emulator of CUDA: it reports each mistake of emulator/mistakes.cu, and none where there is none."""

import re

import pytest
import torch

import cuda_ops

pytestmark = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
VALUES = torch.arange(64.0)
FAULTS = {
    "a barrier that some threads miss": (
        r"sync: sum_kernel.*__syncthreads\(\) at mistakes.cu:\d+ while another thread has returned"
    ),
    "barriers in two places": (
        r"sync: parted_kernel: __syncthreads\(\) at mistakes.cu:\d+ while another thread is at mistakes.cu:\d+"
    ),
    "no barrier": r"race: sum_kernel.*(read after write|write after read) in shared memory at mistakes.cu:\d+",
    "a vote that half the warp misses": (
        r"sync: ballot_kernel: __ballot_sync at .* without a lane of its mask, which has returned"
    ),
    "votes in two places": (
        r"sync: votes_apart_kernel: __any_sync at .* without a lane of its mask, which is at mistakes.cu:\d+"
    ),
    "votes of two masks": (
        r"sync: vote_kernel: __any_sync at .* without a lane of its mask, which is at mistakes.cu:\d+"
    ),
    "a vote by a lane that its mask leaves out": (
        r"sync: vote_kernel: __any_sync at mistakes.cu:\d+ by a lane that its mask leaves out"
    ),
    "blocks that add without atomics": r"race: add_block_kernel: write after write between blocks",
    "threads that add without atomics": r"race: add_kernel: (read after write|write after write) at",
    "a thread that writes what others read": r"race: late_write_kernel: (write after read|read after write) at",
    "a block that writes what others read": (
        r"race: late_write_kernel: (write after read|read after write) between blocks"
    ),
    "an addition beside atomic ones": r"race: half_atomic_kernel: (write after write|read after write) at",
    "sum of what was not zeroed": r"init: add_kernel: read of what nothing wrote at",
    "shared memory that was not written": r"init: forgetful_sum_kernel: read of what nothing wrote in shared memory",
    "shared memory that another block wrote": (
        r"init: foreign_shared_kernel: read of what nothing wrote in shared memory"
    ),
    "a read past the end": r"memory: add_kernel: read outside the tensors of the call at mistakes.cu",
    "a write past the end": r"memory: copy_kernel: write outside the tensors of the call at mistakes.cu",
    "a write past the end of a shared variable": r"memory: outside_shared_kernel: write outside the shared variables",
    "a pack that is read past the end": r"memory: copy_pack_kernel<float2>: read outside the tensors of the call",
    "a struct that is read past the end": r"memory: copy_pack_kernel<Six>: read outside the tensors of the call",
    "a struct that is written past the end": r"memory: copy_pack_kernel<Six>: write outside the tensors of the call",
    "a pack that is written past the end of a shared variable": (
        r"memory: copy_into_shared_kernel: write outside the shared variables"
    ),
    "a write to a variable of the library": r"memory: remember_kernel: write outside the tensors of the call",
    "a pack at an odd address": r"memory: packed_kernel: misaligned address",
    "a shuffle by 32 lanes": r"sync: far_shuffle_kernel: __shfl_down_sync at mistakes.cu:\d+ by 32 lanes or more",
    "a shuffle from a lane that its mask leaves out": (
        r"sync: absent_shuffle_kernel: __shfl_sync from a lane that its mask leaves out"
    ),
    "an integer divided by 0": r"value: divide_kernel: integer division by 0, .* at mistakes.cu:\d+",
    "an assertion that does not hold": r"assert: assert_kernel: values\[0\] == 1 does not hold at mistakes.cu:\d+",
    "a loop without an end": r"^1 × hang: endless_kernel",
    "a loop without an end that touches no memory": r"^1 × hang: endless_search_kernel",
    "more shared memory with the kernel's own": r"launch: sum_kernel.*: refused: 49408 bytes of shared memory",
}
REFUSED = {
    "no blocks": r"launch: add_kernel: refused: 0×1×1 blocks",
    "more threads than a block may have": r"launch: add_kernel: refused: 1×1×1 blocks of 1025×1×1 threads",
    "2^32 blocks": r"launch: copy_kernel: refused: 65536×32768×2 blocks",
    "too many blocks along y": r"launch: copy_kernel: refused: 1×65536×1 blocks",
    "too many blocks along z": r"launch: copy_kernel: refused: 1×1×65536 blocks",
    "more threads along z than a block may have": r"launch: add_kernel: refused: 1×1×1 blocks of 1×1×65 threads",
    "more threads than __launch_bounds__": r"launch: bounded_kernel: refused: more threads than .*\(32\)",
    "a memset past the end": r"memory: host: cudaMemsetAsync outside the tensors of the call",
    "more shared memory than a block may have": r"launch: add_kernel: refused: .* 49153 bytes",
}


@pytest.fixture
def mistake(emulator):
    """mistake(name): the sum that a kernel with that mistake returns."""
    emulator.faults()
    yield lambda name: torch.ops.cuda_ops_emulated.mistake(VALUES, name).item()
    emulator.faults()


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_reported_in_any_order_of_blocks_and_threads_and_leaves_nothing_behind(name, emulator, mistake):
    """A block may be given up for it."""
    for seed in range(1 if "a loop" in name else 12):
        emulator.schedule(seed)
        mistake(name)
        faults = emulator.faults()
        assert_reported(FAULTS[name], faults)
        assert (
            len(faults) == 1 or "a loop" not in name
        )  # a launch of many threads and blocks ends with the first that hangs
        assert mistake("none: barriers") == VALUES.sum()
        assert emulator.faults() == []


@pytest.mark.parametrize("name", REFUSED)
def test_a_launch_that_cuda_refuses_is_an_error_of_the_operator_too(name, emulator, mistake):
    with pytest.raises(RuntimeError, match=r"CUDA error [19]"):
        mistake(name)
    assert_reported(REFUSED[name], emulator.faults())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none: barriers", 2016),
        ("none: atomics", 2016),
        ("none: filled", 2 * 64),
        ("none: copied", 2016),
        ("none: primitives", 64 * 15 + 2 * 16 + 1),
    ],
)
def test_where_there_is_no_mistake_none_is_reported(name, expected, emulator, mistake):
    for seed in range(24):
        emulator.schedule(seed)
        assert mistake(name) == expected
        assert emulator.faults() == []


def test_new_memory_holds_what_the_schedule_says(emulator, mistake):
    sums = set()
    for seed in range(24):
        emulator.schedule(seed)
        sums.add(str(mistake("sum of what was not zeroed")))
    assert sums == {"nan", "2016.0", "3.3961513649220713e+38"}  # of 0xff; of 0 and 0xaa; of 0x7f


def test_blocks_and_threads_come_in_several_orders_and_those_that_stride_are_few_at_times(emulator, mistake):
    last, sizes = set(), set()
    for seed in range(24):
        emulator.schedule(seed)
        last.add(mistake("none: the last thread"))
        sizes.add(mistake("none: the size of the grid"))
    assert last >= {0.0, 63.0}  # backward, forward
    assert any(0 < place % 16 < 15 for place in last)  # at random
    assert sizes == {1.0, 3.0, 4.0}


def test_kernels_compute_while_they_serve_and_no_longer(emulator, random_boxes):
    boxes = random_boxes(5, seed=0)
    emulator.launches()
    with emulator.serving():
        cuda_ops.box_iou(boxes, boxes)
    assert emulator.launches() == {"box_iou_kernel<T, Index>": 1}
    cuda_ops.box_iou(boxes, boxes)
    assert emulator.launches() == {}


def test_every_kernel_of_the_sources_was_compiled(emulator, emulation):
    kernels = [path.stem for path in (emulation.CSRC / "cuda").glob("*.cu")]
    assert len(kernels) >= 9
    assert set(kernels) == set(emulator.operators)


def assert_reported(pattern, faults):
    assert any(re.search(pattern, fault) for fault in faults), faults
