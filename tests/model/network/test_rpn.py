"""The RPN's losses look at the sampled anchors alone: values and gradients are those of the whole head."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.anchors import cell_neighbors
from model.network.rpn import RPN, RPNHead
from model.structures import Batch

SIZES = [(6, 8), (3, 4), (2, 2), (1, 1)]
ANCHORS = 3 * (48 + 12 + 4 + 1)


def pyramid(memory_format: torch.memory_format, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    levels = [torch.randn(2, 16, *size, dtype=dtype) for size in SIZES]
    return [level.contiguous(memory_format=memory_format).requires_grad_() for level in levels]


def lively_head(convs: int = 1) -> RPNHead:
    torch.manual_seed(1)
    head = RPNHead(16, 3, convs).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if convs == 1 else 0.1)
    return head


def gradients(outputs: tuple[Tensor, Tensor], head: RPNHead, features: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs the outputs by small whole numbers, which float32 adds exactly."""
    loss = sum((output * (torch.arange(output.numel()) % 7 - 3).view_as(output)).sum() for output in outputs)
    return list(torch.autograd.grad(loss, [*head.parameters(), *features]))  # type: ignore[arg-type]


@pytest.mark.parametrize("convs", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_losses_at_sampled_anchors_have_the_gradients_of_the_whole_head(
    memory_format: torch.memory_format, convs: int
) -> None:
    head, features = lively_head(convs), pyramid(memory_format)
    every_anchor = torch.stack([torch.randperm(ANCHORS), torch.randperm(ANCHORS)])
    few_and_one_twice = torch.stack([torch.tensor([0, 23, 80, 80, 194]), torch.tensor([193, 1, 143, 180, 146])])
    neighbors = cell_neighbors(SIZES, torch.device("cpu"))
    for idxs in (every_anchor, few_and_one_twice):
        logits, deltas, _ = head(features)
        dense = logits.gather(1, idxs), deltas.gather(1, idxs[..., None].expand(-1, -1, 4))
        sparse = head.at_anchors(features, idxs, neighbors)
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)  # both end in float32
        for mine, other in zip(gradients(sparse, head, features), gradients(dense, head, features), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_neighbors_stop_at_the_borders_of_a_level() -> None:
    neighbors = cell_neighbors([(2, 3), (1, 2)], torch.device("cpu"))
    assert neighbors.shape == (8, 9)
    assert neighbors[1].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    assert neighbors[5].tolist() == [1, 2, -1, 4, 5, -1, -1, -1, -1]
    assert neighbors[6].tolist() == [-1, -1, -1, -1, 6, 7, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_every_parameter_learns(dtype: torch.dtype) -> None:
    """The pass for the proposals, without gradients, must not leave its casts of the weights to the pass for the
    losses.
    """
    head, features = lively_head().float(), pyramid(torch.channels_last, torch.float32)
    idxs = torch.randint(ANCHORS, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        with torch.no_grad():
            dense, _, _ = head(features)
        logits, deltas = head.at_anchors(features, idxs, cell_neighbors(SIZES, torch.device("cpu")))
    assert logits.dtype == deltas.dtype == torch.float32
    torch.testing.assert_close(logits, dense.gather(1, idxs), rtol=0.05, atol=0.05)
    exact = gradients(head.at_anchors(features, idxs, cell_neighbors(SIZES, torch.device("cpu"))), head, features)
    for mine, other in zip(gradients((logits, deltas), head, features), exact, strict=True):
        assert (mine - other).norm() < 0.05 * other.norm()


def test_training_keeps_no_activation_of_the_whole_head(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    rpn, batch = RPN(tiny_config(rpn_batch_size=16)).train(), shapes_batch(images=2, size=128)
    features = [torch.randn(2, 32, 64 >> level, 64 >> level, requires_grad=True) for level in range(1, 6)]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        _, losses = rpn(features, batch)
    assert set(losses) == {"objectness", "rpn_box_reg"}
    assert (
        max(kept) == 32 * 9 * 32
    )  # the patches of 2 × 16 anchors, as much as the kernel; the finest level alone has 65,536 numbers


def test_a_proposal_that_nms_removes_is_padding() -> None:
    """Level 0 has three almost equal boxes, level 1 two that are apart; each level has room for three."""
    anchors = torch.tensor(
        [[0, 0, 20, 20], [0, 0, 20, 21], [0, 0, 20, 22], [40, 0, 60, 20], [40, 40, 60, 60]], dtype=torch.float32
    )
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.0]])
    rpn = RPN(ModelConfig(rpn_post_nms_top_n_test=4)).eval()
    size, one = torch.tensor([[64, 64]], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), size, size, image_ids=one, seeds=one)
    found = rpn.propose(logits, torch.zeros(1, 5, 4), anchors, batch, [3, 2])
    assert found.num_proposals.tolist() == [3]
    assert found.boxes[0].tolist() == [[0, 0, 20, 21], [40, 40, 60, 60], [40, 0, 60, 20], [0, 0, 0, 0]]
    assert found.scores[0].tolist() == [*logits[0, [1, 4, 3]].sigmoid().tolist(), 0.0]
