"""From a weight and the statistics of its inputs to the quantized linear: the method that the user
chose, the low-rank branch around it, and the bias behind it.

    rtn, gptq                            no residual: only J reads the full-precision inputs
    gptaq, rescomp, exact, stream        one residual strength α for all linears
    marr- before one of these four       MARR: each linear its own α

methods/problem.py has the input and the output of a method; methods/README.md explains them all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.exact import correction
from marrq.methods.lowrank import Scaling, input_scaling, preserved, refit
from marrq.methods.marr import marr
from marrq.methods.problem import Problem, Rounding
from marrq.methods.registry import METHODS, RESIDUAL_METHODS, MethodInfo
from marrq.methods.residual import ResidualTarget, with_constant
from marrq.methods.spec import MethodSpec
from marrq.quantizers.linear import LowRank

Method = Callable[[Tensor, Problem, MethodSpec], Rounding]


def _code(info: MethodInfo) -> Any:
    """The function or class that the registry names."""
    file, _, name = info.code.partition(".")
    return getattr(import_module(f"marrq.methods.{file}"), name)


TARGETS: dict[str, type[ResidualTarget]] = {
    name: _code(info) for name, info in RESIDUAL_METHODS.items()
}
"""The target of each method with α; MARR searches any of them."""

IMPLEMENTATIONS: dict[str, Method] = {
    **{name: _code(info) for name, info in METHODS.items() if not info.has_alpha},
    **{name: partial(with_constant, target) for name, target in TARGETS.items()},
    **{f"marr-{name}": partial(marr, target) for name, target in TARGETS.items()},
}
"""The code of every method in methods/registry.py."""


@dataclass(frozen=True)
class Solution:
    """The quantized linear, and how well it does.

    bias_shift: to be added to the bias, [m], or None
    lowrank: the branch beside the codes, or None
    error: J over all calibration tokens
    relative_error: J / ‖W X + e‖², the power of the wanted outputs; 0 if the power is 0
    rounded: what the codes stand for, [m, n]: the weight, without the part that SRR keeps
    damping: λ / mean(diag H) that the factorization of the sweep used
    lowrank_damping: the same of the branch's input scaling; None without a branch
    target_damping: the same of the exact target's solve; None if nothing was solved"""

    rounding: Rounding
    rounded: Tensor
    bias_shift: Tensor | None
    lowrank: LowRank | None
    error: float
    relative_error: float
    damping: float
    lowrank_damping: float | None
    target_damping: float | None


def solve(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """Quantize one weight [m, n]. Raises MarrqError for NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise MarrqError("the weight has NaN or infinite values: load other weights")
    # The branch's scaling belongs to the inputs; codes and branch both need it.
    statistics = problem.whole.statistics
    # Salient columns (methods/serq.py) are no branch: they are a matter of the grid and the sweep.
    branched = spec.lowrank if spec.lowrank is not None and spec.lowrank.is_branch else None
    scaling = None if branched is None else input_scaling(statistics, branched.kind)
    rounding, rounded, branch = _round(weight, problem, spec, scaling)
    quantized = rounding.quantized if branch is None else rounding.quantized + branch.product
    # J of the whole linear: codes and branch.
    error, relative_error = _errors(weight, quantized, problem)
    # The mean error that is left, with the branch counted too.
    shift = statistics.output_shift(weight, quantized).to(weight) if spec.correct_bias else None
    return Solution(
        rounding,
        rounded,
        shift,
        branch,
        error,
        relative_error,
        problem.whole.factors.factor.damping,
        None if scaling is None else scaling.damping,
        problem.whole.factors.target_damping,
    )


def _errors(weight: Tensor, quantized: Tensor, problem: Problem) -> tuple[float, float]:
    """J over all calibration tokens, and J / ‖W X + e‖², with the power of the wanted outputs.

    Each process sums its share of the rows."""
    # J is a sum over rows, and so is the power of the wanted outputs.
    rows = problem.processes.rows(len(weight))
    part = problem.of_rows(rows, len(weight))
    loss = part.loss(part.whole, weight[rows])
    error, _ = loss(quantized[rows])
    power = loss.output_power
    return error, error / power if power > 0 else 0.0


def _round(
    weight: Tensor, problem: Problem, spec: MethodSpec, scaling: Scaling | None
) -> tuple[Rounding, Tensor, LowRank | None]:
    """The codes, the part of the weight that they stand for, and the branch L R if there is to be
    one."""
    if spec.lowrank is None or scaling is None:
        return _by_rows(weight, problem, spec), weight, None
    # SRR keeps a part of the weight out of the codes; the other kinds keep nothing.
    kept, _ = preserved(weight, scaling, spec.lowrank)
    rounded = weight - kept
    rounding = _by_rows(rounded, problem, spec)
    # The branch is fitted to W - Q, or to W + αΔ - Q (methods/exact.py) if the method corrects
    # drift: fitted to W - Q, the branch would take that correction back.
    target = weight
    if rounding.alpha is not None:
        target = weight + rounding.alpha * correction(weight, problem.whole)
    return rounding, rounded, refit(target - rounding.quantized, scaling, spec.lowrank)


def _by_rows(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """The rounding of a weight [m, n], each process rounding its share of the rows.

    Rows do not depend on each other but for α and J, on which the processes agree."""
    processes, count = problem.processes, len(weight)
    rows = processes.rows(count)
    # The statistics of the inputs are those of all rows; a method never sees the other rows.
    part = IMPLEMENTATIONS[spec.name](weight[rows], problem.of_rows(rows, count), spec)
    codes, scale, zero_point = (
        processes.gather_rows(tensor, count)
        for tensor in (part.codes, part.grid.scale, part.grid.zero_point)
    )
    return replace(part, codes=codes, grid=replace(part.grid, scale=scale, zero_point=zero_point))
