"""What each group of linears costs a model at each width, and which widths a budget buys: data
only.

A group is the linears that share an input: they have one width. Its cost at a width is the
divergence that the rounding of its weights and of its input is expected to add
(marrq/pipeline/sensitivity.py), and costs of groups add. Then the widths that diverge least within
a budget are the solution of a knapsack (marrq/methods/knapsack.py), which is solved exactly, for
every budget at once.

Size is counted as it is stored: codes, scales, zero points and smoothing factors of all quantized
linears; a size in bytes also has all other tensors of the artifact.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from marrq.errors import MarrqError
from marrq.methods.knapsack import Choice, Point, best_within, frontier

SCHEMA = "marrq.sensitivity/1"
MAX_STORED_BITS = 2**48
"""Of a group of linears, in a file."""


@dataclass(frozen=True)
class Width:
    """A group at one width.

    stored_bits: of all its linears, scales and zero points included.
    divergence: expected, of an image; `about` names its unit.
    """

    num_bits: int
    stored_bits: int
    divergence: float


@dataclass(frozen=True)
class GroupSensitivity:
    """Linears that share an input. paths: in the model; weights: their number."""

    paths: tuple[str, ...]
    weights: int
    widths: tuple[Width, ...]


@dataclass(frozen=True)
class Plan:
    """The widths that diverge least within a size.

    widths: by the path of each linear.
    bits_per_weight: all that is stored for the quantized linears, over their weights.
    size_bytes: of all tensors of the artifact.
    divergence: expected.
    """

    widths: Mapping[str, int]
    bits_per_weight: float
    size_bytes: int
    divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """The groups of a model.

    about: what the figures depend on, as plain values: model, scheme, method, calibration images.
    outer_weights, outer_bits: of quantized first and last layers, which have 8 bits in every plan.
    other_bits: of all other tensors of the artifact.
    """

    about: Mapping[str, Any]
    groups: tuple[GroupSensitivity, ...]
    outer_weights: int = 0
    outer_bits: int = 0
    other_bits: int = 0

    @property
    def weights(self) -> int:
        """The weights of all quantized linears."""
        return self.outer_weights + sum(group.weights for group in self.groups)

    def within_bits(self, budget: float) -> Plan:
        """The best plan of at most `budget` bits a weight. Raises MarrqError if there is none."""
        least = self._plan(self._points[0])
        if not budget >= least.bits_per_weight:
            raise MarrqError(
                f"a budget of {budget:g} bits a weight is too small: with the fewest bits "
                f"everywhere the model has {least.bits_per_weight:.3f}, scales included"
            )
        most = math.floor(budget * self.weights)
        # A plan's own bits a weight buy this plan: their product with the weights may be rounded
        # to a bit less.
        if (most + 1) / self.weights <= budget:
            most += 1
        return self._plan(best_within(self._points, most - self.outer_bits))

    def within_bytes(self, size: int) -> Plan:
        """The best plan whose artifact has tensors of at most `size` bytes. Raises MarrqError if
        there is none."""
        least = self._plan(self._points[0])
        if size < least.size_bytes:
            raise MarrqError(
                f"a size of {size / 1e6:g} MB is too small: with the fewest bits everywhere the "
                f"artifact's tensors have {least.size_bytes / 1e6:.3f} MB, float parts included"
            )
        limit = 8 * size - self.outer_bits - self.other_bits
        return self._plan(best_within(self._points, limit))

    def uniform(self, num_bits: int) -> Plan:
        """The plan of one width for all groups."""
        chosen = []
        for group in self.groups:
            [place] = [at for at, one in enumerate(group.widths) if one.num_bits == num_bits]
            chosen.append(place)
        taken = [group.widths[place] for group, place in zip(self.groups, chosen, strict=True)]
        size = sum(width.stored_bits for width in taken)
        cost = sum(width.divergence for width in taken)
        return self._plan(Point(size, cost, tuple(chosen)))

    def to_json(self) -> dict[str, Any]:
        """Schema marrq.sensitivity/1: the figures, the curve, and models of one width beside it."""
        widths = [width.num_bits for width in self.groups[0].widths]
        return {
            "schema": SCHEMA,
            **asdict(self),
            "curve": [asdict(plan) for plan in self.curve()],
            "uniform": [asdict(self.uniform(num_bits)) for num_bits in widths],
        }

    def curve(self, count: int = 200) -> list[Plan]:
        """At most `count` plans from the smallest to the largest, each the best of its size."""
        points = self._points
        # Evenly spaced in size, the first and the last among them.
        first, last = points[0].size, points[-1].size
        limits = [first + (last - first) * place // (count - 1) for place in range(count)]
        # Limits between the same two points have the same plan.
        chosen = {point.size: point for point in (best_within(points, limit) for limit in limits)}
        return list(map(self._plan, chosen.values()))

    @cached_property
    def _points(self) -> list[Point]:
        """The frontier over all sizes."""
        return frontier(
            [
                [Choice(width.stored_bits, width.divergence) for width in group.widths]
                for group in self.groups
            ]
        )

    def _plan(self, point: Point) -> Plan:
        chosen = [
            (group, group.widths[number])
            for group, number in zip(self.groups, point.chosen, strict=True)
        ]
        bits = point.size + self.outer_bits
        return Plan(
            {path: width.num_bits for group, width in chosen for path in group.paths},
            bits / self.weights,
            -(-(bits + self.other_bits) // 8),
            point.cost,
        )


def sensitivity_from_json(fields: Mapping[str, Any]) -> Sensitivity:
    """The inverse of `to_json`. Raises MarrqError for JSON that is no sensitivity."""
    try:
        if fields["schema"] != SCHEMA:
            raise ValueError(f"its schema is {fields['schema']!r}, not {SCHEMA!r}")
        groups = tuple(
            GroupSensitivity(
                tuple(group["paths"]),
                int(group["weights"]),
                tuple(
                    Width(int(one["num_bits"]), int(one["stored_bits"]), float(one["divergence"]))
                    for one in group["widths"]
                ),
            )
            for group in fields["groups"]
        )
        numbers = [int(fields[key]) for key in ("outer_weights", "outer_bits", "other_bits")]
        found = Sensitivity(dict(fields["about"]), groups, *numbers)
        # A cost that is no number would make every plan as good as any other.
        if not groups or not all(group.widths for group in groups):
            raise ValueError("it has no widths")
        widths = [width for group in groups for width in group.widths]
        if not all(math.isfinite(width.divergence) for width in widths):
            raise ValueError("a divergence is no number")
        # Sizes are added in 64 bits.
        sizes = (*numbers, *(width.stored_bits for width in widths))
        if not all(0 <= size <= MAX_STORED_BITS for size in sizes):
            raise ValueError("a number of bits is no size that a model has")
        if not all(0 < group.weights <= MAX_STORED_BITS for group in groups):
            raise ValueError("a group has no weights")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MarrqError(f"the file is no sensitivity ({error}): run marrq sensitivity") from error
    return found
