"""Means and differences of means of small samples, with 95 % intervals by Student's t.

Scores of the same training from several seeds are taken as independent samples of one normal distribution. A single
value says nothing about the spread: quantities that depend on it are None then, never 0.
Sources: Student (1908), Biometrika 6(1); Welch (1947), Biometrika 34.
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
    """Mean with standard deviation and confidence interval."""

    mean: float
    deviation: float | None  # sample standard deviation with n − 1 degrees of freedom; None for a single value
    interval: tuple[float, float] | None  # contains the true mean with CONFIDENCE


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate mean, standard deviation and interval from one or more values."""
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None)
    deviation = stdev(values)
    return Estimate(mean, deviation, around(mean, deviation / len(values) ** 0.5, len(values) - 1))


def around(mean: float, standard_error: float, degrees_of_freedom: float) -> tuple[float, float]:
    """Confidence interval of a mean by Student's t."""
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom)) * standard_error
    return mean - half, mean + half


@dataclass(frozen=True)
class Difference:
    """Difference of the means of two samples, with its confidence interval and p value."""

    mean: float
    interval: tuple[float, float] | None  # contains the true difference with CONFIDENCE
    p: float | None  # probability of a difference at least as large if there is none


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Mean of `after` minus mean of `before` by Student's paired test; values i of both belong together."""
    mean = fmean(b - a for a, b in zip(before, after, strict=True))
    if len(before) == 1:
        return Difference(mean, None, None)
    if len({b - a for a, b in zip(before, after, strict=True)}) == 1:  # no spread: the test would divide 0 by 0
        return _certain(mean)
    test = ttest_rel(after, before)
    return Difference(mean, _ends(test), float(test.pvalue))


def welch_difference(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Mean of `after` minus mean of `before` by Welch's test; sizes and spreads of the samples may differ."""
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
