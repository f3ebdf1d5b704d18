"""What a handful of numbers says about the next ones: means and differences of means, with 95 % intervals by Student's t.

Scores of the same training from several seeds are taken as independent draws of one normal distribution. From one number nothing
follows about its spread: what rests on that is None then, never 0. Source: Student (1908), Biometrika 6(1); Welch (1947), Biometrika 34.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t
from scipy.stats import ttest_ind, ttest_rel

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and how well it is known."""

    mean: float
    deviation: float | None  # sample standard deviation, of n − 1 degrees of freedom; None of a single value
    interval: tuple[float, float] | None  # that holds the true mean with CONFIDENCE


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, deviation and interval of one value or more."""
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None)
    deviation = stdev(values)
    return Estimate(mean, deviation, around(mean, deviation / len(values) ** 0.5, len(values) - 1))


def around(mean: float, standard_error: float, degrees_of_freedom: float) -> tuple[float, float]:
    """The interval of a mean by Student's t."""
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom)) * standard_error
    return mean - half, mean + half


@dataclass(frozen=True)
class Difference:
    """How much larger the mean of one sample is than that of another, and how sure that is."""

    mean: float
    interval: tuple[float, float] | None  # that holds the true difference with CONFIDENCE
    p: float | None  # how likely a difference at least as large is where there is none in truth


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """The mean of `after` less that of `before`; value i of both was made under the same circumstances. Student's paired test."""
    mean = fmean(b - a for a, b in zip(before, after, strict=True))
    if len(before) == 1:
        return Difference(mean, None, None)
    if (
        len({b - a for a, b in zip(before, after, strict=True)}) == 1
    ):  # no spread at all, of which the test would make 0 / 0
        return _certain(mean)
    test = ttest_rel(after, before)
    return Difference(mean, _ends(test), float(test.pvalue))


def welch_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """The mean of `after` less that of `before`, of samples that need not be of one size nor of one spread. Welch's test."""
    mean = fmean(after) - fmean(before)
    if min(len(before), len(after)) == 1:
        return Difference(mean, None, None)
    if len(set(before)) == len(set(after)) == 1:
        return _certain(mean)
    test = ttest_ind(after, before, equal_var=False)
    return Difference(mean, _ends(test), float(test.pvalue))


def _certain(mean: float) -> Difference:
    return Difference(mean, (mean, mean), 0.0 if mean else 1.0)


def _ends(test: Any) -> tuple[float, float]:
    interval = test.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)
