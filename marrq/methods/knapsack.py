"""The multiple-choice knapsack: of each item one choice, so that the costs add up to the least
within a limit of size.

    minimize Σ_i cost(i, c_i)    subject to    Σ_i size(i, c_i) ≤ limit

(Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). It is solved exactly, by
dynamic programming over partial selections: a selection of the first items is dropped if another
one is neither larger nor costs more, since whatever is chosen for the other items, the other one
stays at least as good (Nemhauser and Ullmann, 10.1287/mnsc.15.9.494). What is left when all items
are in is the frontier: the best selection for every limit at once.

Differs from the textbook's table over all sizes: sizes may be any integers, and no unit has to be
found. If all sizes are multiples of a unit, a list is never longer than that table. The linears of
a vision transformer have a few distinct sizes, so that a frontier has some hundreds of points.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from marrq.errors import MarrqError

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Choice:
    """One way to take an item. size: in any unit, as an integer."""

    size: int
    cost: float


@dataclass(frozen=True)
class Point:
    """The best selection of its size.

    chosen: for each item the number of its choice.
    """

    size: int
    cost: float
    chosen: tuple[int, ...]


def frontier(items: Sequence[Sequence[Choice]]) -> list[Point]:
    """Every selection that no other one beats: sizes ascend and costs descend, strictly.

    items: the choices of each item, at least one."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    # For each item: which partial selection before it each one goes on from, and by which choice.
    steps: list[tuple[Numbers, Numbers]] = []
    for choices in items:
        # Every way to go on, [choices, partials]: Python objects would take a hundred times as long
        # for a model whose linears have many distinct sizes.
        larger = np.add.outer(np.array([choice.size for choice in choices], np.int64), sizes)
        dearer = np.add.outer(np.array([choice.cost for choice in choices]), costs)
        kept = _unbeaten(larger.ravel(), dearer.ravel())
        numbers, before = np.divmod(kept, len(sizes))
        steps.append((before, numbers))
        sizes, costs = larger.ravel()[kept], dearer.ravel()[kept]
    # Backwards, from each selection of all items to its choice for the last, the one before it …
    place, chosen = np.arange(len(sizes)), np.empty((len(sizes), len(items)), np.int64)
    for item in reversed(range(len(items))):
        before, numbers = steps[item]
        chosen[:, item], place = numbers[place], before[place]
    rows = zip(sizes.tolist(), costs.tolist(), chosen.tolist(), strict=True)
    return [Point(size, cost, tuple(row)) for size, cost, row in rows]


def _unbeaten(sizes: Numbers, costs: np.ndarray[Any, np.dtype[np.float64]]) -> Numbers:
    """The numbers of the selections that no other one beats, by size. sizes, costs: [selections]"""
    # The smallest first; of equal sizes the one that costs least.
    order = np.lexsort((costs, sizes))
    ordered = costs[order]
    # A larger selection stays only if it costs less than all smaller ones.
    least = np.minimum.accumulate(ordered)
    return order[np.concatenate(([True], ordered[1:] < least[:-1]))]


def best_within(points: Sequence[Point], limit: int) -> Point:
    """The point of a frontier that costs least within a limit of size.

    Raises MarrqError if the limit is below the smallest size."""
    # Costs descend as sizes ascend: it is the largest that fits.
    place = bisect_right(points, limit, key=lambda point: point.size)
    if place == 0:
        raise MarrqError(f"no selection has a size of {limit}: the smallest has {points[0].size}")
    return points[place - 1]
