"""The code of boxes, against torchvision."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from cuda_ops import decode_boxes, encode_boxes

pytestmark = pytest.mark.parametrize("backend", ["reference"], indirect=True)  # there is no other


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_code_equals_that_of_torchvision(seeds, weights, random_boxes):
    for seed in seeds(100):
        gt_boxes, anchors = (
            random_boxes(6, seed=seed) + torch.tensor([0, 0, 1, 1]),
            random_boxes(6, seed=seed + 1) + torch.tensor([0, 0, 1, 1]),
        )
        coder = BoxCoder(weights)
        deltas = encode_boxes(gt_boxes, anchors, weights)
        torch.testing.assert_close(deltas, coder.encode_single(gt_boxes, anchors), rtol=1e-6, atol=1e-6)
        steps = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * 8
        torch.testing.assert_close(
            decode_boxes(steps, anchors, weights), coder.decode_single(steps, anchors), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(decode_boxes(deltas, anchors, weights), gt_boxes, rtol=1e-4, atol=1e-3)


def test_a_box_grows_62_and_a_half_times_at_most():
    anchor = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    x1, _, x2, _ = decode_boxes(torch.tensor([[0.0, 0.0, 99.0, 99.0]]), anchor)[0].tolist()
    assert x2 - x1 == pytest.approx(125.0)


def test_code_of_padding_is_finite(random_boxes):
    nothing, boxes = torch.zeros(4, 4), random_boxes(4, seed=0, extent=2000.0)
    for gt_boxes, anchors in ((nothing, nothing), (nothing, boxes), (boxes, nothing), (boxes.flip(-1), boxes)):
        assert encode_boxes(gt_boxes, anchors, (10.0, 10.0, 5.0, 5.0)).isfinite().all()


def test_gradient_reaches_the_deltas(random_boxes):
    deltas = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    anchors = random_boxes(3, seed=0).double() + torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda d: decode_boxes(d, anchors), deltas)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("code", [encode_boxes, decode_boxes])
def test_the_host_never_waits(code, device, random_boxes, no_waiting):
    boxes = random_boxes(2, 3, seed=0) + torch.tensor([0, 0, 1, 1])
    there, expected = boxes.to(device), code(boxes, boxes)
    with no_waiting(torch.device(device)):
        result = code(there, there)
    assert result.device.type == device
    torch.testing.assert_close(result.cpu(), expected)
