"""What a method is given and what it returns.

A method is a function (weight [m, n], Problem, MethodSpec) -> Rounding. The Problem belongs to a
group of linears that share one input (q, k and v, where they are separate): what depends on the
input alone is computed once for the group, when first asked for."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from marrq.affine import Grid
from marrq.errors import MarrqError
from marrq.methods.lowrank import LowRankSpec
from marrq.schemes import Scheme, WeightSpec
from marrq.statistics import Factor, InputDrift, Judge, ResidualStatistics, factorize
from marrq.team import ALONE, Team

AlphaStrategy = Literal["pid", "grid", "global"]
Feedback = Literal["held-out", "calibration"]
Clip = Literal["weights", "outputs"]
Balance = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class PID:
    """Settings of MARR's controller; see methods/marr.py for the law. The paper publishes none of
    them but `tolerance`.

    proportional, integral, derivative: the gains; leak: of the integral; initial: the first α;
    lower, upper: its bounds; steps: at most so many; settled: the smallest move of α worth another
    step, since the jitter that rounding gives J hides smaller ones."""

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
            raise MarrqError(
                f"a PID needs lower <= initial <= upper and at least one step: got {self}"
            )


@dataclass(frozen=True)
class AlphaSpec:
    """How the residual strength α of a module is found.

    strategy: `pid` and `grid` search it for each module, `global` takes `value` for all; value:
    None is the constant of the method itself; feedback: what judges a search, the half of the
    calibration images that its sweep has not seen, or the images it has; grid: the values that
    `grid` tries."""

    strategy: AlphaStrategy = "pid"
    value: float | None = None
    feedback: Feedback = "held-out"
    grid: tuple[float, ...] = tuple(i / 8 for i in range(13))
    pid: PID = field(default_factory=PID)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(AlphaStrategy) or self.feedback not in get_args(Feedback):
            raise MarrqError(
                "alpha is found by pid, grid or global, judged held-out or calibration: got "
                f"{self.strategy}, {self.feedback}"
            )
        if (self.value is not None) != (self.strategy == "global"):
            raise MarrqError(
                f"a value of alpha goes with the strategy global alone: got {self.strategy}, "
                f"{self.value}"
            )


@dataclass(frozen=True)
class MethodSpec:
    """The method and its settings.

    name: one of METHODS; damping: λ / mean(diag H) of the sweep; target_damping: the same of the
    solve for the exact target; act_order: sweep columns by descending diag H; clip: what the range
    of a row's grid is searched by, the rounding error of its weights (the papers') or the error of
    its output after a sweep (methods/gptq.py); correct_bias: let the bias take up the mean error of
    the outputs; lowrank: a branch in floating point beside the codes, or None; rotation: seed of
    the rotation of the residual stream, or None; equalize: a scale per channel between linears and
    what they read (marrq/equalization.py); balance: the values of the heads in another basis
    (marrq/balance.py), see `balances`."""

    name: str = "marr-stream"
    damping: float = 0.01
    target_damping: float = 0.1
    act_order: bool = True
    clip: Clip = "outputs"
    alpha: AlphaSpec = field(default_factory=AlphaSpec)
    correct_bias: bool = True
    lowrank: LowRankSpec | None = None
    rotation: int | None = None
    equalize: bool = True
    balance: Balance = "auto"

    def balances(self, scheme: Scheme) -> bool:
        """Whether the values of the heads get another basis: left to `auto`, where activations are
        coarse.

        On a DINOv2-S, not equalized, it gained 4 points of top-1 at W4A4, and lost 1 at W3A8 and 3
        at W2A8: there the weights alone are coarse, and a sweep that compensates makes more of
        inputs that are correlated."""
        return scheme.has_coarse_activations if self.balance == "auto" else self.balance == "on"


@dataclass(frozen=True)
class Step:
    """One step of an α search: the half of the calibration set that judged (None: all of it), the α
    tried, and J there."""

    half: int | None
    alpha: float
    error: float


@dataclass(frozen=True)
class Rounding:
    """Codes [m, n] on a grid, and how they came about.

    alpha: None where the method has none; fallback: why α = 0 was used in place of the α asked for,
    or None."""

    codes: Tensor
    grid: Grid
    alpha: float | None = None
    trajectory: tuple[Step, ...] = ()
    fallback: str | None = None

    @property
    def quantized(self) -> Tensor:
        """Q, the weight that the codes stand for: [m, n]."""
        return self.grid.spread(self.codes.shape[1]).dequantize(self.codes)


class Inputs:
    """What a sweep needs of the inputs, whatever the rows of the weight: the factor U and the
    residual matrices, all in sweep order."""

    def __init__(self, statistics: ResidualStatistics, spec: MethodSpec) -> None:
        self._statistics, self._spec = statistics, spec

    @cached_property
    def factor(self) -> Factor:
        """U of the damped inverse Hessian."""
        return factorize(self._statistics.hessian, self._spec.damping, self._spec.act_order)

    @cached_property
    def drift_residual(self) -> Tensor:
        """P1 = ((D L) ∘ M) Lᵀ of GPTAQ: [n, n] float64, strictly upper triangular."""
        return self._residual(self._input_moment)

    @cached_property
    def error_residual(self) -> Tensor:
        """P2 = ((C L) ∘ M) Lᵀ of ResComp, C = H + D: [n, n] float64, strictly upper triangular."""
        return self._residual(self._statistics.hessian + self._input_moment)

    @cached_property
    def target_factor(self) -> Factor:
        """U of the exact target's solve, which has a damping of its own; inputs in their order."""
        return factorize(self._statistics.hessian, self._spec.target_damping, act_order=False)

    @property
    def _input_moment(self) -> Tensor:
        drift = self._statistics.drift
        assert isinstance(drift, InputDrift)  # the methods that ask are none of STREAM_METHODS
        return drift.moment

    def _residual(self, moment: Tensor) -> Tensor:
        order, lower = self.factor.order, self.factor.upper.T
        return torch.triu((torch.triu(moment[order][:, order] @ lower, 1)) @ lower.T, 1)


