"""What a handful of numbers says about the next one: mean, sample standard deviation, 95 % interval by Student's t.

Scores of the same training from several seeds are taken as independent draws of one normal distribution. From one number nothing
follows about its spread: the deviation and the interval are None then, never 0. Source: Student (1908), Biometrika 6(1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student_t

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
