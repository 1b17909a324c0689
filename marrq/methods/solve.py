"""The quantization methods; `problem.py` says what a method is given and returns, `solve` puts
everything around it.

rtn, gptq                                   no residual: nothing of the full-precision inputs is used
gptaq, rescomp, exact, stream               one residual strength α for all modules
marr-gptaq, marr-rescomp, marr-exact, …     MARR: each module's own α
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.exact import ExactPath, correction
from marrq.methods.gptaq import GptaqPath
from marrq.methods.gptq import gptq
from marrq.methods.lowrank import Scaling, input_scaling, preserved, refit
from marrq.methods.marr import marr
from marrq.methods.problem import Problem, Rounding
from marrq.methods.rescomp import RescompPath
from marrq.methods.residual import Path, with_constant
from marrq.methods.rtn import rtn
from marrq.methods.spec import MethodSpec
from marrq.quantizers.linear import LowRank

Method = Callable[[Tensor, Problem, MethodSpec], Rounding]

TARGETS: dict[str, type[Path]] = {
    "gptaq": GptaqPath,
    "rescomp": RescompPath,
    "exact": ExactPath,
    "stream": ExactPath,
}

IMPLEMENTATIONS: dict[str, Method] = {
    "rtn": rtn,
    "gptq": gptq,
    **{name: partial(with_constant, path) for name, path in TARGETS.items()},
    **{f"marr-{name}": partial(marr, path) for name, path in TARGETS.items()},
}


@dataclass(frozen=True)
class Solution:
    """What a linear becomes.

    bias_shift: what to add to the bias, [m], or None; lowrank: the branch beside the codes, or
    None; error: J over all calibration tokens; relative_error: J / ‖W X̃‖², 0 where nothing is
    wanted; damping, lowrank_damping: what the factorizations of the sweep and of the branch's input
    scaling used, None without a branch."""

    rounding: Rounding
    bias_shift: Tensor | None
    lowrank: LowRank | None
    error: float
    relative_error: float
    damping: float
    lowrank_damping: float | None


def solve(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """Quantize one weight [m, n]: the method, around it the low-rank branch, behind it the bias.
    Raises MarrqError for NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise MarrqError("the weight has NaN or infinite values: load other weights")
    scaling = (
        None if spec.lowrank is None else input_scaling(problem.whole.statistics, spec.lowrank.kind)
    )
    rounding, branch = _round(weight, problem, spec, scaling)
    quantized = rounding.quantized if branch is None else rounding.quantized + branch.product
    rows = problem.processes.rows(len(weight))
    part = problem.of_rows(rows, len(weight))
    judge = part.judge(part.whole, weight[rows])
    error, _ = judge(quantized[rows])
    shift = (
        problem.whole.statistics.output_shift(weight, quantized).to(weight)
        if spec.correct_bias
        else None
    )
    power = judge.output_power
    relative = error / power if power > 0 else 0.0
    damping = problem.whole.inputs.factor.damping
    return Solution(
        rounding,
        shift,
        branch,
        error,
        relative,
        damping,
        None if scaling is None else scaling.damping,
    )


def _round(
    weight: Tensor, problem: Problem, spec: MethodSpec, scaling: Scaling | None
) -> tuple[Rounding, LowRank | None]:
    """The codes, and the branch for what they fall short of: W, or W + αΔ (methods/exact.py) where
    the drift of the inputs is corrected.

    Fitted to W a branch would take back what the method has put into the codes.
    """
    if spec.lowrank is None or scaling is None:
        return _by_rows(weight, problem, spec), None
    kept, _ = preserved(weight, scaling, spec.lowrank)
    rounding = _by_rows(weight - kept, problem, spec)
    target = (
        weight
        if rounding.alpha is None
        else weight + rounding.alpha * correction(weight, problem.whole)
    )
    return rounding, refit(target - rounding.quantized, scaling, spec.lowrank)


def _by_rows(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """The rounding of a weight [m, n], each process doing its share of the rows: they know nothing
    of each other, α and J apart."""
    processes, count = problem.processes, len(weight)
    rows = processes.rows(count)
    part = IMPLEMENTATIONS[spec.name](weight[rows], problem.of_rows(rows, count), spec)
    codes, scale, zero_point = (
        processes.gather_rows(tensor, count)
        for tensor in (part.codes, part.grid.scale, part.grid.zero_point)
    )
    return replace(part, codes=codes, grid=replace(part.grid, scale=scale, zero_point=zero_point))
