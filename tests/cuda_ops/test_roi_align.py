"""RoIAlign: torchvision's MultiScaleRoIAlign, forward and backward."""

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from cuda_ops import multilevel_roi_align
from cuda_ops.reference import roi_align

IMAGE_SIZE = (128, 192)
STRIDES = (4, 8, 16, 32)


def make_features(seed, num_images=2, channels=3, strides=STRIDES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_images, channels, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride) for stride in strides]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def make_boxes(seed, num_boxes, num_images=2):
    """Of every size, some reaching out of the image, the first without area."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(num_images, num_boxes, 2, generator=generator) * 210 - 10
    half_side = torch.exp(torch.rand(num_images, num_boxes, 2, generator=generator) * 5) * 1.5
    boxes = torch.cat((centre - half_side, centre + half_side), dim=-1)
    boxes[:, :1, 2:] = boxes[:, :1, :2]
    return boxes


def torchvision_pooled(features, boxes, output_size, sampling_ratio):
    names = [str(level) for level in range(len(features))]
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio)
    pooled = pool(dict(zip(names, features, strict=True)), list(boxes), [IMAGE_SIZE] * len(boxes))
    return pooled.unflatten(0, boxes.shape[:2])


def pool(features, boxes, output_size=3, sampling_ratio=2):
    return multilevel_roi_align(
        features, boxes, image_size=IMAGE_SIZE, output_size=output_size, sampling_ratio=sampling_ratio
    )


def test_a_constant_feature_map_pools_to_the_constant():
    features = [torch.full((1, 2, 32, 48), 5.0)]
    pooled = pool(features, torch.tensor([[[10.0, 20.0, 60.0, 70.0]]]))
    torch.testing.assert_close(pooled, torch.full((1, 1, 2, 3, 3), 5.0))


@pytest.mark.parametrize("seed", range(100))
def test_output_and_gradient_equal_those_of_torchvision(seed):
    output_size, sampling_ratio = [(7, 2), (1, 1), (3, 3), (5, 2)][seed % 4]
    features, boxes = make_features(seed), make_boxes(seed, 1 + seed % 12)
    ours = pool(features, boxes, output_size, sampling_ratio)
    theirs = torchvision_pooled(features, boxes, output_size, sampling_ratio)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed))
    for our_gradient, their_gradient in zip(
        torch.autograd.grad(ours, features, direction), torch.autograd.grad(theirs, features, direction), strict=True
    ):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [111.0, 112.0, 113.0, 223.9, 223.9999, 224.0, 447.0, 448.0, 2000.0])
def test_a_box_is_pooled_from_the_level_that_torchvision_chooses(side):
    features, boxes = make_features(0), torch.tensor([[[-20.0, -20.0, side - 20, side - 20]]] * 2)
    torch.testing.assert_close(pool(features, boxes), torchvision_pooled(features, boxes, 3, 2))


def test_gradient_equals_finite_differences():
    features = make_features(0, num_images=1, channels=1, strides=(32, 64), dtype=torch.float64)
    boxes = torch.tensor([[[0.0, 0.0, 100.0, 90.0], [30.0, 10.0, 190.0, 120.0]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *levels: pool(levels, boxes, output_size=2), features)


def test_boxes_get_no_gradient():
    boxes = make_boxes(0, 4).requires_grad_()
    pool(make_features(0), boxes).sum().backward()
    assert boxes.grad is None


def test_layout_of_features_and_strides_of_boxes_do_not_matter():
    features, boxes = make_features(2), make_boxes(2, 6)
    channels_last = [level.contiguous(memory_format=torch.channels_last) for level in features]
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(pool(channels_last, strided), pool(features, boxes))


def test_output_flattens_to_a_channels_last_batch_without_a_copy():
    pooled = pool(make_features(3), make_boxes(3, 6))
    batch = pooled.flatten(0, 1)
    assert batch.data_ptr() == pooled.data_ptr()
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_chunks_change_nothing(monkeypatch):
    features, boxes = make_features(4), make_boxes(4, 9)
    whole = pool(features, boxes)
    monkeypatch.setattr(roi_align, "MAX_CHUNK_BYTES", 4000)
    assert torch.equal(pool(features, boxes), whole)


def test_low_precision_features_pool_to_low_precision():
    features, boxes = make_features(5), make_boxes(5, 6)
    pooled = pool([level.detach().bfloat16() for level in features], boxes)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), pool(features, boxes), rtol=0.02, atol=0.05)


def test_padding_pools_finite_values():
    values = (0.0, torch.nan, torch.inf, -1e30)
    boxes = torch.tensor([[[value] * 4 for value in values]] * 2)
    assert pool(make_features(6), boxes).isfinite().all()


def test_no_boxes_pool_to_nothing_and_still_give_a_gradient():
    features = make_features(7)
    pooled = pool(features, torch.zeros(2, 0, 4))
    assert pooled.shape == (2, 0, 3, 3, 3)
    pooled.sum().backward()
    assert all((level.grad == 0).all() for level in features)
