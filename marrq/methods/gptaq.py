"""GPTAQ (arXiv 2504.02692): GPTQ with asymmetric calibration, the target being the output on
full-precision inputs, W X̃.

The sweep gets a residual term that moves what the drift of neuron j's input changes into the
columns after it:

    P1 = ((D L) ∘ M) Lᵀ,        L = Uᵀ,   M the strictly upper 0/1 mask,   D = Σ dx xᵀ

The paper has α = 1; its released code multiplies P1 by a constant 0.25, which is the default here
too. The mask goes on D L before the product with Lᵀ (after it, P1 would be another matrix)."""

from typing import ClassVar

import torch
from torch import Tensor

from marrq.methods.gptq import choose_grid, sweep
from marrq.methods.problem import Rounding, SweepData
from marrq.quantizers.affine import stack_grids
from marrq.schemes import WeightSpec


class GptaqPath:
    """w̃(α) = W (I - αP1)⁻¹ without rounding."""

    constant: ClassVar[float] = 0.25

    def __init__(self, weight: Tensor, swept: SweepData, weights: WeightSpec) -> None:
        self.weight, self.factor = weight, swept.inputs.factor
        self.grid = choose_grid(weight, swept, weights)
        self.residuals = self._residuals(swept)

    def _residuals(self, swept: SweepData) -> tuple[Tensor, ...]:
        return (swept.inputs.drift_residual,)

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep at each α."""
        count = len(alphas)
        grid = stack_grids([self.grid] * count)
        rows = alphas.repeat_interleave(len(self.weight))
        return Rounding(
            sweep(self.weight.repeat(count, 1), grid, self.factor, self.residuals, rows), grid
        )

    def direction(self, alpha: float) -> Tensor:
        """T = w̃ P1 (I - αP1)⁻¹: two triangular solves."""
        residual = self.residuals[0].to(self.weight)
        moved = self._solve(self.weight[:, self.factor.order], alpha * residual)
        return self._solve(moved @ residual, alpha * residual)[:, self.factor.order.argsort()]

    @staticmethod
    def _solve(rows: Tensor, strictly_upper: Tensor) -> Tensor:
        """Rows (I - strictly_upper)⁻¹."""
        system = (
            torch.eye(len(strictly_upper), dtype=rows.dtype, device=rows.device) - strictly_upper
        )
        solved: Tensor = torch.linalg.solve_triangular(
            system, rows, upper=True, left=False, unitriangular=True
        )
        return solved
