"""The knapsack is solved exactly: no selection of all is better within any limit."""

from itertools import pairwise, product

import numpy as np
import pytest

from marrq.errors import MarrqError
from marrq.methods.knapsack import Choice, best_within, frontier


def drawn(seed: int) -> list[list[Choice]]:
    """Few items of few choices; small numbers, so that sizes and costs are often equal."""
    random = np.random.default_rng(seed)
    return [
        [
            Choice(int(random.integers(0, 12)), float(random.integers(0, 9)) / 8)
            for _ in range(random.integers(1, 5))
        ]
        for _ in range(random.integers(1, 7))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_no_selection_of_all_is_better_within_any_limit(seed: int):
    items = drawn(seed)
    every = [
        (sum(choice.size for choice in one), sum(choice.cost for choice in one))
        for one in product(*items)
    ]
    points = frontier(items)
    # Sums of eighths are exact, so that costs can be compared as they are.
    for limit in range(min(size for size, _ in every), max(size for size, _ in every) + 2):
        best = min(cost for size, cost in every if size <= limit)
        found = best_within(points, limit)
        assert found.cost == best
        assert found.size <= limit
        # The choices are those that give this size and this cost.
        taken = [choices[number] for choices, number in zip(items, found.chosen, strict=True)]
        assert sum(choice.size for choice in taken) == found.size
        assert sum(choice.cost for choice in taken) == found.cost


@pytest.mark.parametrize("seed", range(10))
def test_a_frontier_costs_less_the_larger_it_is(seed: int):
    points = frontier(drawn(seed))
    assert all(a.size < b.size and a.cost > b.cost for a, b in pairwise(points))


def test_a_limit_below_the_smallest_selection_is_refused():
    points = frontier([[Choice(4, 1.0), Choice(6, 0.5)], [Choice(3, 1.0)]])
    with pytest.raises(MarrqError, match="no selection has a size of 6: the smallest has 7"):
        best_within(points, 6)


def test_a_model_of_a_hundred_groups_has_a_frontier_no_longer_than_a_table_of_its_sizes():
    random = np.random.default_rng(0)
    units = random.integers(1, 5, 100)
    items = [
        [Choice(int(unit) * bits, float(random.random()) / 4**bits) for bits in (2, 3, 4, 8)]
        for unit in units
    ]
    assert len(frontier(items)) <= 6 * int(units.sum()) + 1


def test_a_model_of_groups_of_many_distinct_sizes_is_solved_too():
    random = np.random.default_rng(0)
    items = [
        [Choice(int(size) * bits + 40, float(random.random()) / 4**bits) for bits in (2, 3, 4, 8)]
        for size in random.integers(1000, 100_000, 60)
    ]
    points = frontier(items)
    assert len(points) > 2000
    assert points[0].chosen == (0,) * 60
    # Every item has some choice that costs least, and the largest selection has all of them.
    assert points[-1].cost == pytest.approx(sum(min(one.cost for one in item) for item in items))
