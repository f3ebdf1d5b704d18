"""Hand-over of batches: tensors arrive with their values and layout, whatever they lie in."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from model.data.handover import Packed
from model.structures import Batch


def batch() -> Batch:
    images = torch.arange(2 * 4 * 5 * 3, dtype=torch.uint8).view(2, 4, 5, 3).permute(0, 3, 1, 2)
    whole = torch.arange(20.0)
    return Batch(
        images=images,
        image_sizes=whole[3:7].view(2, 2).int(),
        original_sizes=torch.zeros(0, 2, dtype=torch.int32),
        image_ids=torch.arange(9)[5:9:2],
        seeds=torch.tensor(7).expand(2),
    )


def test_tensors_arrive_with_their_values_and_layout():
    sent = (batch(), batch())
    for before, after in zip(sent, Packed(sent).unpack(), strict=True):
        assert vars(before).keys() == vars(after).keys()
        for name, tensor in vars(before).items():
            if tensor is not None:
                other = getattr(after, name)
                assert torch.equal(tensor, other), name
                assert (tensor.dtype, tensor.stride()) == (other.dtype, other.stride()), name
    assert Packed({"no": "tensor"}).unpack() == {"no": "tensor"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_a_batch_takes_one_open_file_while_it_lives_and_none_of_dev_shm():
    def files() -> list[str]:
        links = (str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
        return [link for link in links if "/dev/shm" in link or "memfd" in link]

    gc.collect()
    before = len(files())
    kept = [Packed(batch()).unpack() for _ in range(3)]
    assert len(files()) == before + 3, "ten tensors of a batch share one"
    assert all("/dev/shm" not in name for name in files())
    kept[0].images.add_(1)
    assert kept[0].images[0, 0, 0, 1] == kept[1].images[0, 0, 0, 1] + 1, "memory of its own"
    kept.clear()
    assert len(files()) == before
