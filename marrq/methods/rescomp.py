"""ResComp (arXiv 2604.07955): GPTAQ with a second residual term, for the change that compensation
itself has made in the weights.

The output to be reached is that of the original column W0_j, but the column that is rounded has
been moved to w_j by the columns before it. The difference goes into the columns behind:

    + α (W0_j - w_j) ⊗ P2[j, >j]        P2 = ((C L) ∘ M) Lᵀ,   C = Σ x̃ xᵀ = H + D

beside GPTAQ's term, with the same α. No further sums have to be collected. Without rounding

    w̃(α) = W (I + α P2) (I - α(P1 - P2))⁻¹

Differs from the paper: α is 0.25 for both terms, as in methods/gptaq.py.
"""

from torch import Tensor

from marrq.methods.gptaq import GptaqTarget
from marrq.methods.problem import SweepData


class RescompTarget(GptaqTarget):
    """w̃(α) = W (I + α P2) (I - α(P1 - P2))⁻¹ without rounding."""

    def _residuals(self, data: SweepData) -> tuple[Tensor, ...]:
        # The sweep has one α for both terms (methods/gptq.py).
        return (data.factors.drift_residual, data.factors.error_residual)

    def direction(self, alpha: float) -> Tensor:
        """T = (W P2 + w̃ (P1 - P2)) (I - α(P1 - P2))⁻¹: [m, n]."""
        # P1 and P2.
        first, second = (residual.to(self.weight) for residual in self.residuals)
        weight, difference = self.weight[:, self.factor.order], first - second
        # w̃, in sweep order.
        moved = self._solve(weight + alpha * (weight @ second), alpha * difference)
        # The product rule on w̃ (I - α(P1 - P2)) = W (I + α P2); back to the order of the inputs.
        slope = self._solve(weight @ second + moved @ difference, alpha * difference)
        return slope[:, self.factor.order.argsort()]
