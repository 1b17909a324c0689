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

from marrq.errors import MarrqError


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


@dataclass(frozen=True)
class _Partial:
    """A selection of the first items. before: the selection without the last of them."""

    size: int
    cost: float
    choice: int
    before: "_Partial | None"

    @property
    def chosen(self) -> tuple[int, ...]:
        """The choices of all items, the first item first."""
        found, partial = list[int](), self
        # The first partial selection has no item in it.
        while partial.before is not None:
            found.append(partial.choice)
            partial = partial.before
        return tuple(reversed(found))


def frontier(items: Sequence[Sequence[Choice]]) -> list[Point]:
    """Every selection that no other one beats: sizes ascend and costs descend, strictly.

    items: the choices of each item, at least one."""
    partials = [_Partial(0, 0.0, 0, None)]
    for choices in items:
        # Every way to go on, the smallest first; of equal sizes the one that costs least.
        extended = sorted(
            (
                _Partial(partial.size + choice.size, partial.cost + choice.cost, number, partial)
                for partial in partials
                for number, choice in enumerate(choices)
            ),
            key=lambda partial: (partial.size, partial.cost),
        )
        # A larger selection stays only if it costs less than all smaller ones.
        partials = []
        for partial in extended:
            if not partials or partial.cost < partials[-1].cost:
                partials.append(partial)
    return [Point(partial.size, partial.cost, partial.chosen) for partial in partials]


def best_within(points: Sequence[Point], limit: int) -> Point:
    """The point of a frontier that costs least within a limit of size.

    Raises MarrqError if the limit is below the smallest size."""
    # Costs descend as sizes ascend: it is the largest that fits.
    place = bisect_right(points, limit, key=lambda point: point.size)
    if place == 0:
        raise MarrqError(f"no selection has a size of {limit}: the smallest has {points[0].size}")
    return points[place - 1]
