"""Cosines between what two models give for the same images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.means import mean_of
from runtime.records import Record


@dataclass(frozen=True)
class Cosines(Record):
    """Cosine of each image's output with the float32 model's: the mean over the images with its
    95 % interval (runtime/measure/means.py), and the least."""

    cosine: float
    cosine_low: float
    cosine_high: float
    least_cosine: float
    # How many there are.
    images: int


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of each row of a [n, c] with that of b [n, c]: [n]. 0 if a row is 0 or not finite; but
    1 if both rows are 0, since nothing tells them apart."""
    # In float64: cosines near 1 differ in digits that float32 does not have.
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    are_equal = ~(x.any(1) | y.any(1))
    return np.where(are_equal, 1.0, np.where(np.isfinite(found), found, 0.0))


def summarized(found: NDArray[np.float64]) -> Cosines:
    """The cosines of all images, [images]."""
    # Rounding may carry the cosine of two equal rows beyond 1.
    bounded = np.clip(found, -1.0, 1.0)
    mean = mean_of(bounded, -1.0, 1.0)
    return Cosines(mean.value, mean.low, mean.high, float(bounded.min()), len(bounded))
