"""The residual methods as MARR sees them: a target that moves with the residual strength α.

A target belongs to one weight and one set of statistics. It knows three things:

    fit_grid(α)     the grid of the weights for sweeps near α; it stays while α moves
    round_at(α)     the sweep at any α on that grid, for one α or for many at once
    direction(α)    T = dw̃/dα, in which direction the compensated weights w̃(α) move if rounding is
                    left out

methods/gptaq.py, rescomp.py and exact.py have the targets; methods/marr.py searches any of them.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from marrq.distributed import Processes
from marrq.methods.problem import Problem, Rounding, SearchStep, SweepData
from marrq.methods.spec import MethodSpec
from marrq.schemes import WeightSpec


class ResidualTarget(Protocol):
    """Roundings of a weight [m, n] as a function of α.

    constant: the α of the method if there is no search."""

    # GPTAQ's released code has 0.25, QEP's closed form 1.
    constant: ClassVar[float]

    def __init__(self, weight: Tensor, data: SweepData, weight_spec: WeightSpec) -> None: ...

    def fit_grid(self, alpha: float) -> None:
        """Find the grid on which `round_at` rounds from now on, for sweeps near α."""
        ...

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep at each α of [a], the weight stacked upon itself: codes [a · m, n]."""
        ...

    def direction(self, alpha: float) -> Tensor:
        """T = dw̃/dα, [m, n], in the order of the inputs."""
        ...


def alphas_like(alphas: Sequence[float], weight: Tensor) -> Tensor:
    """Values of α as [a], in the type and on the device of a weight."""
    # Not blocking: the host does not wait until the device has them.
    return torch.tensor(alphas, dtype=weight.dtype).to(weight.device, non_blocking=True)


def final(
    target: ResidualTarget,
    weight: Tensor,
    processes: Processes,
    alpha: float,
    trajectory: tuple[SearchStep, ...] = (),
) -> Rounding:
    """The rounding at α, or at 0 if the sweep overflows; then `fallback` says so.

    A residual term feeds compensated columns back into themselves, and on a coarse grid they can
    grow without bound."""
    fallback = None
    target.fit_grid(alpha)
    rounding = target.round_at(alphas_like([alpha], weight))
    # One α for all rows: if the rows of one process overflow, every process falls back.
    if not processes.all_agree(bool(torch.isfinite(rounding.codes).all())):
        fallback = f"alpha {alpha:g} gave non-finite weights, alpha 0 was used"
        alpha = 0.0
        target.fit_grid(alpha)
        rounding = target.round_at(alphas_like([alpha], weight))
    return Rounding(rounding.codes, rounding.grid, alpha, trajectory, fallback)


def with_constant(
    target_class: type[ResidualTarget], weight: Tensor, problem: Problem, spec: MethodSpec
) -> Rounding:
    """The method with one residual strength for every linear: the strength that was chosen, or the
    method's own."""
    alpha = target_class.constant if spec.alpha.value is None else spec.alpha.value
    # No search, so that all the data can sweep.
    target = target_class(weight, problem.whole, problem.weight_spec)
    return final(target, weight, problem.processes, alpha)
