"""Accuracy from logits: top-1 and top-5 with their intervals, agreement and divergence, and what a
model loses against another.

The divergence Σ p (log p - log q) tells sooner than top-1 which of two similar models is nearer to
the float model: every image counts in it, by all of its classes, and not only those images whose
best class changes.

All models see the same images, so a loss is judged on pairs. Only images that one model gets right
and the other does not say anything about the loss. Of n images, b are right in the baseline alone
and c in the model alone. The drop is (b - c) / n.

**Interval** of the drop: all Δ that the score test of T. Tango (Statistics in Medicine 17, 1998)
does not reject,

    |T(Δ)| ≤ 1.96,   T(Δ) = (b - c - n Δ) / √(n (2 q + Δ (1 - Δ)))

q is the likeliest share of images that are right in the model alone, if the drop is Δ: the larger
root of 2n q² + ((2n - b + c) Δ - b - c) q - c Δ (1 - Δ). The interval stays within -1 … 1, serves
few images, and b = c = 0 too, where the standard error of a difference of shares would be 0 and
claim certainty. T falls with Δ, so the ends are found by bisection.

**p-value**: McNemar's exact test (Q. McNemar, Psychometrika 12, 1947; binomial in place of χ²). If
neither model were better, c of b + c would be so many throws of a fair coin.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BenchError
from runtime.records import Json, Record

NORMAL_95 = 1.959963984540054
BISECTIONS = 60  # 2 / 2⁶⁰ is below the spacing of floats near 1

# [images, classes].
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Accuracy(Record):
    """Shares of images, 0 … 1."""

    # With the ends of the 95 % Wilson interval.
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    top5_low: float
    top5_high: float
    # Share of images with the same top-1 as the float32 model; None without that model.
    agreement: float | None
    # From the float32 model, in nats; None without that model.
    divergence: float | None
    # How many there are.
    images: int


@dataclass(frozen=True)
class PairedDrop(Record):
    """What a model loses in top-1 against a baseline on the same images."""

    # Baseline less model, a share of images, -1 … 1, with its 95 % interval.
    drop: float
    drop_low: float
    drop_high: float
    # Images that this model alone gets right: b and c.
    only_baseline: int
    only_model: int
    # Of McNemar's exact test, two-sided.
    p_value: float


@dataclass(frozen=True)
class BaselineDrop(PairedDrop):
    """What a model loses in top-1 against a baseline. baseline: its name."""

    baseline: str

    def to_json(self) -> Json:
        """The baseline first."""
        return {"baseline": self.baseline, **super().to_json()}


def hits_of(right: NDArray[np.bool_]) -> str:
    """A bit for each image, [images], in hexadecimal; the first image is the highest bit of the
    first byte. The answers of 50,000 images take 12 kB in a report."""
    return np.packbits(right).tobytes().hex()


def bits_of(hits: str, images: int) -> NDArray[np.bool_]:
    """What `hits_of` was made of, [images]."""
    # The last byte is filled up with zeros, which `count` cuts off.
    packed = np.frombuffer(bytes.fromhex(hits), np.uint8)
    return np.unpackbits(packed, count=images).astype(bool)


def hits(logits: Logits, targets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the top-1 of each image is right, [images]. targets: [images], indices of classes."""
    right: NDArray[np.bool_] = logits.argmax(1) == targets
    return right


