"""The sums over calibration tokens that every method works from, and what is computed from them alone.

For one linear with input x on the quantized path (earlier modules quantized) and x̃ on the full-precision path, dx = x̃ - x:

    H = Σ x xᵀ        D = Σ dx xᵀ (not symmetric)        S = Σ dx dxᵀ

They add over batches, over halves of the calibration set, and over processes. From them comes the module reconstruction error

    J(Q) = ‖Q X - W X̃‖² = ⟨E, E H⟩ - 2 ⟨E, W D⟩ + ⟨W S, W⟩,        E = Q - W

exactly and without any stored activation (our derivation; MARR, arXiv 2605.17997, uses J as its feedback), and the upper factor U of
the damped inverse, (H + λI)⁻¹ = Uᵀ U (GPTQ, arXiv 2210.17323), here without ever forming an inverse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.errors import MarrqError

MAX_DAMPING_STEPS = 12


@dataclass(frozen=True)
class ResidualStatistics:
    """H, D and S as float64 [n, n], and the number of tokens summed."""

    hessian: Tensor
    drift: Tensor
    drift_power: Tensor
    tokens: int

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> "ResidualStatistics":
        """The empty sums."""
        hessian, drift, power = torch.zeros(3, in_features, in_features, dtype=torch.float64, device=device)
        return cls(hessian, drift, power, 0)

    def __add__(self, other: "ResidualStatistics") -> "ResidualStatistics":
        return ResidualStatistics(
            self.hessian + other.hessian, self.drift + other.drift, self.drift_power + other.drift_power, self.tokens + other.tokens
        )

    def with_batch(self, x: Tensor, x_float: Tensor) -> "ResidualStatistics":
        """These sums and a batch. x, x_float: [tokens, n]; products are taken in their type, sums kept in float64.

        dx is formed before any product: it is a small difference of large numbers.
        """
        dx = x_float - x
        return self + ResidualStatistics((x.T @ x).double(), (dx.T @ x).double(), (dx.T @ dx).double(), len(x))


class Judge:
    """J and its gradient for one weight [m, n] on given statistics; W D and ⟨W S, W⟩ are computed once. All in float64."""

    def __init__(self, statistics: ResidualStatistics, weight: Tensor) -> None:
        self.statistics = statistics
        self._weight = weight.double()
        self._target = self._weight @ statistics.drift  # W D, [m, n]
        self._constant = float(((self._weight @ statistics.drift_power) * self._weight).sum())

    def __call__(self, quantized: Tensor) -> tuple[float, Tensor]:
        """J of quantized [m, n], the square error of the outputs summed over tokens and outputs; and E H - W D, half its gradient."""
        error = quantized.double() - self._weight
        pull = error @ self.statistics.hessian
        value = float((error * (pull - 2 * self._target)).sum()) + self._constant
        return value, pull - self._target


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
