"""Accuracy from logits: top-1 and top-5, how sure they are, how often two models agree and how far
their answers are apart, and how much one loses against another.

Of two models near each other the divergence tells sooner than top-1 which is nearer to the float
one: every image counts in it, by all of its classes, and not only those whose best class changes.

The images are the same for all models, so a loss is judged on pairs: only images that one model
gets right and the other does not say anything about it. Of n images, b are right in the baseline
alone and c in the model alone. The drop is (b - c) / n; two of its parts:

- **Interval**: all drops Δ that the score test of T. Tango (Statistics in Medicine 17, 1998) does
not reject,

      |T(Δ)| ≤ 1.96,   T(Δ) = (b - c - n Δ) / √(n (2 q + Δ (1 - Δ))),

  q being the share of images right in the model alone that is likeliest if the drop is Δ: the larger root of
  2n q² + ((2n - b + c) Δ - b - c) q - c Δ (1 - Δ). As Wilson's does for one share, it stays within -1 … 1 and serves few images, and
  b = c = 0 too, where the difference of two shares and its standard error would claim certainty. T falls with Δ, so the ends are bisected.
- **p-value**: McNemar's exact test. If neither model were better, c of b + c would be so many
throws of a fair coin."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BenchError

NORMAL_95 = 1.959963984540054
BISECTIONS = 60  # 2 / 2^60 is less than a float can tell


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, 0 … 1. _low, _high: the 95 % Wilson interval; agreement: share of images
    with the same top-1 as the float32 model; divergence: from that model, in nats; both None
    without it."""

    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float
    agreement: float | None
    divergence: float | None
    images: int


@dataclass(frozen=True)
class PairedDrop:
    """What a model loses in top-1 against a baseline on the same images. drop: baseline less model,
    a share of images, -1 … 1, with its 95 % interval; only_baseline, only_model: images that it
    alone gets right; p_value: of McNemar's exact test, two-sided."""

    drop: float
    drop_low: float
    drop_high: float
    only_baseline: int
    only_model: int
    p_value: float


def hits(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each image's top-1 is right. logits: [images, classes]; targets: [images], indices of
    classes."""
    right: NDArray[np.bool_] = logits.argmax(1) == targets
    return right


def measure_accuracy(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    reference: NDArray[np.float32] | None = None,
) -> Accuracy:
    """logits, reference: [images, classes]; targets: [images], indices of classes."""
    if not np.isfinite(logits).all():
        raise BenchError(
            "the model gives NaN or infinite logits: its numbers overflow, so its accuracy means "
            "nothing"
        )
    count = len(targets)
    first = int(hits(logits, targets).sum())
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    fifth = int((best == targets[:, None]).any(1).sum())
    agreement = (
        None if reference is None else float((logits.argmax(1) == reference.argmax(1)).mean())
    )
    apart = None if reference is None else divergence(reference, logits)
    shares = (
        first / count,
        *wilson_interval(first, count),
        fifth / count,
        *wilson_interval(fifth, count),
    )
    return Accuracy(*shares, agreement=agreement, divergence=apart, images=count)


def divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """The Kullback-Leibler divergence Σ p (log p - log q) in nats of a model's classes q from the
    float32 model's p, mean over images; 0 for the same answers. reference, logits: [images,
    classes]."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logarithms: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logarithms


def wilson_interval(hits: int, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, JASA 22, 1927); stays inside 0 … 1 and
    serves small counts too."""
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_drop(baseline: NDArray[np.bool_], model: NDArray[np.bool_]) -> PairedDrop:
    """The drop from the `hits` of both, [images] each, in the same order."""
    only_baseline, only_model = int((baseline & ~model).sum()), int((model & ~baseline).sum())
    low, high = drop_interval(only_baseline, only_model, len(model))
    p_value = mcnemar(only_baseline, only_model)
    return PairedDrop(
        (only_baseline - only_model) / len(model), low, high, only_baseline, only_model, p_value
    )


def drop_score(only_baseline: int, only_model: int, count: int, drop: float) -> float:
    """Tango's T: how many standard errors the drop found lies above the one given, which is taken
    for true. For counts that grow in proportion it grows with the root of their size."""
    root_b = (2 * count - only_baseline + only_model) * drop - only_baseline - only_model
    root_c = -only_model * drop * (1 - drop)
    if root_c <= 0:  # by hypot, since the square of a tiny drop is 0
        distance_of_roots = math.hypot(root_b, math.sqrt(-8 * count * root_c))
    else:
        distance_of_roots = math.sqrt(max(0.0, root_b * root_b - 8 * count * root_c))
    likeliest = (distance_of_roots - root_b) / (4 * count)
    variance = count * (2 * likeliest + drop * (1 - drop))
    distance = only_baseline - only_model - count * drop
    return (
        distance / math.sqrt(variance)
        if variance > 0
        else math.copysign(math.inf, distance)
        if distance
        else 0.0
    )


def drop_interval(
    only_baseline: int, only_model: int, count: int, z: float = NORMAL_95
) -> tuple[float, float]:
    """The interval of the drop by Tango's score test."""

    def end(level: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if drop_score(only_baseline, only_model, count, middle) > level:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return end(z), end(-z)


def mcnemar(only_baseline: int, only_model: int) -> float:
    """The two-sided p-value of McNemar's exact test: twice the share of outcomes of b + c throws
    with no more heads than the fewer of the two (Q. McNemar, Psychometrika 12, 1947; binomial in
    place of χ²)."""
    throws = only_baseline + only_model
    whole = math.lgamma(throws + 1) - throws * math.log(2)
    chances = (
        math.exp(whole - math.lgamma(heads + 1) - math.lgamma(throws - heads + 1))
        for heads in range(min(only_baseline, only_model) + 1)
    )
    return min(1.0, 2 * math.fsum(chances))
