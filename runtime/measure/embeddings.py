"""How far a model's embeddings are from those of the float32 model on the same images.

An embedding is used through its directions and its neighbours, so that is what is compared:

    cosine      of an image's two embeddings: mean, 1st percentile and least over the images
    overlap     share of an image's 10 nearest images that are the same in both models
    divergence  Σ p (log p - log q) in nats, mean over the images

where p and q are the shares that the other images have in each model, by their cosines s:

    pⱼ = exp(sⱼ / 0.07) / Σ exp(sᵢ / 0.07)

These are the weights by which images vote in weighted k-NN (runtime/measure/retrieval.py), and the
temperature is that of DINO's vote (M. Caron et al., Emerging Properties in Self-Supervised Vision
Transformers, 2021, section 4.1 and its code). So the divergence says how far the votes of all
images move, not only whether the winner changes: every image counts by all its neighbours, which
tells two models apart sooner than recall does, as the divergence of classes does for top-1. A much
lower temperature would see the nearest image alone, a much higher one would see no neighbour.

Nothing here depends on the scale of a model's embeddings, or on the order of the images. The
intervals of cosine and overlap are those of means over images (runtime/measure/means.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.cosines import Cosines, cosines, summarized
from runtime.measure.means import mean_of
from runtime.measure.similarity import Features, Similarities, in_chunks, nearest, normalized

NEIGHBOURS = 10
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Likeness(Cosines):
    """How alike the embeddings of a model and of the float32 model are."""

    # 1 % of the images have a smaller cosine.
    cosine_p1: float
    # Share of the 10 nearest images that are the same, 0 … 1, mean over the images; 1 for up to 11
    # images, all of which are neighbours.
    overlap: float
    overlap_low: float
    overlap_high: float
    # From the float32 model, in nats.
    divergence: float


def likeness(
    reference: Features, found: Features, rows_done: Callable[[int], None] = lambda count: None
) -> Likeness:
    """Compare embeddings [images, channels] of at least two images.

    reference: of the float32 model. found: of the model. rows_done: called with the number of
    images of each chunk.
    """
    a, b = normalized(reference), normalized(found)
    found_cosines = cosines(reference, found)  # [images]
    # Fewer other images than ten: all of them are neighbours.
    count = min(NEIGHBOURS, len(a) - 1)
    overlaps, divergences = np.empty(len(a)), np.empty(len(a))
    pairs = zip(in_chunks(a, a, True), in_chunks(b, b, True), strict=True)
    for (rows, expected), (_, similarities) in pairs:
        overlaps[rows] = _shared(nearest(expected, count), nearest(similarities, count))
        divergences[rows] = _divergences(expected, similarities)
        rows_done(rows.stop - rows.start)
    overlap = mean_of(overlaps, 0.0, 1.0)
    return Likeness(
        **vars(summarized(found_cosines)),
        cosine_p1=float(np.percentile(found_cosines, 1)),
        overlap=overlap.value,
        overlap_low=overlap.low,
        overlap_high=overlap.high,
        divergence=float(divergences.mean()),
    )


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of each row of `one` [rows, k] that is in the same row of `other`: [rows]."""
    shared: NDArray[np.float64] = (one[:, :, None] == other[:, None, :]).any(2).mean(1)
    return shared


def _divergences(reference: Similarities, similarities: Similarities) -> NDArray[np.float64]:
    """The divergence of each row: [rows]."""
    p, q = _log_shares(reference), _log_shares(similarities)  # [rows, images]
    # An image has no share in itself: -∞ less -∞ is no number, and its share of 0 counts nothing.
    gaps = np.subtract(p, q, out=np.zeros_like(p), where=np.isfinite(p))
    found: NDArray[np.float64] = (np.exp(p) * gaps).sum(1)
    return found


def _log_shares(similarities: Similarities) -> NDArray[np.float64]:
    """The logarithms of the shares of all images in each row; -∞ for the image itself."""
    # The largest becomes 0, so that no exponential overflows.
    shifted = (similarities.astype(np.float64) - similarities.max(1, keepdims=True)) / TEMPERATURE
    logarithms: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logarithms
