"""NMS and soft-NMS of candidates, against loops over boxes."""

import math

import pytest
import torch

from model.network.suppression import SOFT_NMS_MIN_SCORE, Candidates, keep_best, soften

METHODS = ("linear", "gaussian")


def candidates(images: int = 2, count: int = 60, seed: int = 0) -> Candidates:
    """Crowded boxes of three classes; the last rows of the second image are none."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(images, count, 2, generator=generator) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(images, count, 2, generator=generator) * 40], 2)
    scores = torch.rand(images, count, generator=generator)
    scores[1:, count // 2 :] = -torch.inf
    return Candidates(boxes, scores, torch.randint(1, 4, (images, count), generator=generator))


def overlap(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def expected(found: Candidates, n: int, method: str, nms_iou: float, sigma: float) -> list[tuple[int, float]]:
    """(place, score) in the order taken: one box after another, in float64."""
    boxes = found.boxes[n].double().tolist()
    scores = {k: s for k, s in enumerate(found.scores[n].double().tolist()) if s > -math.inf}
    labels, taken = found.labels[n].tolist(), []
    while scores:
        best = max(scores, key=lambda k: scores[k])
        taken.append((best, scores.pop(best)))
        for k in list(scores):
            if labels[k] != labels[best]:
                continue
            iou = overlap(boxes[best], boxes[k])
            scores[k] *= math.exp(-(iou**2) / sigma) if method == "gaussian" else (1 - iou if iou > nms_iou else 1)
            if scores[k] < SOFT_NMS_MIN_SCORE:
                del scores[k]
    return taken


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("most", [60, 10])
def test_soft_nms_is_the_loop_of_the_paper(method: str, most: int) -> None:
    found = candidates()
    boxes, scores, labels, counts = soften(found, method, nms_iou=0.3, sigma=0.5, max_detections=most)
    for n in range(2):
        reference = expected(found, n, method, 0.3, 0.5)[:most]
        assert counts[n] == len(reference)
        indices = [index for index, _ in reference]
        assert torch.equal(boxes[n, : counts[n]], found.boxes[n, indices])
        assert torch.equal(labels[n, : counts[n]], found.labels[n, indices])
        torch.testing.assert_close(scores[n, : counts[n]], torch.tensor([score for _, score in reference]))
        assert not scores[n, counts[n] :].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_box_that_hides_behind_its_twin_is_gone(method: str) -> None:
    box = torch.tensor([10.0, 10.0, 30.0, 30.0])
    twins = Candidates(box.expand(1, 2, 4), torch.tensor([[0.9, 0.002]]), torch.ones(1, 2, dtype=torch.int64))
    assert soften(twins, method, nms_iou=0.5, sigma=0.5, max_detections=5)[3].tolist() == [1]


@pytest.mark.parametrize("method", METHODS)
def test_other_classes_and_far_boxes_keep_their_scores(method: str) -> None:
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 9], [50, 50, 59, 59]]])
    found = Candidates(boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[1, 2, 1]]))
    _, scores, labels, counts = soften(found, method, nms_iou=0.5, sigma=0.5, max_detections=3)
    assert (counts.tolist(), labels.tolist()) == ([3], [[1, 2, 1]])
    torch.testing.assert_close(scores, found.scores)


def test_no_candidates_give_no_detections() -> None:
    none = Candidates(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64))
    for kept in (keep_best(none, 0.5, 10), soften(none, "linear", nms_iou=0.5, sigma=0.5, max_detections=10)):
        assert [tensor.shape[1] for tensor in kept[:3]] == [0, 0, 0]
        assert kept[3].tolist() == [0, 0]
