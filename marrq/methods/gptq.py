"""GPTQ (arXiv 2210.17323) and the column sweep that every error-compensating method here shares.

Columns are rounded one after the other; what the rounding of column j does to the outputs is
compensated in the columns not yet rounded. With U from (H + λI)⁻¹ = Uᵀ U, q(·) the rounding to the
row's grid and w_j the compensated column just before it is rounded:

    e = (w_j - q(w_j)) / U_jj
    W[:, >j] += - e ⊗ U[j, >j]                       GPTQ
                + α w_j ⊗ P1[j, >j]                  GPTAQ        (methods/gptaq.py has P1)
                + α (W0_j - w_j) ⊗ P2[j, >j]         ResComp      (methods/rescomp.py has P2); W0 is the weight as given

The sweep is lazy: within a block of columns updates are applied at once, beyond it in one matrix
product at the block's end. Both residual factors at a block's end are the compensated columns
themselves ("pre"); GPTAQ's released code uses the rounded ones there, which makes 7–10 % of the
codes depend on the block size. Rows are independent of each other, so that many values of α are
swept at the price of one column loop: the weight stacked upon itself, with an α for each row.

The same stacking finds better grids than the papers' search, which looks at the rounding error of a
row's weights and knows nothing of compensation [ours]: the weight is swept on several clipped grids
at once, and each row keeps the one with the least error of its output, (q - w) H (q - w)ᵀ. On
images that were not used this error is lower by 2 to 10 % in most layers of a DINOv2-S, and by half
in some."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from marrq.distributed import ROW_TILE
from marrq.methods.problem import Problem, Rounding, SweepData
from marrq.methods.spec import MethodSpec
from marrq.methods.statistics import Factor
from marrq.quantizers.affine import (
    ColumnGrid,
    Grid,
    clipped_weight_grids,
    search_weight_grid,
    select_rows,
    stack_grids,
)
from marrq.schemes import WeightSpec

BLOCK_SIZE = 128
STACKED_ROWS = 4096
"""Rows swept at once in the search of grids: enough to hide the column loop, and memory stays
small."""
CLIP_FACTORS = tuple(1 - 0.06 * i for i in range(12))


def sweep(
    weight: Tensor,
    grid: Grid,
    factor: Factor,
    residuals: tuple[Tensor, ...] = (),
    alpha: float | Tensor = 0.0,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Codes [m, n] of weight [m, n], in weight's type and on its device.

    residuals: none, (P1,) or (P1, P2), each [n, n] in sweep order, strictly upper triangular;
    alpha: one, or [m], one a row. The result does not depend on `block_size`, except that sums are
    taken in another order. Where the weight is float32 on CUDA and the package triton is installed,
    the columns of a block are one kernel (methods/sweep_kernel.py); else they are a loop."""
    order, upper = factor.order, factor.upper.to(weight)
    w = weight.T.contiguous().index_select(
        0, order
    )  # [n, m]: a column of the weight is a contiguous row here
    original = w.clone() if len(residuals) > 1 else w
    grids = grid.columns(order)
    kernels = [
        upper.div(upper.diagonal()[:, None]).neg_(),
        *(residual.to(w) for residual in residuals),
    ]  # of e · U_jj = w - q
    steps = torch.empty_like(w)
    round_block = block_rounding(w)
    for start in range(0, len(w), block_size):
        end = min(start + block_size, len(w))
        terms = w.new_empty(
            end - start, len(kernels), w.shape[1]
        )  # [width, terms, m]: what multiplies the kernels
        inside = torch.stack(
            [kernel[start:end, start:end] for kernel in kernels], 2
        )  # [width, width, terms]
        round_block(
            w[start:end],
            inside,
            grids[start:end],
            original[start:end],
            alpha,
            steps[start:end],
            terms,
        )
        for kernel, term in zip(kernels, terms.unbind(1), strict=True):
            w[end:].addmm_(kernel[start:end, end:].T, term)
    steps = steps.index_select(0, order.argsort()).T.contiguous()
    return steps.add_(grid.spread(steps.shape[1]).zero_point)


def round_columns(
    w: Tensor,
    kernels: Tensor,
    grids: Sequence[ColumnGrid],
    original: Tensor,
    alpha: float | Tensor,
    steps: Tensor,
    terms: Tensor,
) -> None:
    """Round the columns of a block one after the other. w, original: [width, m], compensated for
    the blocks before, and as given; kernels: [width, width, terms]; grids: of each column. Written
    to: w; steps [width, m]; terms [width, terms, m]."""
    # Views of single columns are made beforehand: making one takes as long as the arithmetic on it.
    columns, originals, rounded = w.unbind(), original.unbind(), steps.unbind()
    for j, (row, term) in enumerate(zip(kernels, terms, strict=True)):
        error, *drifts = term.unbind()
        torch.addcmul(
            columns[j],
            grids[j].round(columns[j], out=rounded[j]),
            grids[j].scale,
            value=-1,
            out=error,
        )
        if drifts:
            torch.mul(columns[j], alpha, out=drifts[0])
        if len(drifts) > 1:
            torch.sub(originals[j], columns[j], out=drifts[1]).mul_(alpha)
        w[j + 1 :].addmm_(row[j + 1 :], term)


def block_rounding(w: Tensor) -> Callable[..., None]:
    """What rounds the columns of a block: for float32 on CUDA with the package triton one kernel,
    else the loop in torch."""
    if (
        w.device.type != "cuda"
        or w.dtype != torch.float32
        or not torch.cuda.is_available()
        or find_spec("triton") is None
    ):
        return round_columns
    from marrq.methods.sweep_kernel import sweep_columns

    return sweep_columns


def choose_grid(weight: Tensor, swept: SweepData, spec: WeightSpec) -> Grid:
    """The grid of a weight [m, n], by its rounding error or by the error of its outputs after a
    sweep, as `swept.clip` says."""
    if swept.clip == "weights" or spec.grid == "mxint":  # which has but one
        return search_weight_grid(weight, spec)
    # In tiles: products then come out the same for a row, whichever rows are beside it
    # (marrq/processes.py).
    rows_at_once = max(1, STACKED_ROWS // (len(CLIP_FACTORS) + 1) // ROW_TILE) * ROW_TILE
    return stack_grids(
        [_least_output_error(rows, swept, spec) for rows in weight.split(rows_at_once)]
    )


def _least_output_error(rows: Tensor, swept: SweepData, spec: WeightSpec) -> Grid:
    """For each row of a weight, of the clipped grids the one with the least error of its output."""
    grids = [*clipped_weight_grids(rows, spec, CLIP_FACTORS), search_weight_grid(rows, spec)]
    stacked = stack_grids(grids)
    repeated = rows.repeat(len(grids), 1)
    error = (
        stacked.spread(rows.shape[1])
        .dequantize(sweep(repeated, stacked, swept.inputs.factor))
        .sub_(repeated)
    )
    outputs = (error @ swept.statistics.hessian.to(rows)).mul_(error).sum(1).view(len(grids), -1)
    return select_rows(grids, outputs.argmin(0))


def gptq(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """The sweep with no residual term: exact inputs are taken for granted."""
    grid = choose_grid(weight, problem.whole, problem.weights)
    return Rounding(sweep(weight, grid, problem.whole.inputs.factor), grid)
