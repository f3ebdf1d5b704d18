"""Selection of proposals: what torchvision's RPN hands to its NMS."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from cuda_ops import select_proposals


def torchvision_proposals(objectness, box_deltas, anchors, image_size, level_sizes, top_n, min_size):
    """Of one image: per level the (boxes, scores) left, built from torchvision's own steps."""
    levels = []
    for logits, deltas, level_anchors in zip(
        objectness.split(level_sizes), box_deltas.split(level_sizes), anchors.split(level_sizes), strict=True
    ):
        logits, idx = logits.topk(min(top_n, len(logits)))
        boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas[idx], level_anchors[idx])
        boxes = clip_boxes_to_image(boxes, image_size)
        keep = remove_small_boxes(boxes, min_size)
        levels.append((boxes[keep], logits.sigmoid()[keep]))
    return levels


@pytest.fixture
def make_case(random_boxes):
    def make(seed, level_sizes, num_images=2):
        generator = torch.Generator().manual_seed(seed)
        num_anchors = sum(level_sizes)
        objectness = torch.randn(num_images, num_anchors, generator=generator) * 3
        deltas = torch.randn(num_images, num_anchors, 4, generator=generator)
        image_sizes = torch.randint(30, 120, (num_images, 2), generator=generator, dtype=torch.int32)
        return objectness, deltas, random_boxes(num_anchors, seed=seed), image_sizes

    return make


@pytest.mark.parametrize("seed", range(100))
def test_proposals_equal_those_of_torchvision(seed, make_case):
    level_sizes = [(60, 15, 3), (7,), (12, 1, 30, 5)][seed % 3]
    objectness, deltas, anchors, image_sizes = make_case(seed, level_sizes)
    top_n, min_size = 1 + seed % 20, [1e-3, 5.0][seed % 2]
    boxes, scores = select_proposals(objectness, deltas, anchors, image_sizes, level_sizes, top_n, min_size)
    assert boxes.shape == (2, len(level_sizes), min(top_n, max(level_sizes)), 4)
    for n, image_size in enumerate(image_sizes.tolist()):
        expected = torchvision_proposals(objectness[n], deltas[n], anchors, image_size, level_sizes, top_n, min_size)
        for level, (level_boxes, level_scores) in enumerate(expected):
            keep = scores[n, level] > -torch.inf
            torch.testing.assert_close(boxes[n, level][keep], level_boxes, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(scores[n, level][keep], level_scores, rtol=1e-6, atol=0)


def test_a_box_that_is_clipped_away_is_marked(make_case):
    objectness, deltas, anchors, _ = make_case(0, (5,), num_images=1)
    _, scores = select_proposals(objectness, deltas * 0, anchors + 500, torch.tensor([[100, 100]]), (5,), 5)
    assert scores.tolist() == [[[-torch.inf] * 5]]


def test_a_level_with_few_anchors_is_padded_with_marks(make_case):
    objectness, deltas, anchors, image_sizes = make_case(1, (9, 2))
    _, scores = select_proposals(objectness, deltas * 0, anchors, image_sizes * 10, (9, 2), 4)
    assert (scores[:, 1, 2:] == -torch.inf).all()
    assert (scores[:, 1, :2] > 0).all()


def test_low_precision_logits_and_strides_do_not_matter(make_case):
    objectness, deltas, anchors, image_sizes = make_case(2, (40, 8))
    objectness, deltas = objectness.bfloat16(), deltas.bfloat16()
    expected = select_proposals(objectness.float(), deltas.float(), anchors, image_sizes, (40, 8), 6)
    strided = objectness.t().contiguous().t(), deltas.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    boxes, scores = select_proposals(*strided, anchors, image_sizes, (40, 8), 6)
    assert boxes.dtype == torch.float32
    assert torch.equal(scores.sort(-1).values, expected[1].sort(-1).values)


def test_logits_that_are_not_numbers_keep_the_shape(make_case):
    objectness, deltas, anchors, image_sizes = make_case(3, (10,))
    _, scores = select_proposals(objectness * torch.nan, deltas * torch.nan, anchors, image_sizes, (10,), 4)
    assert (scores == -torch.inf).all()
