"""GPTQ (arXiv 2210.17323) and the column sweep that every error-compensating method here shares.

Columns are rounded one after the other; what the rounding of column j does to the outputs is compensated in the columns not yet
rounded. With U from (H + λI)⁻¹ = Uᵀ U, q(·) the rounding to the row's grid and w_j the compensated column just before it is rounded:

    e = (w_j - q(w_j)) / U_jj
    W[:, >j] += - e ⊗ U[j, >j]             GPTQ
                + α w_j ⊗ P[j, >j]         the residual term of GPTAQ and MARR (methods/gptaq.py has P)

The sweep is lazy: within a block of columns updates are applied at once, beyond it in one matrix product at the block's end. Both
residual factors at a block's end are the compensated columns themselves ("pre"); GPTAQ's released code uses the rounded ones there,
which makes 7–10 % of the codes depend on the block size.
"""

import torch
from torch import Tensor

from marrq.affine import Grid, search_weight_grid
from marrq.methods.problem import MethodSpec, Problem, Solution
from marrq.statistics import Factor

BLOCK_SIZE = 128


def sweep(
    weight: Tensor, grid: Grid, factor: Factor, residual: Tensor | None = None, alpha: float = 0.0, block_size: int = BLOCK_SIZE
) -> Tensor:
    """Codes [m, n] of weight [m, n], in weight's type and on its device.

    residual: P [n, n] in sweep order, strictly upper triangular, or None. The result does not depend on `block_size`, except that
    sums are taken in another order.
    """
    w = weight[:, factor.order].T.contiguous()  # [n, m]: a column of the weight is a contiguous row here
    grid = Grid(grid.scale.squeeze(1), grid.zero_point.squeeze(1), grid.low, grid.high)  # [m]
    upper = factor.upper.to(w)
    kernels = upper[None] if residual is None else torch.stack([upper, residual.to(w)])  # [terms, n, n]
    inverse_diagonal = upper.diagonal().reciprocal()
    codes = torch.empty_like(w)
    for start in range(0, len(w), block_size):
        end = min(start + block_size, len(w))
        terms = w.new_zeros(len(kernels), end - start, w.shape[1])  # [terms, width, m]: what multiplies the kernels
        for j in range(start, end):
            codes[j] = grid.quantize(w[j])
            term = terms[:, j - start]
            term[0] = (grid.dequantize(codes[j]) - w[j]) * inverse_diagonal[j]
            if residual is not None:
                term[1] = alpha * w[j]
            w[j + 1 : end].addmm_(kernels[:, j, j + 1 : end].T, term)
        for kernel, term in zip(kernels, terms, strict=True):
            w[end:].addmm_(kernel[start:end, end:].T, term)
    return codes.T[:, factor.order.argsort()].contiguous()


def gptq(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """The sweep with no residual term: exact inputs are taken for granted."""
    grid = search_weight_grid(weight, problem.code_range)
    return problem.solution(weight, grid, sweep(weight, grid, problem.whole.factor))
