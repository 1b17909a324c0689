"""GPTAQ (arXiv 2504.02692): GPTQ with asymmetric calibration. The target is the output on
full-precision inputs, W X̃.

The sweep (methods/gptq.py) gets a residual term. The term moves the effect that the drift of column
j's input has on the outputs into the columns behind:

    + α w_j ⊗ P1[j, >j]         P1 = ((D L) ∘ M) Lᵀ,   L = Uᵀ,   D = Σ dx xᵀ

with M the strictly upper 0/1 mask. The mask goes on D L before the product with Lᵀ; masked after
the product, P1 would be another matrix. Without rounding the sweep is linear, and its result is

    w̃(α) = W (I - α P1)⁻¹

Differs from the paper: α is 0.25. The paper has α = 1; its released code multiplies P1 by a
constant 0.25. The end of a block is in methods/gptq.py.
"""

from typing import ClassVar

import torch
from torch import Tensor

from marrq.methods.gptq import choose_grid, sweep
from marrq.methods.problem import Rounding, SweepData
from marrq.quantizers.affine import stack_grids
from marrq.schemes import WeightSpec


class GptaqTarget:
    """w̃(α) = W (I - α P1)⁻¹ without rounding."""

    constant: ClassVar[float] = 0.25

    def __init__(self, weight: Tensor, data: SweepData, weight_spec: WeightSpec) -> None:
        self.weight, self.data, self.weight_spec = weight, data, weight_spec
        self.factor, self.residuals = data.factors.factor, self._residuals(data)

    def fit_grid(self, alpha: float) -> None:
        """Find the grid on W, as the papers do: it does not depend on α."""
        self.grid = choose_grid(self.weight, self.data, self.weight_spec)

    def _residuals(self, data: SweepData) -> tuple[Tensor, ...]:
        """The residual matrices of the sweep, [n, n] float64."""
        return (data.factors.drift_residual,)

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep at each α of [a]: codes [a · m, n]."""
        # Rows do not depend on each other: a copies of the weight cost one column loop.
        count = len(alphas)
        grid = stack_grids([self.grid] * count)
        # [a · m, n] and [a · m]: all rows at the first α, then all rows at the next.
        stacked = self.weight.repeat(count, 1)
        row_alphas = alphas.repeat_interleave(len(self.weight))
        return Rounding(sweep(stacked, grid, self.factor, self.residuals, row_alphas), grid)

    def direction(self, alpha: float) -> Tensor:
        """T = w̃ P1 (I - α P1)⁻¹, by two triangular solves: [m, n]."""
        # Column j of the sweep gives α w_j P1[j, >j] to those behind, so w̃ = W + α w̃ P1.
        residual = self.residuals[0].to(self.weight)
        # w̃ = W (I - α P1)⁻¹, in sweep order.
        moved = self._solve(self.weight[:, self.factor.order], alpha * residual)
        # d/dα (I - α P1)⁻¹ = (I - α P1)⁻¹ P1 (I - α P1)⁻¹; back to the order of the inputs.
        return self._solve(moved @ residual, alpha * residual)[:, self.factor.order.argsort()]

    @staticmethod
    def _solve(rows: Tensor, strictly_upper: Tensor) -> Tensor:
        """R (I - strictly_upper)⁻¹ for the rows R [m, n]."""
        # Unit upper triangular, hence never singular, at any α.
        identity = torch.eye(len(strictly_upper), dtype=rows.dtype, device=rows.device)
        solved: Tensor = torch.linalg.solve_triangular(
            identity - strictly_upper, rows, upper=True, left=False, unitriangular=True
        )
        return solved
