"""Affine grids: choose a grid, quantize to its codes, dequantize the codes.

    code  = clamp(round(x / scale) + zero_point, low, high)
    value = (code - zero_point) · scale

No other file of marrq turns numbers into codes. Rounding is half to even, and x is divided by the
scale, not multiplied by its reciprocal. ONNX QuantizeLinear does the same, so torch and ONNX
Runtime give the same codes. Every grid represents 0 exactly.

A weight has one grid per output channel or per group of inputs:

    asymmetric    from min/max; of 80 clipped ranges the one with the least Σ |q - w|^2.4, as in
                  GPTQ's released code (arXiv 2210.17323)
    symmetric     the same from max |w|, with zero_point = 0
    mxint         scale = 2^(e - b + 2) with b bits, e the exponent of the largest magnitude in a
                  block of 32; nothing is searched (OCP MX; SRR, arXiv 2602.02001)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.schemes import WeightSpec

WEIGHT_CLIP_FACTORS = tuple(1 - i / 100 for i in range(80))
"""Shares of the range of a weight that the search tries: 1, 0.99, … 0.21."""

WEIGHT_ERROR_POWER = 2.4
"""Exponent of the rounding error in that search."""


@dataclass(frozen=True)
class Grid:
    """An affine grid with the integer codes `low` … `high`.

    scale, zero_point: floating-point tensors that broadcast against the quantized tensor:
        [m, 1] for a weight [m, n] with a grid per channel, [] per tensor, [..., 1] per token.
        With groups they are [m, groups]; `spread` them before use. A zero point is an integer in
        `low` … `high`, held in floating point.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int

    def quantize(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Codes of x, in the floating-point type of x. NaN stays NaN.

        out: tensor for the codes, or None for a new one.
        """
        # One tensor is allocated; the steps after the division change it in place. The zero point
        # is added after rounding, as ONNX does, so a tie is decided by x / scale alone.
        return (
            torch.div(x, self.scale, out=out)
            .round_()
            .add_(self.zero_point)
            .clamp_(self.low, self.high)
        )

    def dequantize(self, codes: Tensor) -> Tensor:
        """Values of codes, in the type of the scale."""
        # The difference of two integers is exact, so only the product is rounded.
        return (codes - self.zero_point).mul_(self.scale)

    def nearest(self, x: Tensor) -> Tensor:
        """The grid value that each x is rounded to."""
        return self.dequantize(self.quantize(x))

    def spread(self, columns: int) -> "Grid":
        """The same grid with a scale and a zero point for every column: [m, columns]."""
        # [m, groups] becomes [m, groups · size]: neighbours in a row belong to one group.
        size = columns // self.scale.shape[1]
        return Grid(
            self.scale.repeat_interleave(size, 1),
            self.zero_point.repeat_interleave(size, 1),
            self.low,
            self.high,
        )

    def columns(self, order: Tensor) -> list["ColumnGrid"]:
        """The grids of the columns of a weight [m, n], in the given order.

        order: [n], indices of columns.
        """
        # The ends of the grid in steps from its zero. All three parts are [m, groups].
        lowest, highest = self.low - self.zero_point, self.high - self.zero_point
        parts = (self.scale, lowest, highest)
        if self.scale.shape[1] == 1:
            # One group: all columns share one object, so nothing is copied n times.
            return [ColumnGrid(*(part[:, 0].contiguous() for part in parts))] * len(order)
        # [n, m]: row j holds the grid of column order[j], contiguous for the sweep.
        spread = (part.repeat_interleave(len(order) // part.shape[1], 1).T[order] for part in parts)
        return [ColumnGrid(*column) for column in zip(*spread, strict=True)]

    def reshaped(self, rows: int) -> "Grid":
        """The same grid with its scales as [rows, groups]."""
        return Grid(
            self.scale.reshape(rows, -1), self.zero_point.reshape(rows, -1), self.low, self.high
        )


@dataclass(frozen=True)
class ColumnGrid:
    """The grid of one column of a weight, counted in steps from its zero.

        steps = code - zero_point,  value = steps · scale

    Steps need half as many operations as codes and give the same integers.

    scale, lowest, highest: [m]; `lowest` and `highest` are `low` and `high` minus the zero point.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def round(self, x: Tensor, out: Tensor) -> Tensor:
        """Steps of x [m], written to `out`. NaN stays NaN."""
        # clamp(round(x / scale) + z, low, high) - z = clamp(round(x / scale), low - z, high - z)
        return torch.div(x, self.scale, out=out).round_().clamp_(self.lowest, self.highest)


def grid_from_range(minimum: Tensor, maximum: Tensor, code_range: tuple[int, int]) -> Grid:
    """The grid that spans [min(minimum, 0), max(maximum, 0)]. An empty range gets scale 1."""
    low, high = code_range
    # The range is widened to include 0, so that 0 has an exact code.
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    # high - low steps lead from the smallest code to the largest.
    scale = (maximum - minimum) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # The zero point is the code of 0; `minimum` then gets the code `low`, up to half a step.
    zero_point = torch.clamp(torch.round(low - minimum / scale), low, high)
    return Grid(scale, zero_point, low, high)


def search_weight_grid(weight: Tensor, spec: WeightSpec) -> Grid:
    """The grid of a weight [m, n], chosen by the weight alone; its scales are [m, groups].

    Raises MarrqError if n is not a multiple of the group size.
    """
    # Every group is a row [size] and gets one scale, so groups and channels are searched alike.
    groups = _groups(weight, spec)
    if spec.grid == "mxint":
        return _mxint_grid(groups, spec.code_range).reshaped(len(weight))
    grids = (_clipped_grid(groups, spec, factor) for factor in WEIGHT_CLIP_FACTORS)
    return _least_error(groups, grids).reshaped(len(weight))


def clipped_weight_grids(weight: Tensor, spec: WeightSpec, factors: Sequence[float]) -> list[Grid]:
    """One grid of a weight [m, n] for each factor by which its ranges are clipped.

    An mxint grid has no range to clip: the list then holds that grid alone. Raises MarrqError if n
    is not a multiple of the group size.
    """
    groups = _groups(weight, spec)
    if spec.grid == "mxint":
        return [_mxint_grid(groups, spec.code_range).reshaped(len(weight))]
    return [_clipped_grid(groups, spec, factor).reshaped(len(weight)) for factor in factors]


def stack_grids(grids: Sequence[Grid]) -> Grid:
    """The grid of several weights stacked on each other: scales [Σ m, groups]."""
    return Grid(
        torch.cat([grid.scale for grid in grids]),
        torch.cat([grid.zero_point for grid in grids]),
        grids[0].low,
        grids[0].high,
    )


def select_rows(grids: Sequence[Grid], choice: Tensor) -> Grid:
    """The grid whose row i is row i of grids[choice[i]]. choice: [m], indices of `grids`."""
    # Stacked scales are [grids, m, groups]; the index (choice[i], i) selects one row for each i.
    rows = torch.arange(len(choice), device=choice.device)
    scale = torch.stack([grid.scale for grid in grids])[choice, rows]
    zero_point = torch.stack([grid.zero_point for grid in grids])[choice, rows]
    return Grid(scale, zero_point, grids[0].low, grids[0].high)


def _groups(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The parts of a weight that share a scale, one a row: [m · groups, size]."""
    size = spec.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise MarrqError(
            f"{weight.shape[1]} inputs are no multiple of the group size {size}: choose another "
            "group size"
        )
    return weight.reshape(-1, size)


def _clipped_grid(rows: Tensor, spec: WeightSpec, factor: float) -> Grid:
    """The grid of each row with its range multiplied by a factor."""
    low, high = spec.code_range
    # Asymmetric: both ends move towards 0, and grid_from_range finds the zero point anew.
    if spec.grid == "asymmetric":
        return grid_from_range(
            rows.amin(1, keepdim=True) * factor, rows.amax(1, keepdim=True) * factor, (low, high)
        )
    # Symmetric: max |w| gets the code `high`; `low` = -high - 1 is reached by rounding alone.
    largest = rows.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest * factor / high, torch.ones_like(largest))
    return Grid(scale, torch.zeros_like(scale), low, high)


def _least_error(rows: Tensor, grids: Iterable[Grid]) -> Grid:
    """For each row the grid with the least Σ |q - w|^2.4; of equals the first."""
    candidates = list(grids)
    # |d|^p is computed as exp(p · log |d|), seven times as fast on a CPU as pow. An error of 0
    # survives: log 0 = -∞ and exp(-∞) = 0.
    errors = [
        grid.nearest(rows).sub_(rows).abs_().log_().mul_(WEIGHT_ERROR_POWER).exp_().sum(1)
        for grid in candidates
    ]
    return select_rows(candidates, torch.stack(errors).argmin(0))


def _mxint_grid(blocks: Tensor, code_range: tuple[int, int]) -> Grid:
    """The mxint grid of each row of `blocks`: one sign bit and b - 1 bits of mantissa."""
    _, high = code_range
    largest = blocks.abs().amax(1, keepdim=True)
    # frexp gives a mantissa in [0.5, 1); minus 1 the exponent is e with largest = 1.xxx · 2^e.
    exponent = torch.frexp(largest).exponent - 1
    # high = 2^(b - 1) - 1 has b - 1 binary digits, so this is 2^(e - b + 2): the largest magnitude
    # takes between 2^(b - 2) and 2^(b - 1) steps.
    scale = torch.ldexp(
        torch.ones_like(largest), torch.where(largest > 0, exponent, 0) + 2 - high.bit_length() - 1
    )
    # The grid is symmetric: the code -high - 1 is not used.
    return Grid(scale, torch.zeros_like(scale), -high, high)
