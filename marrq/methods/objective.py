"""J, the reconstruction error of a linear, from the sums over tokens alone."""

from collections.abc import Callable

from torch import Tensor

from marrq.methods.statistics import ResidualStatistics

Total = Callable[[Tensor], float]
"""The sum of one number [m] for each row of a weight, over all processes."""


def of_one_process(rows: Tensor) -> float:
    """The total where one process has all rows."""
    return float(rows.sum())


class ReconstructionLoss:
    """J and its gradient for one weight [m, n] on given statistics; G and c are computed once. All
    in float64.

    Where outputs differ in importance, the terms of J and the rows of its gradient are weighted by
    it. Where the rows of the weight are shared out to processes, each has some of them in weight
    and statistics, and J is that of all rows."""

    def __init__(
        self, statistics: ResidualStatistics, weight: Tensor, total: Total = of_one_process
    ) -> None:
        self.statistics, self.weight = statistics, weight
        self._wanted, self._total = statistics.drift.of_outputs(weight), total
        self._importance = self._wanted.importance[:, None]
        self._constant = total(self._wanted.power * self._wanted.importance)

    def __call__(self, quantized: Tensor) -> tuple[float, Tensor]:
        """J of quantized [m, n], the square error of the outputs summed over tokens and outputs;
        and E H - G, half its gradient."""
        error = quantized.double() - self.weight.double()
        pull = error @ self.statistics.hessian
        value = (
            self._total((self._importance * error * (pull - 2 * self._wanted.moment)).sum(1))
            + self._constant
        )
        return value, self._importance * (pull - self._wanted.moment)

    def newton_step(self, gradient: Tensor, direction: Tensor) -> float:
        """How far J falls along a direction T [m, n]: ⟨-gradient, T⟩ / ⟨T H, T⟩; 0 where the
        direction changes no output."""
        direction = direction.double()
        slope = self._total((gradient * direction).sum(1))
        curvature = self._total(
            (self._importance * (direction @ self.statistics.hessian) * direction).sum(1)
        )
        return -slope / curvature if curvature > 0 else 0.0

    @property
    def output_power(self) -> float:
        """‖W X + e‖², the power of the wanted outputs, by which J can be compared between
        modules."""
        w = self.weight.double()
        return (
            self._total(
                (
                    self._importance * (w @ self.statistics.hessian + 2 * self._wanted.moment) * w
                ).sum(1)
            )
            + self._constant
        )
