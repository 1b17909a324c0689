"""What a model's embeddings are worth if the images have classes: k-NN and retrieval.

The classes are the folders' own; a model that gives embeddings knows none. All similarities are
cosines (runtime/measure/similarity.py).

**k-NN**, k = 1 and 20: an image gets the class for which its k nearest images of the gallery vote,
each with the weight exp(cosine / 0.07). That is DINO's weighted vote (M. Caron et al., 2021) with
its k = 20 and temperature. The gallery is the images of `train`; without such images it is the
other images of the measured set (leave one out). With k = 1 it is recall@1 of the measured images
against `train`. A class without an image in the gallery cannot be found, and counts as wrong.

**Retrieval** among the measured images: each image is a query, and the others of its class are to
be found. Recall@1 is the share of queries whose nearest image is of their class. The average
precision of a query is the mean, over the images r of its class, of

    (images of its class at least as similar as r) / (all images at least as similar as r)

and mAP is its mean over the queries. Of images that are equally similar none comes first, so the
order of the images does not matter. An image that is alone in its class is no query.

**Intervals** are 95 %: Wilson's for shares (runtime/measure/accuracy.py), the jackknife over the
queries for mAP (runtime/measure/means.py). The gallery is as it is: they say how far another draw
of the queries might move a number. The **drop** against a baseline is judged on pairs: Tango's
interval and McNemar's test for shares, the interval of the mean difference for mAP.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import BaselineDrop, bits_of, hits_of, paired_drop, wilson_interval
from runtime.measure.means import mean_of
from runtime.measure.similarity import (
    Classes,
    Features,
    Similarities,
    in_chunks,
    nearest,
    normalized,
)
from runtime.records import Record

NEIGHBOURS = (1, 20)
TEMPERATURE = 0.07

Right = NDArray[np.bool_]


@dataclass(frozen=True)
class QueryShare(Record):
    """A share of the queries that are answered right, 0 … 1.

    low, high: of its 95 % Wilson interval. queries: how many there are.
    against: what is lost against the baseline; None for the baseline itself, and without one.
    hits: a bit for each query, in the order of the images, in hexadecimal.
    """

    share: float
    low: float
    high: float
    queries: int
    against: BaselineDrop | None
    hits: str

    @property
    def right(self) -> Right:
        """Whether each query is answered right, [queries]."""
        return bits_of(self.hits, self.queries)


@dataclass(frozen=True)
class MeanDrop(Record):
    """What a model loses in a mean against a baseline on the same images: baseline less model, with
    its 95 % interval. baseline: its name."""

    baseline: str
    drop: float
    drop_low: float
    drop_high: float


@dataclass(frozen=True)
class MeanPrecision(Record):
    """mAP, 0 … 1, with its 95 % interval, and what is lost of it against the baseline; None for
    the baseline itself, and without one."""

    mean: float
    low: float
    high: float
    queries: int
    against: MeanDrop | None


@dataclass(frozen=True)
class Retrieval(Record):
    """What embeddings find, if the images have classes."""

    # How many images the k-NN looks among, and whether these are the other measured images.
    gallery: int
    leave_one_out: bool
    # Of the measured images.
    classes: int
    # Top-1 of the vote of so many nearest images.
    knn1: QueryShare
    knn20: QueryShare
    # Among the measured images; None if no two of them have the same class.
    recall1: QueryShare | None
    mean_average_precision: MeanPrecision | None


@dataclass(frozen=True)
class Gallery:
    """Images with classes for k-NN to look among: embeddings [images, channels] and classes
    [images]."""

    features: Features
    classes: Classes


@dataclass(frozen=True)
class Found:
    """What one model finds. knn: by k, [images]; recalled, precisions: [queries]."""

    knn: dict[int, Right]
    recalled: Right
    precisions: NDArray[np.float64]
    gallery: int
    leave_one_out: bool
    classes: int


def find(
    features: Features,
    classes: Classes,
    gallery: Gallery | None,
    rows_done: Callable[[int], None] = lambda count: None,
) -> Found:
    """Look for the images of each class.

    features: of the measured images [images, channels], of at least two. classes: [images], 0, 1, …
    gallery: None to look among the measured images themselves.
    rows_done: called with the number of images of each chunk.
    """
    own = normalized(features)
    among, known = (own, classes) if gallery is None else _unpacked(gallery)
    knn: dict[int, list[Right]] = {k: [] for k in NEIGHBOURS}
    recalled, precisions = np.zeros(len(own), bool), np.zeros(len(own))
    count = int(max(classes.max(), known.max())) + 1
    for rows, similarities in in_chunks(own, own, True):
        relevant = classes[rows, None] == classes  # [rows, images]
        # An image is not found by itself.
        relevant &= np.isfinite(similarities)
        recalled[rows] = np.take_along_axis(relevant, similarities.argmax(1)[:, None], 1)[:, 0]
        precisions[rows] = average_precisions(similarities, relevant)
        # A gallery may be larger than the measured images, so it has chunks of its own.
        own_votes = [(slice(None), similarities)]
        looked_at = own_votes if gallery is None else in_chunks(own[rows], among, False)
        for part, votes in looked_at:
            for k, right in knn.items():
                right.append(vote(votes, known, k, count) == classes[rows][part])
        rows_done(rows.stop - rows.start)
    # Alone in its class, an image has nothing to find.
    queries = np.bincount(classes)[classes] > 1
    return Found(
        {k: np.concatenate(right) for k, right in knn.items()},
        recalled[queries],
        precisions[queries],
        len(among) if gallery is not None else len(own) - 1,
        gallery is None,
        len(np.unique(classes)),
    )


def _unpacked(gallery: Gallery) -> tuple[Features, Classes]:
    return normalized(gallery.features), gallery.classes


def vote(similarities: Similarities, classes: Classes, k: int, count: int) -> Classes:
    """The class of each row by the weighted vote of its k nearest images, [rows].

    similarities: [rows, images], -∞ for images that do not vote. classes: of the images.
    count: of classes. Of equal votes the first class wins.
    """
    # An image itself has no vote, and with fewer images than k all of them have one.
    among = min(k, int(np.isfinite(similarities).sum(1).min()))
    chosen = nearest(similarities, among)  # [rows, k]
    weights = np.exp(np.take_along_axis(similarities, chosen, 1).astype(np.float64) / TEMPERATURE)
    # A place for each row and class, in one row.
    places = np.arange(len(chosen))[:, None] * count + classes[chosen]
    votes = np.bincount(places.ravel(), weights.ravel(), len(chosen) * count)
    winners: Classes = votes.reshape(-1, count).argmax(1)
    return winners


def average_precisions(
    similarities: Similarities, relevant: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """The average precision of each row, [rows]; 0 without a relevant image. Both: [rows,
    images]."""
    precisions = np.zeros(len(similarities))
    for row, (found, wanted) in enumerate(zip(similarities, relevant, strict=True)):
        if not wanted.any():
            continue
        # Sorted from the most to the least similar: a place counts those at least as similar.
        ranked, hits = np.sort(-found), np.sort(-found[wanted])
        all_before = np.searchsorted(ranked, hits, side="right")
        of_class = np.searchsorted(hits, hits, side="right")
        precisions[row] = (of_class / all_before).mean()
    return precisions


def retrieval(found: Found, baseline: Found | None, name: str) -> Retrieval:
    """What a model finds, with what it loses.

    baseline: what the baseline finds; None for the baseline itself. name: of the baseline.
    """
    # Each is set beside the same of the baseline.
    knn = [
        _share(found.knn[k], None if baseline is None else baseline.knn[k], name)
        for k in NEIGHBOURS
    ]
    recalled, precision = None, None
    if len(found.recalled):
        recalled = _share(found.recalled, None if baseline is None else baseline.recalled, name)
        precision = _mean_precision(found, baseline, name)
    return Retrieval(
        found.gallery, found.leave_one_out, found.classes, knn[0], knn[1], recalled, precision
    )


def _share(right: Right, baseline: Right | None, name: str) -> QueryShare:
    count = len(right)
    against = None
    if baseline is not None:
        against = BaselineDrop(**vars(paired_drop(baseline, right)), baseline=name)
    ends = wilson_interval(int(right.sum()), count)
    return QueryShare(float(right.mean()), *ends, count, against, hits_of(right))


def _mean_precision(found: Found, baseline: Found | None, name: str) -> MeanPrecision:
    mean, against = mean_of(found.precisions, 0.0, 1.0), None
    if baseline is not None:
        # Pairs: what an image is to find is as hard for both models.
        lost = mean_of(baseline.precisions - found.precisions, -1.0, 1.0)
        against = MeanDrop(name, lost.value, lost.low, lost.high)
    return MeanPrecision(mean.value, mean.low, mean.high, len(found.precisions), against)