@dataclass(frozen=True)
class Compensation:
    """Statistics, with what a sweep over their inputs needs. clip: see MethodSpec."""

    statistics: ResidualStatistics
    clip: Clip
    inputs: Inputs

    @classmethod
    def of(cls, statistics: ResidualStatistics, spec: MethodSpec, clip: Clip) -> "Compensation":
        """With nothing computed yet."""
        return cls(statistics, clip, Inputs(statistics, spec))

    def of_rows(self, rows: slice) -> "Compensation":
        """For some rows of the weight; what belongs to the inputs is shared."""
        return replace(self, statistics=self.statistics.of_rows(rows))


@dataclass(frozen=True)
class Problem:
    """The statistics of both halves of the calibration set, each half and the whole ready to be
    swept with.

    Where the bias is to take up the mean error, they become the statistics of centred tokens
    (`ResidualStatistics.centre_`): the sums that are given are taken over, not copied.

    whole: all the data; halves: each half by itself, to find α, for which the quick search of the
    grid is good enough; team: the processes that share the rows of the weight; count: rows in all,
    or None where this is the problem of all rows."""

    whole: Compensation
    halves: tuple[Compensation, Compensation]
    weights: WeightSpec
    team: Team = ALONE
    count: int | None = None

    @classmethod
    def of(
        cls,
        halves: tuple[ResidualStatistics, ResidualStatistics],
        weights: WeightSpec,
        spec: MethodSpec,
        team: Team = ALONE,
    ) -> "Problem":
        """The problem of a group of linears."""
        whole, (first, second) = halves[0] + halves[1], halves
        if spec.correct_bias:
            for sums in (whole, first, second):
                sums.centre_()
        by_halves = (
            Compensation.of(first, spec, "weights"),
            Compensation.of(second, spec, "weights"),
        )
        return cls(Compensation.of(whole, spec, spec.clip), by_halves, weights, team)

    def of_rows(self, rows: slice, count: int) -> "Problem":
        """The part that this process has of a weight with so many rows in all."""
        first, second = (half.of_rows(rows) for half in self.halves)
        return replace(self, whole=self.whole.of_rows(rows), halves=(first, second), count=count)

    def judge(self, data: Compensation, weight: Tensor) -> Judge:
        """J on some of the data, of all rows; weight: [m, n], the rows that this process has."""
        return Judge(
            data.statistics, weight, lambda rows: self.team.total(rows, self.count or len(rows))
        )
