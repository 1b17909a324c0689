"""MARR (arXiv 2605.17997): a residual strength α of its own for every module, found by a PID loop
on the module's reconstruction error, judged on calibration images that the sweep has not seen. Any
path (methods/path.py) can be searched: GPTAQ's, ResComp's, the exact target.

From the paper: the feedback is the module reconstruction error J; the update has a proportional, an
integral and a derivative part; it stops when |J_t - J_{t-1}| / (J_0 + ε) < 1e-5. Not public: the
error signal, the gains, the first α, the bounds. Ours is the Newton step of J along the mean-field
path of the sweep, w̃(α), the compensated weights with rounding left out:

    T = dw̃/dα
    e_t = ⟨W D - (Q_t - W) H, T⟩ / ⟨T H, T⟩                            D, H of the half that judges; Q_t swept with the other half
    I_t = leak · I_{t-1} + e_t                                         leaky: no wind-up
    α_{t+1} = clip(α_t + Kp e_t + Ki I_t + Kd (e_t - e_{t-1}))

Differs from the paper in the judge. On the data that produced it J is a poor one: α climbs to about
1.1 in every module and accuracy falls below GPTAQ's with its constant 0.25
(`feedback="calibration"` is the paper's way). So the calibration set is kept in two halves; each
sweeps while the other judges, the best α seen is kept, the two are averaged, and the final sweep
uses all the data, for which that average is too low: correcting drift leaves a (1 - α)² of J and
the noise of the estimated correction adds b α², so the best α is a / (a + b), and b halves with
twice the tokens. Hence the whole set gets

    α = 2 α_½ / (1 + α_½)

Rounding makes J jitter by about 1e-3 of J_0, far above the paper's tolerance, so the search also
ends when α has settled; most do after three steps."""

import math
from collections.abc import Callable

from torch import Tensor

from marrq.methods.objective import ReconstructionLoss
from marrq.methods.problem import Problem, Rounding, SearchStep, SweepData
from marrq.methods.residual import Path, final, with_constant
from marrq.methods.spec import AlphaSpec, AlphaStrategy, MethodSpec

Search = Callable[[Path, ReconstructionLoss, AlphaSpec, int | None], list[SearchStep]]


def pid_search(
    path: Path, judge: ReconstructionLoss, spec: AlphaSpec, half: int | None
) -> list[SearchStep]:
    """The steps of one PID run; the caller picks from them."""
    pid = spec.pid
    steps: list[SearchStep] = []
    alpha, integral, previous = pid.initial, 0.0, 0.0
    while len(steps) < pid.steps:
        value, gradient = judge(path.round_at(judge.weight.new_tensor([alpha])).quantized)
        steps.append(SearchStep(half, alpha, value))
        error = judge.newton_step(gradient, path.direction(alpha))
        integral = pid.leak * integral + error
        change = (
            pid.proportional * error + pid.integral * integral + pid.derivative * (error - previous)
        )
        if not math.isfinite(change):
            break
        following = min(max(alpha + change, pid.lower), pid.upper)
        unchanged = len(steps) > 1 and abs(value - steps[-2].error) < pid.tolerance * steps[0].error
        if unchanged or abs(following - alpha) < pid.settled:
            break
        alpha, previous = following, error
    return steps


def grid_search(
    path: Path, judge: ReconstructionLoss, spec: AlphaSpec, half: int | None
) -> list[SearchStep]:
    """A step for every α of the grid, all from one stacked sweep."""
    stacked = path.round_at(judge.weight.new_tensor(spec.grid)).quantized
    return [
        SearchStep(half, alpha, judge(part)[0])
        for alpha, part in zip(spec.grid, stacked.chunk(len(spec.grid)), strict=True)
    ]


SEARCHES: dict[AlphaStrategy, Search] = {"pid": pid_search, "grid": grid_search}
"""How α is searched, by strategy; `global` searches nothing."""


def best(steps: list[SearchStep]) -> SearchStep:
    """The step with the least J; a step that overflowed counts as the worst."""
    return min(steps, key=lambda step: step.error if math.isfinite(step.error) else math.inf)


def marr(path_type: type[Path], weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """Search α with each half in turn, average the two best, carry the average over to the whole,
    sweep with that."""
    if spec.alpha.strategy == "global":
        return with_constant(path_type, weight, problem, spec)
    searches = [
        SEARCHES[spec.alpha.strategy](
            path_type(weight, swept, problem.weights),
            problem.judge(judge, weight),
            spec.alpha,
            half,
        )
        for swept, judge, half in _rounds(problem, spec)
    ]
    alpha = sum(best(steps).alpha for steps in searches) / len(searches)
    if spec.alpha.feedback == "held-out":
        alpha = 2 * alpha / (1 + alpha)
    steps = tuple(step for steps in searches for step in steps)
    return final(
        path_type(weight, problem.whole, problem.weights), weight, problem.processes, alpha, steps
    )


def _rounds(problem: Problem, spec: MethodSpec) -> list[tuple[SweepData, SweepData, int | None]]:
    """What sweeps, what judges, and which half that is."""
    if spec.alpha.feedback == "calibration":
        return [(problem.whole, problem.whole, None)]
    first, second = problem.halves
    return [(first, second, 1), (second, first, 0)]
