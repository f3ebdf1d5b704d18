"""Batch norms of heads and of several processes: padding counts for nothing, and torch's are the measure."""

import copy

import pytest
import torch
from torch import Tensor, nn

from model.network.batch_norm import BatchNorm2d, SyncBatchNorm2d
from model.network.layers import ConvLayer, HeadLayers, norm_layer

IS_REAL = torch.tensor([True, False, True, True, False])


def layers(dtype: torch.dtype = torch.float64) -> tuple[BatchNorm2d, nn.BatchNorm2d, Tensor]:
    """A batch norm of ours, torch's with the same values, and five rows, of which IS_REAL says which are no padding."""
    torch.manual_seed(0)
    ours = BatchNorm2d(3).to(dtype)
    for tensor in ours.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)
    theirs = nn.BatchNorm2d(3).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, (3 * torch.randn(5, 3, 2, 4, dtype=dtype) + 7).requires_grad_()


def test_padding_counts_neither_in_the_statistics_nor_in_their_gradients() -> None:
    ours, theirs, x = layers()
    other = x.detach().clone().requires_grad_()
    weights = torch.randn(3, 3, 2, 4, dtype=x.dtype)
    found, expected = ours(x, IS_REAL)[IS_REAL], theirs(other[IS_REAL])
    torch.testing.assert_close(found, expected)
    for mine, its in zip((found, expected), (ours, theirs), strict=True):
        (mine * weights).sum().backward()
        assert its.weight.grad is not None
    torch.testing.assert_close(x.grad, other.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_the_gradient_is_right_for_padding_too() -> None:
    ours, _, x = layers()
    assert torch.autograd.gradcheck(lambda x, weight, bias: ours(x, IS_REAL), (x, ours.weight, ours.bias))


def test_a_batch_of_padding_alone_is_normalised_by_the_running_statistics_and_leaves_them() -> None:
    ours, theirs, x = layers()
    found = ours(x, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(found, theirs.eval()(x))
    found.sum().backward()
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bits_have_32(dtype: torch.dtype) -> None:
    ours, _, exact = layers(torch.float32)
    half = exact.detach().to(dtype).requires_grad_()
    found = ours(half, IS_REAL)
    assert found.dtype == dtype
    found.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == dtype
    assert ours.running_mean is not None
    torch.testing.assert_close(ours.running_mean, layers_statistic(half.detach().float()), rtol=1e-5, atol=1e-5)


def layers_statistic(x: Tensor) -> Tensor:
    """The running mean after these rows."""
    _, theirs, _ = layers(torch.float32)
    theirs(x[IS_REAL])
    assert theirs.running_mean is not None
    return theirs.running_mean


def test_one_process_needs_no_other_and_evaluation_no_statistics_of_the_batch() -> None:
    """To the bit torch's, since whole batches are its work; the channels stay last."""
    for made in (BatchNorm2d, SyncBatchNorm2d):
        _, theirs, _ = layers(torch.float32)
        ours = made(3)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        for is_training in (True, False):
            assert torch.equal(ours.train(is_training)(x), theirs.train(is_training)(x))
        assert torch.equal(ours(x, torch.tensor([True, False])), theirs(x))
        masked = ours.train()(x, torch.tensor([True, False]))
        assert masked.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["frozen_batch_norm", "batch_norm", "sync_batch_norm", "group_norm"])
def test_a_head_hands_its_norms_what_is_real(name: str) -> None:
    """Rows that are no padding come out as if there were no others."""
    torch.manual_seed(0)
    norm = norm_layer(name)
    head = HeadLayers(ConvLayer(32, 32, 3, norm, relu=True), ConvLayer(32, 32, 1, norm), nn.Flatten())
    x, alone = torch.randn(5, 32, 3, 3), copy.deepcopy(head)
    torch.testing.assert_close(head(x, IS_REAL)[IS_REAL], alone(x[IS_REAL]), rtol=1e-4, atol=1e-5)
    for mine, its in zip(head.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, its)
