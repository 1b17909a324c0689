"""What a method is given and what it returns.

A method is a function (weight [m, n], Problem, MethodSpec) -> Solution. The Problem belongs to a group of linears that share one input
(q, k and v, where they are separate): what depends on the input alone is computed once for the group, when first asked for.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from marrq.affine import Grid
from marrq.errors import MarrqError
from marrq.statistics import Factor, Judge, ResidualStatistics, factorize


@dataclass(frozen=True)
class PID:
    """Settings of MARR's controller; see methods/marr.py for the law. The paper publishes none of them but `tolerance`.

    settled: the smallest move of α worth another step; the jitter that rounding gives J hides smaller ones.
    """

    proportional: float = 0.6
    integral: float = 0.1
    derivative: float = 0.1
    leak: float = 0.5
    initial: float = 0.25
    lower: float = 0.0
    upper: float = 1.5
    steps: int = 8
    tolerance: float = 1e-5
    settled: float = 0.02

    def __post_init__(self) -> None:
        if not self.lower <= self.initial <= self.upper or self.steps < 1:
            raise MarrqError(f"a PID needs lower <= initial <= upper and at least one step: got {self}")


@dataclass(frozen=True)
class MethodSpec:
    """The method and its settings.

    damping: λ / mean(diag H) of the sweep; act_order: sweep columns by descending diag H; alpha: the residual strength of `gptaq`.
    """

    name: str = "marr"
    damping: float = 0.01
    act_order: bool = True
    alpha: float = 0.25
    pid: PID = field(default_factory=PID)


@dataclass(frozen=True)
class Step:
    """One step of an α search: the half of the calibration set that judged, the α tried, and J on that half."""

    half: int
    alpha: float
    error: float


@dataclass(frozen=True)
class Solution:
    """Codes [m, n] on a grid, and how they came about.

    error: J over all calibration tokens; alpha: None where the method has none; damping: what the factorization used;
    fallback: why α = 0 was used in place of the α asked for, or None.
    """

    codes: Tensor
    grid: Grid
    error: float
    damping: float
    alpha: float | None = None
    trajectory: tuple[Step, ...] = ()
    fallback: str | None = None


class Compensation:
    """Statistics with what a sweep over their inputs needs: the factor U and the residual matrix P, both in sweep order."""

    def __init__(self, statistics: ResidualStatistics, spec: MethodSpec) -> None:
        self.statistics = statistics
        self._spec = spec

    @cached_property
    def factor(self) -> Factor:
        """U of the damped inverse Hessian."""
        return factorize(self.statistics.hessian, self._spec.damping, self._spec.act_order)

    @cached_property
    def residual(self) -> Tensor:
        """P = ((D L) ∘ M) Lᵀ of GPTAQ: [n, n] float64, strictly upper triangular."""
        order, lower = self.factor.order, self.factor.upper.T
        drift = self.statistics.drift[order][:, order]
        return torch.triu((torch.triu(drift @ lower, 1)) @ lower.T, 1)


class Problem:
    """The statistics of both halves of the calibration set, each half and the whole ready to be swept with."""

    def __init__(self, halves: tuple[ResidualStatistics, ResidualStatistics], code_range: tuple[int, int], spec: MethodSpec) -> None:
        self.code_range = code_range
        self.halves = (Compensation(halves[0], spec), Compensation(halves[1], spec))
        self.whole = Compensation(halves[0] + halves[1], spec)

    def solution(
        self,
        weight: Tensor,
        grid: Grid,
        codes: Tensor,
        alpha: float | None = None,
        trajectory: tuple[Step, ...] = (),
        fallback: str | None = None,
    ) -> Solution:
        """The Solution these codes make, judged on the whole calibration set."""
        error, _ = Judge(self.whole.statistics, weight)(grid.dequantize(codes))
        return Solution(codes, grid, error, self.whole.factor.damping, alpha, trajectory, fallback)
