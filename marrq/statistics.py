"""The sums over calibration tokens that every method works from, and what is computed from them alone.

For one linear with input x on the quantized path (earlier modules quantized) and x̃ on the full-precision path, dx = x̃ - x:

    H = Σ x xᵀ        D = Σ dx xᵀ (not symmetric)        S = Σ dx dxᵀ        Σ x        Σ dx

They add over batches, over halves of the calibration set, and over processes. From them comes the module reconstruction error

    J(Q) = ‖Q X - W X̃‖² = ⟨E, E H⟩ - 2 ⟨E, G⟩ + c,        E = Q - W,   G = W D,   c = ⟨W S, W⟩

exactly and without any stored activation (our derivation; MARR, arXiv 2605.17997, uses J as its feedback), and the upper factor U of
the damped inverse, (H + λI)⁻¹ = Uᵀ U (GPTQ, arXiv 2210.17323), here without ever forming an inverse.

G and c are all that J knows of the wanted output. In general e is what the output of the original weight on x falls short of it, and
G = Σ e xᵀ, c = Σ ‖e‖²: e = W dx where the linear is to repeat its full-precision output; methods/exact.py has another.

A bias that takes up the mean error of the outputs (`output_shift`) leaves the error of centred tokens: the same sums with the means taken
out, H - k x̄ x̄ᵀ and so on (`centre_`). Then a method need not spend codes on what a bias does for nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.errors import MarrqError

MAX_DAMPING_STEPS = 12
VARIATION = 1e-12
"""Variance, in shares of the mean square, below which an input is a constant: float32 tokens resolve no less."""


@dataclass
class InputDrift:
    """dx in sums over tokens: D = Σ dx xᵀ and S = Σ dx dxᵀ [n, n], Σ dx [n]. All float64."""

    moment: Tensor
    power: Tensor
    sum: Tensor

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> "InputDrift":
        """The empty sums."""
        square, vector = (in_features, in_features), (in_features,)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in (square, square, vector)))

    def __add__(self, other: "InputDrift") -> "InputDrift":
        return InputDrift(self.moment + other.moment, self.power + other.power, self.sum + other.sum)

    def add(self, x: Tensor, drift: Tensor) -> None:
        """Take in a batch. x: [tokens, n]; drift: dx, [tokens, n]."""
        _accumulate(self.moment, drift, x)
        _accumulate(self.power, drift, drift)
        self.sum += drift.sum(0, dtype=torch.float64)

    def centre_(self, input_sum: Tensor, tokens: int, varies: Tensor) -> None:
        """See ResidualStatistics.centre_."""
        self.moment.addr_(self.sum, input_sum, alpha=-1 / tokens).mul_(varies)
        self.power.addr_(self.sum, self.sum, alpha=-1 / tokens)

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """The sums of e = W dx for a weight [m, n]."""
        w = weight.double()
        return OutputDrift(w @ self.moment, ((w @ self.power) * w).sum(1), w @ self.sum, w.new_ones(len(w)))


@dataclass
class OutputDrift:
    """What the outputs of the original weight on the quantized path fall short of the wanted ones, e, in sums over tokens.

    moment: G = Σ e xᵀ [m, n]; power: Σ e² [m]; sum: Σ e [m]; importance: what the square error of an output counts in J, [m]. All float64.
    """

    moment: Tensor
    power: Tensor
    sum: Tensor
    importance: Tensor

    @classmethod
    def zeros(cls, in_features: int, importance: Tensor) -> "OutputDrift":
        """The empty sums."""
        importance = importance.double()
        moment, vector = importance.new_zeros(len(importance), in_features), torch.zeros_like(importance)
        return cls(moment, vector, vector.clone(), importance)

    def __add__(self, other: "OutputDrift") -> "OutputDrift":
        return OutputDrift(self.moment + other.moment, self.power + other.power, self.sum + other.sum, self.importance)

    def add(self, x: Tensor, drift: Tensor) -> None:
        """Take in a batch. x: [tokens, n]; drift: e, [tokens, m]."""
        _accumulate(self.moment, drift, x)
        self.power += drift.double().square().sum(0)
        self.sum += drift.sum(0, dtype=torch.float64)

    def centre_(self, input_sum: Tensor, tokens: int, varies: Tensor) -> None:
        """See ResidualStatistics.centre_."""
        self.moment.addr_(self.sum, input_sum, alpha=-1 / tokens).mul_(varies)
        self.power.sub_(self.sum.square() / tokens)

    def of_outputs(self, weight: Tensor) -> "OutputDrift":
        """These sums, whatever the weight."""
        return self


@dataclass
class ResidualStatistics:
    """H [n, n] and Σ x [n], as float64, the number of tokens summed, and the sums of the drift: dx, or e where it is not W dx."""

    hessian: Tensor
    input_sum: Tensor
    drift: InputDrift | OutputDrift
    tokens: int = 0

    @classmethod
    def zeros(cls, in_features: int, device: torch.device, importance: Tensor | None = None) -> "ResidualStatistics":
        """The empty sums; importance: of the outputs, [m], where e is summed and not dx."""
        drift = InputDrift.zeros(in_features, device) if importance is None else OutputDrift.zeros(in_features, importance)
        hessian = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        return cls(hessian, hessian.new_zeros(in_features), drift)

    def __add__(self, other: "ResidualStatistics") -> "ResidualStatistics":
        drift = self.drift + other.drift  # type: ignore[operator]  # of one kind, as the importance is given to both or to none
        return ResidualStatistics(self.hessian + other.hessian, self.input_sum + other.input_sum, drift, self.tokens + other.tokens)

    def add(self, x: Tensor, drift: Tensor) -> None:
        """Take in a batch. x: [tokens, n]; drift: dx = x̃ - x, [tokens, n], or e, [tokens, m].

        The caller forms the difference before any product: it is a small one of large numbers.
        """
        _accumulate(self.hessian, x, x)
        self.input_sum += x.sum(0, dtype=torch.float64)
        self.drift.add(x, drift)
        self.tokens += len(x)

    def centre_(self) -> "ResidualStatistics":
        """Take the means out, in place: the sums become those of centred tokens. Only Σ x, Σ dx and Σ e stay, for the bias that makes up
        for the means. In place, since for a wide layer a copy of the sums is what a whole block's weights take. Returns itself.

        An input that does not vary is dead in it.
        """
        power = self.hessian.diagonal().clone()
        self.hessian.addr_(self.input_sum, self.input_sum, alpha=-1 / self.tokens)
        # Of a constant input this difference leaves noise, by which nothing is to be weighed or divided.
        varies = (self.hessian.diagonal() > VARIATION * power).to(power)
        self.hessian.mul_(varies).mul_(varies[:, None])
        self.drift.centre_(self.input_sum, self.tokens, varies)
        return self

    def output_shift(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """What has to be added to the bias so that outputs are right in the mean: (Σ e - E Σ x) / k, [m]."""
        error = quantized.double() - weight.double()
        return (self.drift.of_outputs(weight).sum - error @ self.input_sum) / self.tokens


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add Σ left rightᵀ over the tokens of a batch to a float64 sum [p, q]. left: [tokens, p]; right: [tokens, q].

    Products are taken in the type of the tokens, without their means; what the means add is put back in float64. In float32 the products of
    an input whose mean is a thousand times its deviation would lose the deviation, all that `centre_` is after.
    """
    left_mean, right_mean = left.mean(0), right.mean(0)
    total += (left - left_mean).T @ (right - right_mean)
    # Σ (l - a) (r - b)ᵀ = Σ l rᵀ - a (Σ r - k b)ᵀ - (Σ l) bᵀ
    left_sum, right_sum = (tokens.sum(0, dtype=torch.float64) for tokens in (left, right))
    left_mean, right_mean = left_mean.double(), right_mean.double()
    total.addmm_(torch.stack([left_mean, left_sum], 1), torch.stack([right_sum - len(right) * right_mean, right_mean]))


