"""The residual methods, seen from what MARR needs: a path of roundings with the residual strength α
as its parameter.

A path belongs to one weight and one set of statistics. It sweeps at any α, for one α or many at
once, and knows in which direction the compensated weights move with α when rounding is left out
(the mean-field path w̃(α)); gptaq.py, rescomp.py and exact.py have theirs."""

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from marrq.distributed import Processes
from marrq.methods.problem import Problem, Rounding, SearchStep, SweepData
from marrq.methods.spec import MethodSpec
from marrq.schemes import WeightSpec


class Path(Protocol):
    """Roundings of a weight [m, n] as a function of α. constant: the α of the method without a
    search."""

    constant: ClassVar[float]

    def __init__(self, weight: Tensor, swept: SweepData, weights: WeightSpec) -> None: ...

    def round_at(self, alphas: Tensor) -> Rounding:
        """The sweep at each α of [a], the weight stacked upon itself: codes [a · m, n]."""
        ...

    def direction(self, alpha: float) -> Tensor:
        """T = dw̃/dα, in the order of the inputs: [m, n]."""
        ...


def final(
    path: Path,
    weight: Tensor,
    processes: Processes,
    alpha: float,
    trajectory: tuple[SearchStep, ...] = (),
) -> Rounding:
    """The rounding at α.

    A residual term feeds the compensated columns back into themselves and can overflow on a coarse
    grid; then α = 0 is used, and said: for all rows, whichever process of the processes has
    them."""
    fallback = None
    rounding = path.round_at(weight.new_tensor([alpha]))
    if not processes.all_agree(bool(torch.isfinite(rounding.codes).all())):
        fallback = f"alpha {alpha:g} gave non-finite weights, alpha 0 was used"
        alpha = 0.0
        rounding = path.round_at(weight.new_tensor([alpha]))
    return Rounding(rounding.codes, rounding.grid, alpha, trajectory, fallback)


def with_constant(
    path_type: type[Path], weight: Tensor, problem: Problem, spec: MethodSpec
) -> Rounding:
    """The method with one residual strength for every module."""
    alpha = path_type.constant if spec.alpha.value is None else spec.alpha.value
    return final(
        path_type(weight, problem.whole, problem.weights), weight, problem.processes, alpha
    )
