"""The 95 % interval of a mean over images, and of the difference of two means on the same images.

A mean of n numbers x with standard deviation s (of n - 1) has the interval

    mean ± t s / √n

which is what the jackknife over the images gives too: leaving out image i moves the mean by
(mean - xᵢ) / (n - 1), and the jackknife's variance of these n means is s² / n. Two models see the
same images, so the interval of a difference is that of the mean of the differences, image by image.

t is Student's quantile with ν = n - 1, by the first terms of its expansion at the normal quantile z
(M. Abramowitz, I. Stegun, Handbook of Mathematical Functions, 26.7.5):

    t ≈ z + (z³ + z) / 4ν + (5 z⁵ + 16 z³ + 3 z) / 96ν² + (3 z⁷ + 19 z⁵ + 17 z³ - 15 z) / 384ν³
        + (79 z⁹ + 776 z⁷ + 1482 z⁵ - 1920 z³ - 945 z) / 92160ν⁴

within 1 % from ν = 2 on; of two numbers the interval is a tenth too narrow. A single image has no
deviation, so nothing is known but the bounds.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import NORMAL_95

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval. error: the standard error s / √n; infinite for one number."""

    value: float
    low: float
    high: float
    error: float


def mean_of(values: Numbers, least: float, most: float) -> Mean:
    """The mean of numbers [n] that lie within least … most, with its 95 % interval."""
    count, value = len(values), float(values.mean())
    if count < 2:
        return Mean(value, least, most, math.inf)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    spread = student(count - 1) * error
    # No mean lies beyond the bounds of its numbers.
    return Mean(value, max(least, value - spread), min(most, value + spread), error)


def student(freedom: int, z: float = NORMAL_95) -> float:
    """Student's quantile for that many degrees of freedom. z: the normal quantile."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    # The n-th term is over νⁿ.
    beyond: float = sum(term / freedom**power for power, term in enumerate(terms, 1))
    return z + beyond
