"""GPTAQ (arXiv 2504.02692): GPTQ with asymmetric calibration, the target being the output on full-precision inputs, W X̃.

The sweep gets a residual term that moves what the drift of neuron j's input changes into the columns after it:

    P = ((D L) ∘ M) Lᵀ,        L = Uᵀ,   M the strictly upper 0/1 mask,   D = Σ dx xᵀ

The paper has α = 1; its released code multiplies P by a constant 0.25, which is the default here too. The mask goes on D L before the
product with Lᵀ (after it, P would be another matrix).
"""

import torch
from torch import Tensor

from marrq.affine import Grid, search_weight_grid
from marrq.methods.gptq import sweep
from marrq.methods.problem import MethodSpec, Problem, Solution, Step


def residual_solution(weight: Tensor, grid: Grid, problem: Problem, alpha: float, trajectory: tuple[Step, ...] = ()) -> Solution:
    """The sweep with residual strength alpha and all the data.

    The residual term feeds the compensated columns back into themselves and can overflow on a coarse grid; then α = 0 is used, and said.
    """
    factor, residual = problem.whole.factor, problem.whole.residual
    codes = sweep(weight, grid, factor, residual, alpha)
    if torch.isfinite(codes).all():
        return problem.solution(weight, grid, codes, alpha, trajectory)
    fallback = f"alpha {alpha:g} gave non-finite weights, alpha 0 was used"
    return problem.solution(weight, grid, sweep(weight, grid, factor), 0.0, trajectory, fallback)


def gptaq(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """The sweep with one residual strength, `spec.alpha`, for every module."""
    return residual_solution(weight, search_weight_grid(weight, problem.code_range), problem, spec.alpha)
