"""GPTQ (arXiv 2210.17323), and the column sweep that every error-compensating method here shares.

Columns are rounded one after the other. The error that the rounding of column j makes in the
outputs is compensated in the columns not yet rounded. With U from (H + λI)⁻¹ = Uᵀ U, q(·) the
rounding to the row's grid, w_j the compensated column just before it is rounded, and W0 the weight
as given:

    δ = (w_j - q(w_j)) / U_jj
    W[:, >j] += - δ ⊗ U[j, >j]                       GPTQ
                + α w_j ⊗ P1[j, >j]                  GPTAQ, P1 in methods/gptaq.py
                + α (W0_j - w_j) ⊗ P2[j, >j]         ResComp, P2 in methods/rescomp.py

Each line is a term [m] times its influence on the columns [n]: the error w_j - q(w_j) times
-U[j] / U_jj, the drift α w_j times P1[j], the change α (W0_j - w_j) times P2[j].

The sweep is lazy, as in the paper: inside a block of columns the terms act at once, on the columns
behind the block in one matrix product.

Differs from the released code of GPTAQ: the drift at the end of a block is formed from the
compensated columns, as inside the block, and not from the rounded ones, which would make 7–10 % of
the codes depend on the block size.

Two things are ours. Rows do not depend on each other, so that many values of α are swept at the
price of one column loop: the weight is stacked upon itself, with an α for each row. The same
stacking finds better grids than the papers' search, which looks at the rounding error of a row's
weights and knows nothing of compensation: the weight is swept on several clipped grids at once, and
each row keeps the grid with the least error of its output, (q - w) H (q - w)ᵀ.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from marrq.distributed import ROW_TILE
from marrq.methods.column_block import ColumnBlock
from marrq.methods.factor import Factor
from marrq.methods.problem import Problem, Rounding, SweepData
from marrq.methods.spec import MethodSpec
from marrq.quantizers.affine import (
    Grid,
    clipped_weight_grids,
    search_weight_grid,
    stack_grids,
)
from marrq.quantizers.column_grid import ColumnGrid
from marrq.schemes import WeightSpec

BLOCK_SIZE = 128
STACKED_ROWS = 4096
"""Rows swept at once in the search of grids: enough to hide the column loop, few enough to need
little memory."""
OUTPUT_CLIP_FACTORS = tuple(1 - 0.06 * i for i in range(12))
"""The ranges that are tried by their outputs, as shares of the whole range of a row."""


def sweep(
    weight: Tensor,
    grid: Grid,
    factor: Factor,
    residuals: tuple[Tensor, ...] = (),
    alpha: float | Tensor = 0.0,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Codes [m, n] of a weight [m, n], in the weight's type and on its device.

    grid: one grid for each row, or for each group of inputs in a row
    factor: U and the order of the columns
    residuals: (), (P1,) or (P1, P2), each [n, n] in sweep order, strictly upper triangular
    alpha: the residual strength, one for all rows or [m], one for each row
    block_size: columns of a block; the result depends on it by the order of sums alone

    For a float32 weight on CUDA, if the package triton is installed, the columns of a block are one
    kernel (methods/sweep_kernel.py); otherwise they are a loop."""
    # A column of the weight becomes a contiguous row: w is [n, m], in sweep order.
    w = weight.T.contiguous().index_select(0, factor.order)
    steps = sweep_steps(w, grid.columns(factor.order), factor, residuals, alpha, block_size)
    # Back to the order of the inputs, and from steps to codes.
    steps = steps.index_select(0, factor.order.argsort()).T.contiguous()
    return grid.codes_of_steps_(steps)


