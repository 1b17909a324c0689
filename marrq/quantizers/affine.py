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

The candidates of a search are the first dimension of one Grid, so that one operation tries many of
them (quantizers/chunks.py says how many).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.quantizers.chunks import candidate_shares, items_at_once
from marrq.quantizers.column_grid import ColumnGrid
from marrq.quantizers.salient import MAX_BITS, joint_range, stride, strides
from marrq.schemes import WeightSpec

WEIGHT_CLIP_FACTORS = tuple(1 - i / 100 for i in range(80))
"""Shares of the range of a weight that the search tries: 1, 0.99, … 0.21."""

WEIGHT_ERROR_POWER = 2.4
"""Exponent of the rounding error in that search."""

CHUNKS_BETWEEN_CHECKS = 8
"""Chunks of candidates after which the search asks whether it may end: asking takes about as long
as trying two."""


@dataclass(frozen=True)
class Grid:
    """An affine grid with the integer codes `low` … `high`.

    scale, zero_point: floating-point tensors that broadcast against the quantized tensor:
        [m, 1] for a weight [m, n] with a grid per channel, [] per tensor, [..., 1] per token.
        With groups they are [m, groups], for `values`, `codes` and `columns`; other methods take
        them after `spread`. Candidates of a search are [candidates, m, groups]. A zero point is an
        integer in `low` … `high`, held in floating point.
    salient: [r], columns with two codes for each weight (quantizers/salient.py), or None. The grid
        is that of the other columns then, and codes [m, n] are joint codes c.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    salient: Tensor | None = None

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

    def nearest(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The grid value that each x is rounded to.

        out: tensor for the values, or None for a new one.
        """
        # `dequantize` in place: nobody else has these codes.
        return self.quantize(x, out=out).sub_(self.zero_point).mul_(self.scale)

    def spread(self, columns: int) -> "Grid":
        """The same grid with a scale and a zero point for every column: [..., m, columns]."""
        # [m, groups] becomes [m, groups · size]: neighbours in a row belong to one group.
        size = columns // self.scale.shape[-1]
        return Grid(
            self.scale.repeat_interleave(size, -1),
            self.zero_point.repeat_interleave(size, -1),
            self.low,
            self.high,
        )

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The values of the smallest and the largest code, with the shape of the scale."""
        lowest, highest = (
            self.dequantize(torch.full_like(self.scale, code)) for code in (self.low, self.high)
        )
        return lowest, highest

    def values(self, codes: Tensor) -> Tensor:
        """The weights [m, n] that codes [m, n] stand for; scales are [m, groups]."""
        joint = self.joint
        return joint._grouped.dequantize(joint._by_group(codes)).flatten(1)

    def codes(self, weight: Tensor) -> Tensor:
        """Codes [m, n] of a weight [m, n], in its type; scales are [m, groups]."""
        if self.salient is None:
            return self._grouped.quantize(self._by_group(weight)).flatten(1)
        # Each column on its own grid: [n, m].
        grids = self.columns(torch.arange(weight.shape[1], device=weight.device))
        steps = weight.T.div(grids.scale).round_().clamp_(grids.lowest, grids.highest)
        return self.codes_of_steps_(steps.T.contiguous())

    def codes_of_steps_(self, steps: Tensor) -> Tensor:
        """From steps [m, n] (see ColumnGrid) to codes, in place."""
        if self.salient is not None:
            steps.mul_(strides(self.salient, self._num_bits, steps.shape[1]))
        self._by_group(steps).add_(self.joint.zero_point[..., None])
        return steps

    def with_salient(self, salient: Tensor | None) -> "Grid":
        """The same grid with two codes for each weight of some columns [r], or of none."""
        if salient is not None and self._num_bits > MAX_BITS:
            raise MarrqError(
                f"a second set of codes needs weights of {MAX_BITS} bits or fewer: got codes "
                f"{self.low} … {self.high}; leave lowrank=serq out, or choose fewer bits"
            )
        return replace(self, salient=salient)

    @property
    def joint(self) -> "Grid":
        """The grid of the joint codes; this grid if no column is salient."""
        if self.salient is None:
            return self
        steps = stride(self._num_bits)
        return Grid(self.scale / steps, self.zero_point * steps, *joint_range(self._num_bits))

    @property
    def _num_bits(self) -> int:
        """Bits of a code of a weight. The largest is 2^(b-1) - 1, of an mxint grid too."""
        return self.high.bit_length() + 1

    @property
    def _grouped(self) -> "Grid":
        """Scales [m, groups, 1], which broadcast over the inputs of a group."""
        return self.reshaped(*self.scale.shape, 1)

    def _by_group(self, values: Tensor) -> Tensor:
        """[m, n] as [m, groups, size]."""
        return values.reshape(len(values), self.scale.shape[1], -1)

    def columns(self, order: Tensor) -> "ColumnGrid":
        """The grids of the columns of a weight [m, n], in the given order.

        order: [n], indices of columns.
        """
        # The ends of the grid in steps from its zero. All three parts are [m, groups].
        lowest, highest = self.low - self.zero_point, self.high - self.zero_point
        parts = (self.scale, lowest, highest)
        groups = self.scale.shape[1]
        # One group: all columns share it, so nothing is copied n times.
        if groups == 1 and self.salient is None:
            return ColumnGrid(*(part.T.contiguous() for part in parts))
        # [n, m]: row j holds the grid of column order[j], contiguous for the sweep.
        group = order.div(len(order) // groups, rounding_mode="floor")
        columns = ColumnGrid(*(part.T.index_select(0, group) for part in parts))
        if self.salient is None:
            return columns
        return columns.widened(torch.isin(order, self.salient), self.low, self._num_bits)

    def reshaped(self, *shape: int) -> "Grid":
        """The same grid with scales of another shape."""
        return replace(
            self, scale=self.scale.reshape(shape), zero_point=self.zero_point.reshape(shape)
        )

    def split(self, count: int) -> Iterator["Grid"]:
        """The candidates of a search, at most `count` at a time."""
        both = zip(self.scale.split(count), self.zero_point.split(count), strict=True)
        return (Grid(scale, zero_point, self.low, self.high) for scale, zero_point in both)

    def of_tokens(self, tokens: slice) -> "Grid":
        """The candidates for some tokens: scales [candidates, tokens, 1]. A static grid,
        [candidates, 1, 1], serves all tokens."""
        if self.scale.shape[1] == 1:
            return self
        return Grid(self.scale[:, tokens], self.zero_point[:, tokens], self.low, self.high)

    def selected(self, choice: Tensor) -> "Grid":
        """The grid whose row i is row i of candidate choice[i].

        choice: [m], indices of candidates.
        """
        # Of [candidates, m, groups] one candidate for each row: [1, m, groups], then [m, groups].
        index = choice[None, :, None].expand(1, *self.scale.shape[1:])
        scale, zero_point = (part.gather(0, index)[0] for part in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero_point)


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


def symmetric_grid(largest: Tensor, code_range: tuple[int, int]) -> Grid:
    """The grid with the zero point 0 that gives a magnitude the code `high`. An empty range gets
    scale 1. The code `low` = -high - 1 is reached by rounding alone."""
    low, high = code_range
    scale = torch.where(largest > 0, largest / high, torch.ones_like(largest))
    return Grid(scale, torch.zeros_like(scale), low, high)


def search_weight_grid(weight: Tensor, spec: WeightSpec) -> Grid:
    """The grid of a weight [m, n], chosen by the weight alone; its scales are [m, groups].

    Raises MarrqError if n is not a multiple of the group size.
    """
    # Every group is a row [size] and gets one scale, so groups and channels are searched alike.
    groups = _groups(weight, spec)
    if spec.grid == "mxint":
        return _mxint_grid(groups, spec.code_range).reshaped(len(weight), -1)
    # No row depends on another: the search ends with one chunk of rows before it takes the next.
    rows = items_at_once(len(groups), groups[:1], weight.device)
    return stack_grids(
        [
            _least_error(part, _clipped_grids(part, spec, WEIGHT_CLIP_FACTORS))
            for part in groups.split(rows)
        ]
    ).reshaped(len(weight), -1)


def clipped_weight_grids(weight: Tensor, spec: WeightSpec, factors: Sequence[float]) -> Grid:
    """The grids of a weight [m, n] with its ranges clipped by each factor: scales [factors, m,
    groups].

    An mxint grid has no range to clip: then there is that grid alone, [1, m, groups]. Raises
    MarrqError if n is not a multiple of the group size.
    """
    groups, mxint = _groups(weight, spec), spec.grid == "mxint"
    grid = _mxint_grid(groups, spec.code_range) if mxint else _clipped_grids(groups, spec, factors)
    return grid.reshaped(1 if mxint else len(factors), len(weight), -1)


def stack_grids(grids: Sequence[Grid]) -> Grid:
    """The grid of several weights stacked on each other: scales [Σ m, groups]. They have the same
    salient columns."""
    return replace(
        grids[0],
        scale=torch.cat([grid.scale for grid in grids]),
        zero_point=torch.cat([grid.zero_point for grid in grids]),
    )


def _groups(weight: Tensor, spec: WeightSpec) -> Tensor:
    """The parts of a weight that share a scale, one a row: [m · groups, size]."""
    size = spec.group_size or weight.shape[1]
    if weight.shape[1] % size:
        raise MarrqError(
            f"{weight.shape[1]} inputs are no multiple of the group size {size}: choose another "
            "group size"
        )
    return weight.reshape(-1, size)


def _clipped_grids(rows: Tensor, spec: WeightSpec, factors: Sequence[float]) -> Grid:
    """The grids of each row with its range multiplied by each factor: scales [factors, rows, 1]."""
    shares = candidate_shares(factors, rows)
    # Asymmetric: both ends move towards 0, and grid_from_range finds the zero point anew.
    if spec.grid == "asymmetric":
        return grid_from_range(
            rows.amin(1, keepdim=True) * shares,
            rows.amax(1, keepdim=True) * shares,
            spec.code_range,
        )
    return symmetric_grid(rows.abs().amax(1, keepdim=True) * shares, spec.code_range)


def _least_error(rows: Tensor, grids: Grid) -> Grid:
    """For each row the candidate with the least Σ |q - w|^2.4; of equals the first.

    grids: from the widest range to the narrowest.
    """
    count = items_at_once(len(grids.scale), rows, rows.device)
    # One buffer [count, rows, size] for all chunks of candidates: it stays in the cache.
    buffer = rows.new_empty(count, *rows.shape)
    errors: list[Tensor] = []
    for tried, grid in enumerate(grids.split(count)):
        near = grid.nearest(rows, out=buffer[: len(grid.scale)])
        errors.append(_powers_(near.sub_(rows)).sum(-1))
        if (tried + 1) % CHUNKS_BETWEEN_CHECKS == 0 and _is_settled(rows, grid, errors):
            break
    return grids.selected(torch.cat(errors).argmin(0))


def _is_settled(rows: Tensor, grid: Grid, errors: list[Tensor]) -> bool:
    """Whether no narrower range can serve any row better.

    grid: the last candidates that were tried. errors: of all candidates so far.
    """
    # Only on a CPU: a GPU tries all candidates sooner than it answers.
    if rows.device.type != "cpu":
        return False
    # Rounding the zero point moves a range by at most half a step: this one to one side, a narrower
    # one to the other, if min / scale is a tie. A step beyond the range, what is clipped is clipped
    # by every narrower range too: its error is a lower bound of theirs.
    lowest, highest = (end[-1] for end in grid.ends)
    step = grid.scale[-1]
    clipped = rows - rows.clamp(lowest - step, highest + step)
    bound = _powers_(clipped).sum(-1)
    return bool((bound > torch.cat(errors).amin(0)).all())


def _powers_(errors: Tensor) -> Tensor:
    """|d|^2.4 in place."""
    # As exp(p · log |d|), seven times as fast on a CPU as pow. An error of 0 survives: log 0 = -∞
    # and exp(-∞) = 0.
    return errors.abs_().log_().mul_(WEIGHT_ERROR_POWER).exp_()


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
