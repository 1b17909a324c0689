"""The exact target: GPTQ's plain sweep on the weight whose outputs on the quantized inputs come
nearest to the wanted ones.

    ‖Q X - W X̃‖² = ‖(Q - W*) X‖² + const,        W* = W (I + D H⁻¹)

(QEP, arXiv 2504.09629). GPTAQ's term keeps only the strictly upper part of this correction, so that
the drift of an input is taken up by later columns alone. Here α is the share of the correction that
is applied, with a damping of its own in the solve:

    W_α = W + α Δ,        Δ = G (H + λI)⁻¹,   G = Σ e xᵀ = W D,   λ = target_damping · mean(diag H)

α = 1 without a search. The solve is a ridge regression from a few thousand tokens, so α and λ are
both regularizers: 0.1 serves it better than the sweep's 0.01. The grid of the weights is found on
W_α.

The method `stream` [ours] is the same with another e for the linears that write to the residual
stream (proj and fc2 of a ViT):

    ‖(r + Q X) - (r̃ + W X̃)‖²,                    e = W dx + (r̃ - r)

r and r̃ being the stream before the linear's output is added, on either path. What earlier blocks
did wrong passes every later block by on the stream, and no linear that only repeats its own output
can mend it; a writer can, as far as the error shows in its input."""

from typing import ClassVar

import torch
from torch import Tensor

from marrq.methods.gptq import choose_grid, sweep
from marrq.methods.problem import Rounding, SweepData
from marrq.quantizers.affine import Grid, stack_grids
from marrq.schemes import WeightSpec


def correction(weight: Tensor, swept: SweepData) -> Tensor:
    """Δ [m, n] for a weight [m, n], in its type."""
    upper = swept.inputs.target_factor.upper
    return (swept.statistics.drift.of_outputs(weight).moment @ upper.T @ upper).to(weight)


class ExactPath:
    """w̃(α) = W + αΔ without rounding: a straight line."""

    constant: ClassVar[float] = 1.0

    def __init__(self, weight: Tensor, swept: SweepData, weights: WeightSpec) -> None:
        self.weight, self.weights, self.swept = weight, weights, swept
        self.grid: Grid | None = None
        self.delta = correction(weight, swept)

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep on W_α for each α, on the grid of the first that is asked for: within a search
        J then moves with α alone."""
        targets = [self.weight + alpha * self.delta for alpha in alphas]
        if (
            self.grid is None or not self.grid.scale.isfinite().all()
        ):  # an α that overflowed leaves none
            self.grid = choose_grid(targets[0], self.swept, self.weights)
        grid = stack_grids([self.grid] * len(alphas))
        return Rounding(sweep(torch.cat(targets), grid, self.swept.inputs.factor), grid)

    def direction(self, alpha: float) -> Tensor:
        """T = Δ, at every α."""
        return self.delta
