"""The input and the output of a method.

A method is a function (weight [m, n], Problem, MethodSpec) -> Rounding. The Problem belongs to a
group of linears that share one input, such as separate q, k and v: what depends on the input alone
is computed once for the group, when it is first asked for.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from marrq.distributed import ONE_PROCESS, Processes
from marrq.methods.factor import Factor, damped_inverse, factorize
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.serq import salient_columns
from marrq.methods.spec import Clip, MethodSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.affine import Grid
from marrq.schemes import WeightSpec


@dataclass(frozen=True)
class SearchStep:
    """One step of a search for α.

    half: the half of the calibration set that judged; None if all of it did
    alpha: the α that was tried
    error: J there"""

    half: int | None
    alpha: float
    error: float


@dataclass(frozen=True)
class Rounding:
    """Codes [m, n] on a grid, and how they came about.

    alpha: None if the method has no α
    trajectory: the steps of its search
    fallback: why α = 0 was used in place of the α that was asked for, or None"""

    codes: Tensor
    grid: Grid
    alpha: float | None = None
    trajectory: tuple[SearchStep, ...] = ()
    fallback: str | None = None

    @property
    def quantized(self) -> Tensor:
        """Q, the weight that the codes stand for: [m, n]."""
        # (code - zero point) · scale.
        return self.grid.values(self.codes)


class SweepFactors:
    """The matrices of a sweep that belong to the inputs, not to the weight: U, P1 and P2.

    Each is computed when it is first asked for, so that gptq does not pay for P1 and P2."""

    def __init__(
        self, statistics: ResidualStatistics, spec: MethodSpec, salient: Tensor | None = None
    ) -> None:
        self._statistics, self._spec, self._salient = statistics, spec, salient
        self._hessians: dict[torch.dtype, Tensor] = {}

    def hessian(self, kind: torch.dtype) -> Tensor:
        """H in the type of a weight, [n, n], converted once."""
        if kind not in self._hessians:
            self._hessians[kind] = self._statistics.hessian.to(kind)
        return self._hessians[kind]

    @cached_property
    def factor(self) -> Factor:
        """U of the sweep's damped inverse Hessian."""
        spec = self._spec
        return factorize(self._statistics.hessian, spec.damping, spec.act_order, self._salient)

    @cached_property
    def target_inverse(self) -> tuple[Tensor, float]:
        """(H + λI)⁻¹ of the exact target's solve, [n, n] float64, and λ / mean(diag H)."""
        # The solve has no order of columns: Δ comes out in the order of the inputs.
        return damped_inverse(self._statistics.hessian, self._spec.target_damping)

    @property
    def target_damping(self) -> float | None:
        """λ / mean(diag H) that the exact target's solve used; None if nothing was solved."""
        # A cached property is in the dictionary once it has been asked for.
        return self.target_inverse[1] if "target_inverse" in vars(self) else None

    @cached_property
    def drift_residual(self) -> Tensor:
        """GPTAQ's P1 = ((D L) ∘ M) Lᵀ, [n, n] float64 in sweep order, strictly upper triangular."""
        return self._residual(self._statistics.drift.input_moment)

    @cached_property
    def error_residual(self) -> Tensor:
        """ResComp's P2 = ((C L) ∘ M) Lᵀ with C = Σ x̃ xᵀ = H + D; shape as P1."""
        # Σ x̃ xᵀ = Σ (x + dx) xᵀ = H + D: nothing new has to be summed.
        return self._residual(self._statistics.hessian + self._statistics.drift.input_moment)

    def _residual(self, moment: Tensor) -> Tensor:
        """((moment L) ∘ M) Lᵀ with L = Uᵀ and M the strictly upper 0/1 mask."""
        order, lower = self.factor.order, self.factor.upper.T
        # The mask goes between the two products: after them it would give another matrix.
        masked = torch.triu(moment[order][:, order] @ lower, 1)
        # Strictly upper times upper is strictly upper; triu makes it so to the last bit.
        return torch.triu(masked @ lower.T, 1)


@dataclass(frozen=True)
class SweepData:
    """The statistics that a sweep compensates by, with what is computed from them.

    clip: how the grid of a row is clipped, see MethodSpec
    salient: [r], the columns that get two codes for each weight, or None (methods/serq.py)."""

    statistics: ResidualStatistics
    clip: Clip
    factors: SweepFactors
    salient: Tensor | None

    @classmethod
    def of(
        cls,
        statistics: ResidualStatistics,
        spec: MethodSpec,
        clip: Clip,
        salient: Tensor | None = None,
    ) -> "SweepData":
        """With nothing computed yet."""
        return cls(statistics, clip, SweepFactors(statistics, spec, salient), salient)

    def of_rows(self, rows: slice) -> "SweepData":
        """For some rows of the weight; what belongs to the inputs is shared."""
        return replace(self, statistics=self.statistics.of_rows(rows))


@dataclass(frozen=True)
class Problem:
    """The statistics of the calibration set: the whole, and each half by itself.

    whole: all the data, for the final sweep
    halves: each half in turn sweeps while the other judges, to find α
    weight_spec: the codes that are wanted
    processes: the processes that share the rows of a weight
    total_rows: m of the whole weight if this is the problem of some of its rows; None if it is the
    problem of all rows"""

    whole: SweepData
    halves: tuple[SweepData, SweepData]
    weight_spec: WeightSpec
    processes: Processes = ONE_PROCESS
    total_rows: int | None = None

    @classmethod
    def of(
        cls,
        halves: tuple[ResidualStatistics, ResidualStatistics],
        weight_spec: WeightSpec,
        spec: MethodSpec,
        processes: Processes = ONE_PROCESS,
    ) -> "Problem":
        """The problem of a group of linears.

        The sums that are given are taken over, not copied: if the bias is to take up the mean
        error, they are centred in place."""
        # The halves add exactly: the whole is the same however the images are split.
        whole, (first, second) = halves[0] + halves[1], halves
        if spec.correct_bias:
            for sums in (whole, first, second):
                sums.centre_()
        # All the data choose the columns: a search and the final sweep have the same ones.
        salient = salient_columns(whole.hessian, spec.lowrank)
        # A search compares α with α on one grid: for that the quick search of the grid will do.
        half_data = (
            SweepData.of(first, spec, "weights", salient),
            SweepData.of(second, spec, "weights", salient),
        )
        whole_data = SweepData.of(whole, spec, spec.clip, salient)
        return cls(whole_data, half_data, weight_spec, processes)

    def of_rows(self, rows: slice, total_rows: int) -> "Problem":
        """The problem of the rows that this process has, of a weight with `total_rows` rows."""
        # No sums are copied: what belongs to the inputs is the same for all rows.
        first, second = (half.of_rows(rows) for half in self.halves)
        return replace(
            self, whole=self.whole.of_rows(rows), halves=(first, second), total_rows=total_rows
        )

    def loss(self, data: SweepData, weight: Tensor) -> ReconstructionLoss:
        """J on the data, summed over the rows of all processes; weight: the rows [m, n] that this
        process has."""
        return ReconstructionLoss(
            data.statistics,
            weight,
            lambda rows: self.processes.sum_rows(rows, self.total_rows or len(rows)),
        )
