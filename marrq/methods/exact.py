"""The exact target: GPTQ's plain sweep on the weight whose outputs on the quantized inputs come
nearest to the wanted outputs.

    ‖Q X - W X̃‖² = ‖(Q - W*) X‖² + const,        W* = W (I + D H⁻¹)

(QEP, arXiv 2504.09629). GPTAQ's term keeps only the strictly upper part of this correction, so that
the drift of an input is taken up by later columns alone. α is the share of the correction that is
applied:

    W_α = W + α Δ,        Δ = G (H + λI)⁻¹,   G = Σ e xᵀ = W D,   λ = target_damping · mean(diag H)

Differs from the paper: the solve has a damping of its own. It is a ridge regression from a few
thousand tokens, and α and λ both regularize it; 0.1 serves the solve better than the sweep's 0.01.
Without a search α = 1. The grid of the weights is found on W_α.

The method `stream` [ours] is the same with another e for linears that write to the residual stream
(proj and fc2 of a ViT). With r and r̃ the stream on the quantized and on the full-precision path,
before the linear's output is added:

    ‖(r + Q X) - (r̃ + W X̃)‖²,                    e = W dx + (r̃ - r)

What earlier blocks did wrong passes every later block by on the stream. A linear that only repeats
its own output cannot mend it; a writer can, as far as the error shows in its input.
"""

from typing import ClassVar

import torch
from torch import Tensor

from marrq.methods.gptq import choose_grid, sweep
from marrq.methods.problem import Rounding, SweepData
from marrq.quantizers.affine import stack_grids
from marrq.schemes import WeightSpec


def correction(weight: Tensor, data: SweepData) -> Tensor:
    """Δ = G (H + λI)⁻¹, [m, n], for a weight [m, n], in the weight's type."""
    # The inverse serves all linears of a group and is formed once; λ is large, so that in float64
    # it is as good as a solve.
    return (data.statistics.drift.moment_of(weight) @ data.factors.target_inverse[0]).to(weight)


class ExactTarget:
    """w̃(α) = W + α Δ without rounding: a straight line."""

    constant: ClassVar[float] = 1.0

    def __init__(self, weight: Tensor, data: SweepData, weight_spec: WeightSpec) -> None:
        self.weight, self.data, self.weight_spec = weight, data, weight_spec
        self.delta = correction(weight, data)

    def fit_grid(self, alpha: float) -> None:
        """Find the grid on W_α, for every α that follows: J moves with α alone within a search."""
        self.grid = choose_grid(self.weight + alpha * self.delta, self.data, self.weight_spec)

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep on W_α for each α of [a]: codes [a · m, n]."""
        # The a weights W_α, [m, n] each; stacked they are [a · m, n].
        targets = [self.weight + alpha * self.delta for alpha in alphas]
        grid = stack_grids([self.grid] * len(alphas))
        return Rounding(sweep(torch.cat(targets), grid, self.data.factors.factor), grid)

    def direction(self, alpha: float) -> Tensor:
        """T = Δ, at every α: [m, n]."""
        # dW_α/dα; GPTQ's compensation only moves errors that rounding makes.
        return self.delta
