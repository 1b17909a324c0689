"""MARR (arXiv 2605.17997): GPTAQ with a residual strength α of its own for every module, found by a PID loop on the module's
reconstruction error, judged on calibration images that the sweep has not seen.

From the paper: the feedback is the module reconstruction error J; the update has a proportional, an integral and a derivative part; it
stops when |J_t - J_{t-1}| / (J_0 + ε) < 1e-5. Not public: the error signal, the gains, the first α, the bounds. Ours is the Newton
step of J along the mean-field path of the sweep (rounding left out, compensated weights are w̃(α) = W (I - αP)⁻¹):

    T = dw̃/dα = w̃ P (I - αP)⁻¹                                        two triangular solves
    e_t = ⟨W D - (Q_t - W) H, T⟩ / ⟨T H, T⟩                            D, H of the half that judges; Q_t swept with the other half
    I_t = leak · I_{t-1} + e_t                                         leaky: no wind-up
    α_{t+1} = clip(α_t + Kp e_t + Ki I_t + Kd (e_t - e_{t-1}))

Differs from the paper in the judge. On the data that produced it J is a poor one: α climbs to about 1.1 in every module and accuracy
falls below GPTAQ's with its constant 0.25. So the calibration set is kept in two halves; each sweeps while the other judges, the best α
seen is kept, the two are averaged, and the final sweep uses all the data. Rounding makes J jitter by about 1e-3 of J_0, far above the
paper's tolerance, so the search also ends when α has settled; most do after four steps.
"""

import math

import torch
from torch import Tensor

from marrq.affine import Grid, search_weight_grid
from marrq.methods.gptaq import residual_solution
from marrq.methods.gptq import sweep
from marrq.methods.problem import PID, Compensation, MethodSpec, Problem, Solution, Step
from marrq.statistics import Judge, ResidualStatistics


def path_direction(weight: Tensor, alpha: float, swept: Compensation) -> Tensor:
    """T = dw̃/dα of the module docstring, in the order of the inputs. weight: [m, n]."""
    order, residual = swept.factor.order, swept.residual.to(weight)
    system = torch.eye(len(order), dtype=weight.dtype, device=weight.device) - alpha * residual

    def solve(rows: Tensor) -> Tensor:  # rows (I - αP)⁻¹
        solved: Tensor = torch.linalg.solve_triangular(system, rows, upper=True, left=False, unitriangular=True)
        return solved

    return solve(solve(weight[:, order]) @ residual)[:, order.argsort()]


def newton_step(gradient: Tensor, direction: Tensor, hessian: Tensor) -> float:
    """The step e = ⟨-gradient, T⟩ / ⟨T H, T⟩; 0 where α has no effect (no drift, as in a first layer with float activations)."""
    slope = (gradient.to(direction) * direction).sum()
    curvature = ((direction @ hessian.to(direction)) * direction).sum()
    return -float(slope / curvature) if curvature > 0 else 0.0


def search_alpha(weight: Tensor, grid: Grid, swept: Compensation, judge: ResidualStatistics, pid: PID, half: int) -> list[Step]:
    """The steps of one PID run: swept with one half, judged on the other; the caller picks from it. weight: [m, n]."""
    steps: list[Step] = []
    measure = Judge(judge, weight)
    alpha, integral, previous = pid.initial, 0.0, 0.0
    while len(steps) < pid.steps:
        quantized = grid.dequantize(sweep(weight, grid, swept.factor, swept.residual, alpha))
        value, gradient = measure(quantized)
        steps.append(Step(half, alpha, value))
        error = newton_step(gradient, path_direction(weight, alpha, swept), judge.hessian)
        integral = pid.leak * integral + error
        change = pid.proportional * error + pid.integral * integral + pid.derivative * (error - previous)
        if not math.isfinite(change):
            break
        following = min(max(alpha + change, pid.lower), pid.upper)
        unchanged = len(steps) > 1 and abs(value - steps[-2].error) < pid.tolerance * steps[0].error
        if unchanged or abs(following - alpha) < pid.settled:
            break
        alpha, previous = following, error
    return steps


def best(steps: list[Step]) -> Step:
    """The step with the least held-out J; a step that overflowed counts as the worst."""
    return min(steps, key=lambda step: step.error if math.isfinite(step.error) else math.inf)


def marr(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """Search α with each half in turn, average the two best, sweep with all the data."""
    grid = search_weight_grid(weight, problem.code_range)
    first, second = problem.halves
    searches = (
        search_alpha(weight, grid, first, second.statistics, spec.pid, half=1),
        search_alpha(weight, grid, second, first.statistics, spec.pid, half=0),
    )
    alpha = sum(best(steps).alpha for steps in searches) / len(searches)
    return residual_solution(weight, grid, problem, alpha, tuple(step for steps in searches for step in steps))
