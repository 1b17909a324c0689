"""What a method is given and what it returns.

A method is a function (weight [m, n], Problem, MethodSpec) -> Rounding. The Problem belongs to a
group of linears that share one input (q, k and v, where they are separate): what depends on the
input alone is computed once for the group, when first asked for."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from marrq.distributed import ONE_PROCESS, Processes
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.spec import Clip, MethodSpec
from marrq.methods.statistics import Factor, InputDrift, ResidualStatistics, factorize
from marrq.quantizers.affine import Grid
from marrq.schemes import WeightSpec


@dataclass(frozen=True)
class SearchStep:
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
    trajectory: tuple[SearchStep, ...] = ()
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
class SweepData:
    """Statistics, with what a sweep over their inputs needs. clip: see MethodSpec."""

    statistics: ResidualStatistics
    clip: Clip
    inputs: Inputs

    @classmethod
    def of(cls, statistics: ResidualStatistics, spec: MethodSpec, clip: Clip) -> "SweepData":
        """With nothing computed yet."""
        return cls(statistics, clip, Inputs(statistics, spec))

    def of_rows(self, rows: slice) -> "SweepData":
        """For some rows of the weight; what belongs to the inputs is shared."""
        return replace(self, statistics=self.statistics.of_rows(rows))


@dataclass(frozen=True)
class Problem:
    """The statistics of both halves of the calibration set, each half and the whole ready to be
    swept with.

    Where the bias is to take up the mean error, they become the statistics of centred tokens
    (`ResidualStatistics.centre_`): the sums that are given are taken over, not copied.

    whole: all the data; halves: each half by itself, to find α, for which the quick search of the
    grid is good enough; processes: the processes that share the rows of the weight; count: rows in
    all, or None where this is the problem of all rows."""

    whole: SweepData
    halves: tuple[SweepData, SweepData]
    weights: WeightSpec
    processes: Processes = ONE_PROCESS
    count: int | None = None

    @classmethod
    def of(
        cls,
        halves: tuple[ResidualStatistics, ResidualStatistics],
        weights: WeightSpec,
        spec: MethodSpec,
        processes: Processes = ONE_PROCESS,
    ) -> "Problem":
        """The problem of a group of linears."""
        whole, (first, second) = halves[0] + halves[1], halves
        if spec.correct_bias:
            for sums in (whole, first, second):
                sums.centre_()
        by_halves = (
            SweepData.of(first, spec, "weights"),
            SweepData.of(second, spec, "weights"),
        )
        return cls(SweepData.of(whole, spec, spec.clip), by_halves, weights, processes)

    def of_rows(self, rows: slice, count: int) -> "Problem":
        """The part that this process has of a weight with so many rows in all."""
        first, second = (half.of_rows(rows) for half in self.halves)
        return replace(self, whole=self.whole.of_rows(rows), halves=(first, second), count=count)

    def judge(self, data: SweepData, weight: Tensor) -> ReconstructionLoss:
        """J on some of the data, of all rows; weight: [m, n], the rows that this process has."""
        return ReconstructionLoss(
            data.statistics,
            weight,
            lambda rows: self.processes.total(rows, self.count or len(rows)),
        )
