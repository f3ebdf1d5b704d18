"""The emulator of CUDA: it reports each mistake of emulator/mistakes.cu, and none where there is none."""

import re

import pytest
import torch

import cuda_ops

pytestmark = pytest.mark.parametrize("backend", ["compiled"], indirect=True)
VALUES = torch.arange(64.0)
FAULTS = {
    "a barrier that some threads miss": r"sync: sum_kernel.*__syncthreads\(\) at mistakes.cu:\d+ while another thread has returned",
    "no barrier": r"race: sum_kernel.*(read after write|write after read) in shared memory at mistakes.cu:\d+",
    "a vote that half the warp misses": r"sync: ballot_kernel: __ballot_sync at .* without a lane of its mask, which has returned",
    "blocks that add without atomics": r"race: add_block_kernel: write after write between blocks",
    "threads that add without atomics": r"race: add_kernel: (read after write|write after write) at",
    "sum of what was not zeroed": r"init: add_kernel: read of what nothing wrote at",
    "shared memory that was not written": r"init: forgetful_sum_kernel: read of what nothing wrote in shared memory",
    "a read past the end": r"memory: add_kernel: read outside the tensors of the call at mistakes.cu",
    "a write past the end": r"memory: copy_kernel: write outside the tensors of the call at mistakes.cu",
    "a write past the end of a shared variable": r"memory: outside_shared_kernel: write outside the shared variables",
    "a pack at an odd address": r"memory: packed_kernel: misaligned address",
    "a shuffle by 32 lanes": r"sync: far_shuffle_kernel: __shfl_down_sync at mistakes.cu:\d+ by 32 lanes or more",
    "an integer divided by 0": r"value: divide_kernel: integer division by 0, .* at mistakes.cu:\d+",
    "an assertion that does not hold": r"assert: assert_kernel: values\[0\] == 1 does not hold at mistakes.cu:\d+",
    "a loop without an end": r"^1 × hang: endless_kernel",
    "a loop without an end that touches no memory": r"^1 × hang: endless_search_kernel",
}
REFUSED = {
    "no blocks": r"launch: add_kernel: refused: 0×1×1 blocks",
    "more threads than a block may have": r"launch: add_kernel: refused: 1×1×1 blocks of 1025×1×1 threads",
    "2^32 blocks": r"launch: copy_kernel: refused: 65536×32768×2 blocks",
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
        ("none: primitives", 64 * 15 + 16 + 1),
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
    assert len(sums) >= 3


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