class Judge:
    """J and its gradient for one weight [m, n] on given statistics; G and c are computed once. All in float64.

    Where outputs differ in importance, the terms of J and the rows of its gradient are weighted by it.
    """

    def __init__(self, statistics: ResidualStatistics, weight: Tensor) -> None:
        self.statistics, self.weight = statistics, weight
        self._wanted = statistics.drift.of_outputs(weight)
        self._importance = self._wanted.importance[:, None]
        self._constant = float((self._wanted.power * self._wanted.importance).sum())

    def __call__(self, quantized: Tensor) -> tuple[float, Tensor]:
        """J of quantized [m, n], the square error of the outputs summed over tokens and outputs; and E H - G, half its gradient."""
        error = quantized.double() - self.weight.double()
        pull = error @ self.statistics.hessian
        value = float((self._importance * error * (pull - 2 * self._wanted.moment)).sum()) + self._constant
        return value, self._importance * (pull - self._wanted.moment)

    def newton_step(self, gradient: Tensor, direction: Tensor) -> float:
        """How far J falls along a direction T [m, n]: ⟨-gradient, T⟩ / ⟨T H, T⟩; 0 where the direction changes no output."""
        direction = direction.double()
        slope = (gradient * direction).sum()
        curvature = (self._importance * (direction @ self.statistics.hessian) * direction).sum()
        return -float(slope / curvature) if curvature > 0 else 0.0

    @property
    def output_power(self) -> float:
        """‖W X + e‖², the power of the wanted outputs, by which J can be compared between modules."""
        w = self.weight.double()
        return float((self._importance * (w @ self.statistics.hessian + 2 * self._wanted.moment) * w).sum()) + self._constant


@dataclass(frozen=True)
class Factor:
    """U of the damped inverse Hessian, its columns in sweep order.

    order: [n], the input that each position of the sweep works on; upper: [n, n] float64; damping: the λ / mean(diag H) that was used.
    """

    order: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """Factor H + λI, λ = damping · mean(diag H), in descending order of diag H (`act_order`) or as it stands.

    A dead input (H_ii = 0) gets H_ii = 1 and so is simply rounded. When the factorization fails the damping is raised tenfold until it
    succeeds, and the damping used is returned. Raises MarrqError when H is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise MarrqError("the inputs of the layer are not finite: look for NaN or infinity in the model's weights or the images")
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = diagonal.mean() if alive.any() else torch.ones_like(diagonal[0])
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(diagonal), device=hessian.device)
    filled = hessian + torch.diag((~alive).to(hessian.dtype))
    filled = filled[order][:, order]
    for _ in range(MAX_DAMPING_STEPS):
        damped = filled + damping * mean * torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
        # H = R Rᵀ with R upper is the Cholesky factorization of H with rows and columns reversed; then U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
            return Factor(order, torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), damping)
        damping = max(damping * 10, 1e-8)
    raise MarrqError(f"the layer's Hessian cannot be factored even with damping {damping:g}: use other calibration images")
