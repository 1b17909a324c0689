"""J, the reconstruction error of a linear, from sums over tokens alone.

    J(Q) = ‖Q X - W X - e‖² = ⟨E, E H⟩ - 2 ⟨E, G⟩ + c        E = Q - W,   G = Σ e xᵀ,   c = Σ ‖e‖²
    ½ dJ/dQ = E H - G

(our derivation; methods/statistics.py). MARR (arXiv 2605.17997) uses J as the feedback of its
search; the paper computes J from stored activations. J is exact here: the undamped H, float64, and
E in place of Q, since E is small.
"""

from collections.abc import Callable

from torch import Tensor

from marrq.methods.statistics import ResidualStatistics

Total = Callable[[Tensor], float]
"""Sums one number for each row of a weight, [m], over all processes."""


def of_one_process(rows: Tensor) -> float:
    """The total if one process has all rows."""
    return float(rows.sum())


class ReconstructionLoss:
    """J and its gradient for one weight [m, n] on given statistics, in float64.

    G and c are computed once. If outputs differ in importance, the terms of J and the rows of its
    gradient are multiplied by the importance. If processes share the rows of the weight, weight and
    statistics hold the rows of this process, and J is that of all rows."""

    def __init__(
        self, statistics: ResidualStatistics, weight: Tensor, total: Total = of_one_process
    ) -> None:
        # For input drift e = W dx, and the sums of e follow from those of dx.
        self.statistics, self.weight = statistics, weight
        self._weight = weight.double()
        self._wanted, self._total = statistics.drift.of_outputs(self._weight), total
        self._twice = 2 * self._wanted.moment  # 2 G
        # The last direction T, with T in float64 and ⟨T H, T⟩.
        self._direction: tuple[Tensor, Tensor, float] | None = None
        # [m, 1], to be multiplied with the rows of [m, n].
        self._importance = self._wanted.importance[:, None]
        # c, which depends neither on Q nor on α.
        self._constant = total(self._wanted.power * self._wanted.importance)

    def __call__(self, quantized: Tensor) -> tuple[float, Tensor]:
        """J of Q [m, n], the square error summed over tokens and outputs; and half its gradient,
        [m, n]."""
        # E and E H, [m, n]. E is small, and Q is not: from Q directly, J would lose digits.
        error = quantized.double() - self._weight
        pull = error @ self.statistics.hessian
        # ⟨E, E H⟩ - 2 ⟨E, G⟩, row by row: [m].
        rows = error.mul_(self._importance).mul_(pull - self._twice).sum(1)
        gradient = pull.sub_(self._wanted.moment).mul_(self._importance)
        return self._total(rows) + self._constant, gradient

    def newton_step(self, gradient: Tensor, direction: Tensor) -> float:
        """The multiple of a direction T [m, n] at which J is least: ⟨-gradient, T⟩ / ⟨T H, T⟩.

        gradient: half the gradient, as the call gives it. 0 if T changes no output."""
        # J(Q + s T) = J(Q) + 2 s ⟨E H - G, T⟩ + s² ⟨T H, T⟩ is least where its slope is 0.
        direction, curvature = self._curved(direction)
        slope = self._total((gradient * direction).sum(1))
        return -slope / curvature if curvature > 0 else 0.0

    def least_along(self, direction: Tensor, lower: float, upper: float) -> tuple[float, float]:
        """The α from `lower` to `upper` with the least J(W + α T), and this J: nothing is rounded.

        direction: T, [m, n]. 0 if T changes no output."""
        # J(W + α T) = c - 2 α ⟨G, T⟩ + α² ⟨T H, T⟩. A parabola: its least is clipped to the bounds.
        direction, curvature = self._curved(direction)
        rows = (self._wanted.moment * direction).mul_(self._importance).sum(1)
        slope = self._total(rows)
        alpha = min(max(slope / curvature if curvature > 0 else 0.0, lower), upper)
        return alpha, self._constant - 2 * alpha * slope + alpha**2 * curvature

    def _curved(self, direction: Tensor) -> tuple[Tensor, float]:
        """T in float64, and ⟨T H, T⟩."""
        # The exact target goes along one straight line: the product is formed once for a search.
        if self._direction is None or self._direction[0] is not direction:
            moved = direction.double()
            curved = (moved @ self.statistics.hessian).mul_(self._importance).mul_(moved)
            self._direction = direction, moved, self._total(curved.sum(1))
        return self._direction[1:]

    @property
    def output_power(self) -> float:
        """‖W X + e‖², the power of the wanted outputs: J of a weight of zeros. J divided by it can
        be compared between linears."""
        # ‖W X + e‖² = ⟨W H, W⟩ + 2 ⟨G, W⟩ + c.
        rows = (self._weight @ self.statistics.hessian).add_(self._twice)
        rows = rows.mul_(self._importance).mul_(self._weight).sum(1)
        return self._total(rows) + self._constant
