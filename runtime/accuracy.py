"""Accuracy from logits: top-1 and top-5, how sure they are, and how often two models agree."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BenchError

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, 0 … 1. top1_low, top1_high: the 95 % Wilson interval of top1; agreement: share of images with the same top-1 as
    the float32 model, or None without one."""

    top1: float
    top1_low: float
    top1_high: float
    top5: float
    agreement: float | None
    images: int


def measure_accuracy(logits: NDArray[np.float32], targets: NDArray[np.int64], reference: NDArray[np.float32] | None = None) -> Accuracy:
    """logits, reference: [images, classes]; targets: [images], indices of classes."""
    if not np.isfinite(logits).all():
        raise BenchError("the model gives NaN or infinite logits: its numbers overflow, so its accuracy means nothing")
    best = logits.argmax(1)
    hits = int((best == targets).sum())
    low, high = wilson_interval(hits, len(targets))
    top5 = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return Accuracy(
        top1=hits / len(targets),
        top1_low=low,
        top1_high=high,
        top5=float((top5 == targets[:, None]).any(1).mean()),
        agreement=None if reference is None else float((best == reference.argmax(1)).mean()),
        images=len(targets),
    )


def wilson_interval(hits: int, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, JASA 22, 1927); stays inside 0 … 1 and serves small counts too."""
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
