"""ResComp (arXiv 2604.07955): GPTAQ with a second residual term, for what compensation itself has
changed in the weights.

The output to be reached is that of the original column W0_j, while the column that is rounded has
been moved to w_j by the columns before it. The difference goes into the columns after it:

    + α (W0_j - w_j) ⊗ P2[j, >j],        P2 = ((C L) ∘ M) Lᵀ,   C = Σ x̃ xᵀ = H + D

beside GPTAQ's term, with the same α (0.25 by default as there). Nothing new has to be collected.
"""

from torch import Tensor

from marrq.methods.gptaq import GptaqPath
from marrq.methods.problem import SweepData


class RescompPath(GptaqPath):
    """w̃(α) = W (I + αP2) (I - α(P1 - P2))⁻¹ without rounding."""

    def _residuals(self, swept: SweepData) -> tuple[Tensor, ...]:
        return (swept.inputs.drift_residual, swept.inputs.error_residual)

    def direction(self, alpha: float) -> Tensor:
        """T = (W P2 + w̃ (P1 - P2)) (I - α(P1 - P2))⁻¹."""
        first, second = (residual.to(self.weight) for residual in self.residuals)
        weight, difference = self.weight[:, self.factor.order], first - second
        moved = self._solve(weight + alpha * (weight @ second), alpha * difference)
        return self._solve(weight @ second + moved @ difference, alpha * difference)[
            :, self.factor.order.argsort()
        ]