def measure_accuracy(
    logits: Logits, targets: NDArray[np.int64], reference: Logits | None = None
) -> Accuracy:
    """Accuracy of a model.

    targets: [images], indices of classes.
    reference: logits of the float32 model on the same images.

    Raises BenchError if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise BenchError(
            "the model gives NaN or infinite logits: its numbers overflow, so its accuracy means "
            "nothing"
        )
    count = len(targets)
    right = int(hits(logits, targets).sum())
    # Stable, so that classes of equal logits keep their order, and the result is reproducible.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]  # [images, 5]
    among_best = int((best == targets[:, None]).any(1).sum())
    # Ties in a row go to the first class in both models, so they agree on them.
    same = None if reference is None else logits.argmax(1) == reference.argmax(1)
    return Accuracy(
        right / count,
        *wilson_interval(right, count),
        among_best / count,
        *wilson_interval(among_best, count),
        agreement=None if same is None else float(same.mean()),
        divergence=None if reference is None else divergence(reference, logits),
        images=count,
    )


def divergence(reference: Logits, logits: Logits) -> float:
    """The Kullback-Leibler divergence Σ p (log p - log q) in nats, mean over images; 0 for the same
    answers. p: shares of the classes in the float32 model; q: in the model."""
    # In float64: differences of logarithms of nearly equal shares cancel.
    p, q = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    # The largest logit becomes 0, so that no exponential overflows.
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logarithms: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logarithms


def wilson_interval(hits: int, count: int, z: float = NORMAL_95) -> tuple[float, float]:
    """The Wilson score interval of a share (E. B. Wilson, JASA 22, 1927): all shares p with
    |hits / count - p| ≤ z √(p (1 - p) / count). It stays within 0 … 1, and serves small counts."""
    # The roots of (share - p)² = z² p (1 - p) / count.
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # The ends are within 0 … 1 but for rounding.
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_drop(baseline: NDArray[np.bool_], model: NDArray[np.bool_]) -> PairedDrop:
    """The drop of a model. baseline, model: `hits` of both, [images], in the same order."""
    # b and c: the images that tell the two models apart.
    only_baseline, only_model = int((baseline & ~model).sum()), int((model & ~baseline).sum())
    low, high = drop_interval(only_baseline, only_model, len(model))
    p_value = mcnemar(only_baseline, only_model)
    return PairedDrop(
        (only_baseline - only_model) / len(model), low, high, only_baseline, only_model, p_value
    )


def drop_score(only_baseline: int, only_model: int, count: int, drop: float) -> float:
    """Tango's T(Δ): by how many standard errors the drop that was found exceeds the true drop, if
    the true drop were `drop`. T grows with the root of n if all counts grow in proportion."""
    # q: the larger root of 2n q² + root_b q + root_c.
    root_b = (2 * count - only_baseline + only_model) * drop - only_baseline - only_model
    root_c = -only_model * drop * (1 - drop)
    if root_c <= 0:
        # √(root_b² + (√-8n root_c)²) by hypot: the square of a tiny drop is 0 in floats.
        distance_of_roots = math.hypot(root_b, math.sqrt(-8 * count * root_c))
    else:
        distance_of_roots = math.sqrt(max(0.0, root_b * root_b - 8 * count * root_c))
    # q, the share of images that are right in the model alone if the drop is `drop`.
    likeliest = (distance_of_roots - root_b) / (4 * count)
    # n (2 q + Δ (1 - Δ)); 0 if no image can tell the models apart.
    variance = count * (2 * likeliest + drop * (1 - drop))
    distance = only_baseline - only_model - count * drop
    if variance > 0:
        return distance / math.sqrt(variance)
    # Without variance a drop other than the true one is infinitely unlikely.
    return math.copysign(math.inf, distance) if distance else 0.0


def drop_interval(
    only_baseline: int, only_model: int, count: int, z: float = NORMAL_95
) -> tuple[float, float]:
    """The interval of the drop by Tango's score test: from T(Δ) = z down to T(Δ) = -z."""

    def end(level: float) -> float:
        # T falls with Δ, so the root is below `middle` if T there is at most the level.
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
    """The two-sided p-value of McNemar's exact test: twice the chance that b + c throws of a fair
    coin give at most min(b, c) heads."""
    throws = only_baseline + only_model
    # Logarithms of n! / (k! (n - k)! 2ⁿ): factorials of thousands do not fit into a float.
    whole = math.lgamma(throws + 1) - throws * math.log(2)
    chances = (
        math.exp(whole - math.lgamma(heads + 1) - math.lgamma(throws - heads + 1))
        for heads in range(min(only_baseline, only_model) + 1)
    )
    # Both tails; if b = c the two halves overlap, and the sum would exceed 1.
    return min(1.0, 2 * math.fsum(chances))
