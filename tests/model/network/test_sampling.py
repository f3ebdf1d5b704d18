"""Sampling of anchors and RoIs."""

import torch

from cuda_ops import BACKGROUND, IGNORE
from model.network.sampling import per_image_mean, random_priority, sample_matches

SEEDS = torch.tensor([11, 12])


def sample(matched: torch.Tensor, batch_size: int = 4, positive_fraction: float = 0.5):  # type: ignore[no-untyped-def]
    return sample_matches(
        matched, SEEDS[: len(matched)], batch_size=batch_size, positive_fraction=positive_fraction, stream=1
    )


def test_priorities_are_uniform_and_differ_between_streams_and_seeds() -> None:
    numbers = random_priority(SEEDS, 100_000, stream=1)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    torch.testing.assert_close(numbers.mean(1), torch.full((2,), 0.5), rtol=0, atol=0.005)
    histogram = torch.histc(numbers[0], 10, 0, 1)
    assert (histogram - 10_000).abs().max() < 400
    others = (numbers[1], random_priority(SEEDS, 100_000, stream=2)[0], numbers[0].roll(1))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([numbers[0], other]))[0, 1]) < 0.02


def test_seeds_that_differ_in_their_upper_half_alone_give_other_numbers() -> None:
    numbers = random_priority(torch.tensor([5, 5 + (7 << 32)]), 8, stream=0)
    assert not torch.equal(numbers[0], numbers[1])


def test_positives_come_first_and_take_their_share_at_most() -> None:
    matched = torch.tensor([[0, 1, BACKGROUND, 0, BACKGROUND, BACKGROUND, 2]])
    samples = sample(matched)
    assert samples.is_positive.tolist() == [[True, True, False, False]]
    assert (matched.gather(1, samples.idxs) >= 0).tolist() == samples.is_positive.tolist()
    assert samples.weights.tolist() == [[1, 1, 1, 1]]


def test_negatives_fill_what_positives_leave() -> None:
    samples = sample(torch.tensor([[BACKGROUND, BACKGROUND, 3, BACKGROUND, BACKGROUND]]))
    assert samples.is_positive.sum() == 1
    assert samples.weights.sum() == 4
    assert samples.idxs[0, 0] == 2


def test_ignored_candidates_are_never_chosen() -> None:
    samples = sample(torch.tensor([[IGNORE, 0, IGNORE, BACKGROUND, IGNORE]]))
    assert samples.weights.tolist() == [[1, 1, 0, 0]]
    assert samples.idxs[0, :2].tolist() == [1, 3]


def test_too_many_positives_do_not_return_as_negatives() -> None:
    samples = sample(torch.tensor([[0, 0, 0, 0, 0]]))
    assert samples.weights.tolist() == [[1, 1, 0, 0]]


def test_every_candidate_is_chosen_when_all_fit() -> None:
    matched = torch.tensor([[0, BACKGROUND, 1, BACKGROUND, BACKGROUND]])
    samples = sample(matched, batch_size=100)
    assert sorted(samples.idxs[0].tolist()) == [0, 1, 2, 3, 4]
    assert samples.weights.sum() == 5


def test_an_image_is_sampled_alike_in_any_batch() -> None:
    matched = torch.full((2, 50), BACKGROUND)
    together = sample(matched).idxs
    alone = sample_matches(matched[1:], SEEDS[1:], batch_size=4, positive_fraction=0.5, stream=1).idxs
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


def test_each_candidate_is_equally_likely() -> None:
    matched = torch.full((4000, 8), BACKGROUND)
    samples = sample_matches(matched, torch.arange(4000), batch_size=2, positive_fraction=0.5, stream=1)
    counts = torch.bincount(samples.idxs.flatten(), minlength=8)
    assert (counts - 1000).abs().max() < 120


def test_mean_weighs_images_alike_however_many_samples_they_have() -> None:
    losses = torch.tensor([[2.0, 4.0], [10.0, 99.0], [5.0, 5.0]])
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert per_image_mean(losses, weights) == (3 + 10 + 0) / 3