def sweep_steps(
    w: Tensor,
    grids: ColumnGrid,
    factor: Factor,
    residuals: tuple[Tensor, ...] = (),
    alpha: float | Tensor = 0.0,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """The sweep on the columns of a weight as rows, in sweep order: codes minus zero points,
    [n, m]. The columns [n, m] are compensated in place; the rest is as for `sweep`."""
    # Only ResComp's term asks for W0; the others need no copy.
    original = w.clone() if len(residuals) > 1 else w
    influences = [factor.compensation(w.dtype), *(residual.to(w) for residual in residuals)]
    steps = torch.empty_like(w)
    round_block = block_rounding(w)
    for start in range(0, len(w), block_size):
        end = min(start + block_size, len(w))
        # [width, terms, m], filled column by column.
        terms = w.new_empty(end - start, len(influences), w.shape[1])
        # The part of the influences that acts within the block: [width, width, terms].
        inside = torch.stack([influence[start:end, start:end] for influence in influences], 2)
        round_block(
            ColumnBlock(
                columns=w[start:end],
                original=original[start:end],
                influences=inside,
                grids=grids[start:end],
                alpha=alpha,
                steps=steps[start:end],
                terms=terms,
            )
        )
        # Lazy update: Σ_j influence[j, >end] ⊗ term_j over the whole block, in one product.
        for influence, term in zip(influences, terms.unbind(1), strict=True):
            w[end:].addmm_(influence[start:end, end:].T, term)
    return steps


def round_columns(block: ColumnBlock) -> None:
    """Round the columns of a block one after the other: the column loop, in torch."""
    # Views of single columns are made beforehand: making one takes as long as the arithmetic on it.
    w, alpha = block.columns, block.alpha
    columns, rounded = w.unbind(), block.steps.unbind()
    originals = block.original.unbind() if block.terms.shape[1] > 2 else ()
    # One tuple for each column; each term is [m], a view into block.terms: it acts on later blocks
    # too.
    terms = list(zip(*(term.unbind() for term in block.terms.unbind(1)), strict=True))
    influences, behind = block.influences.unbind(), block.terms.unbind()
    for j, (scale, lowest, highest) in enumerate(block.grids.each(len(w))):
        error, *residual = terms[j]
        # clamp(round(x / s) + z, low, high) - z = clamp(round(x / s), low - z, high - z).
        step = torch.div(columns[j], scale, out=rounded[j]).round_().clamp_(lowest, highest)
        # GPTQ: error = w_j - q(w_j), with q(w_j) = step · scale.
        torch.addcmul(columns[j], step, scale, value=-1, out=error)
        # GPTAQ: α w_j, the compensated column and not the rounded one.
        if residual:
            torch.mul(columns[j], alpha, out=residual[0])
        # ResComp: α (W0_j - w_j), the change that compensation has made in this column.
        if len(residual) > 1:
            torch.sub(originals[j], columns[j], out=residual[1]).mul_(alpha)
        # All terms act on the columns behind: [width - j - 1, terms] × [terms, m].
        w[j + 1 :].addmm_(influences[j][j + 1 :], behind[j])


def block_rounding(w: Tensor) -> Callable[[ColumnBlock], None]:
    """What rounds the columns of a block: one kernel for float32 on CUDA if the package triton is
    installed, otherwise the loop in torch."""
    if (
        w.device.type != "cuda"
        or w.dtype != torch.float32
        or not torch.cuda.is_available()
        or find_spec("triton") is None
    ):
        return round_columns
    from marrq.methods.sweep_kernel import sweep_columns

    return sweep_columns


def choose_grid(weight: Tensor, data: SweepData, weight_spec: WeightSpec) -> Grid:
    """The grid of a weight [m, n], by its rounding error or by the error of its outputs after a
    sweep, as `data.clip` says."""
    # An mxint scale is given by the largest magnitude: there is nothing to search.
    if data.clip == "weights" or weight_spec.grid == "mxint":
        return search_weight_grid(weight, weight_spec).with_salient(data.salient)
    # Rows in whole tiles: the products of a row then come out the same to the last bit, whichever
    # rows are beside it (marrq/distributed.py).
    candidates = len(OUTPUT_CLIP_FACTORS) + 1
    rows_at_once = max(1, STACKED_ROWS // candidates // ROW_TILE) * ROW_TILE
    parts = [_least_output_error(rows, data, weight_spec) for rows in weight.split(rows_at_once)]
    return stack_grids(parts)


def _least_output_error(rows: Tensor, data: SweepData, weight_spec: WeightSpec) -> Grid:
    """For each row [n] of a weight, the candidate grid with the least error of its output."""
    # The grid by the weights alone is a candidate too, so that the outputs never get worse.
    by_weights = search_weight_grid(rows, weight_spec)
    grids = stack_grids(
        [
            clipped_weight_grids(rows, weight_spec, OUTPUT_CLIP_FACTORS),
            by_weights.reshaped(1, *by_weights.scale.shape),
        ]
    )  # scales [candidates, m, groups]
    # All candidates in one column loop: the rows stacked once for each grid, [n, candidates · m].
    count, order = len(grids.scale), data.factors.factor.order
    columns = rows.T.contiguous().index_select(0, order).repeat(1, count)
    grids = grids.with_salient(data.salient)
    stacked = grids.reshaped(count * len(rows), -1).columns(order)
    steps = sweep_steps(columns.clone(), stacked, data.factors.factor)
    # E = Q - W, back in the order of the inputs: [candidates · m, n].
    error = steps.mul_(stacked.scale).sub_(columns)
    error = error.index_select(0, order.argsort()).T.contiguous()
    # diag(E H Eᵀ), the square error of each row's output: [candidates, m].
    outputs = (error @ data.factors.hessian(rows.dtype)).mul_(error).sum(1).view(count, -1)
    return grids.selected(outputs.argmin(0))


def gptq(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """The sweep without a residual term: the drift of the inputs is not corrected."""
    grid = choose_grid(weight, problem.whole, problem.weight_spec)
    return Rounding(sweep(weight, grid, problem.whole.factors.factor), grid)
