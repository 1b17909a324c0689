"""MARR (arXiv 2605.17997): a residual strength α of its own for every linear, found by a PID loop
on the linear's reconstruction error J. Any ResidualTarget can be searched: GPTAQ's, ResComp's, the
exact target.

From the paper: the feedback is J; the update has a proportional, an integral and a derivative part;
the search stops if |J_t - J_{t-1}| / J_0 < 1e-5. Not public: the error signal, the gains, the first
α, the bounds. Ours is the Newton step of J along w̃(α), the compensated weights without rounding:

    T = dw̃/dα
    ε_t = ⟨G - (Q_t - W) H, T⟩ / ⟨T H, T⟩               G, H of the half that judges
    I_t = leak · I_{t-1} + ε_t                          leaky, so that errors do not pile up
    α_{t+1} = clip(α_t + Kp ε_t + Ki I_t + Kd (ε_t - ε_{t-1}))

Q_t is swept with the half that does not judge.

Differs from the paper in the data that judge. On the data that produced Q, J is a poor judge:
α climbs to about 1.1 in every linear, and accuracy falls below GPTAQ's with its constant 0.25
(`feedback="calibration"` is the paper's way). So the calibration set is kept in two halves. Each
half in turn sweeps while the other judges, the best α of either search is kept, and the two are
averaged to α_½. The final sweep uses all the data, of which the best α is another: α leaves a share
a (1 - α)² of the drift in J, and the noise of the estimated correction adds b α². The best α is
a / (a + b), and b halves with twice the tokens. Hence the whole set gets

    α = 2 α_½ / (1 + α_½)

This α is nearer to 1 than α_½ and on the same side of 1. Below 1 it is the larger α that less noise
allows. An α_½ above 1 is outside the model, whose b is not negative, and α moves down towards 1. A
negative α_½, which only bounds below 0 allow, is outside it too and stays.

Rounding makes J jitter by about 1e-3 of J_0, far above the paper's tolerance. So the search also
ends if α has settled; most searches end after three steps.

**Closed form** [ours]. Without rounding, J of W + α T is a parabola. With T from the half that
sweeps, and G and H of the half that judges, its least is at

    α_½ = ⟨G, T⟩ / ⟨T H, T⟩,     clipped to the bounds of the PID

The exact target has T = Δ at every α. The w̃(α) of GPTAQ and ResComp is curved: T is its tangent at
α = 0. `alpha=closed` takes this α and sweeps neither half, which saves about a third of the time
of a run. On DINOv2-S at 2 bits the divergence from full precision is that of the search.

**The grid of a search** is found on the weight at this α, for every α that the search tries. On a
grid that is found at the first α that is tried, J would favour that α.
"""

import math
from collections.abc import Callable

from torch import Tensor

from marrq.methods.alpha_spec import AlphaSpec, AlphaStrategy
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.problem import Problem, Rounding, SearchStep, SweepData
from marrq.methods.residual import ResidualTarget, alphas_like, final, with_constant
from marrq.methods.spec import MethodSpec

Search = Callable[[ResidualTarget, ReconstructionLoss, AlphaSpec, int | None], list[SearchStep]]
"""(target, loss of the half that judges, settings, number of that half) to the steps taken."""


def pid_search(
    target: ResidualTarget, loss: ReconstructionLoss, spec: AlphaSpec, half: int | None
) -> list[SearchStep]:
    """The steps of one PID run; the caller picks from them."""
    pid = spec.pid
    _fit_grid(target, loss, spec)
    steps: list[SearchStep] = []
    # previous: ε_{t-1}; before the first step there is no error, and no sum of errors.
    alpha, integral, previous = pid.initial, 0.0, 0.0
    while len(steps) < pid.steps:
        # Plant: sweep at α, then J and its gradient at the codes.
        quantized = target.round_at(alphas_like([alpha], loss.weight)).quantized
        value, gradient = loss(quantized)
        steps.append(SearchStep(half, alpha, value))
        # Error signal: how far along T the least J lies, in units of α.
        error = loss.newton_step(gradient, target.direction(alpha))
        integral = pid.leak * integral + error
        change = (
            pid.proportional * error + pid.integral * integral + pid.derivative * (error - previous)
        )
        # A sweep that overflowed gives no direction: the steps so far decide.
        if not math.isfinite(change):
            break
        # The next α, within its bounds.
        following = min(max(alpha + change, pid.lower), pid.upper)
        # The paper's end, J no longer changes; and ours, α would hardly move.
        unchanged = len(steps) > 1 and abs(value - steps[-2].error) < pid.tolerance * steps[0].error
        if unchanged or abs(following - alpha) < pid.settled:
            break
        alpha, previous = following, error
    return steps


def grid_search(
    target: ResidualTarget, loss: ReconstructionLoss, spec: AlphaSpec, half: int | None
) -> list[SearchStep]:
    """A step for every α of the grid, all from one stacked sweep."""
    _fit_grid(target, loss, spec)
    # [a · m, n]: one column loop for the whole grid.
    stacked = target.round_at(alphas_like(spec.grid, loss.weight)).quantized
    return [
        SearchStep(half, alpha, loss(quantized)[0])
        for alpha, quantized in zip(spec.grid, stacked.chunk(len(spec.grid)), strict=True)
    ]


def closed_form(
    target: ResidualTarget, loss: ReconstructionLoss, spec: AlphaSpec, half: int | None
) -> list[SearchStep]:
    """One step: the α with the least J of W + α T without rounding, and this J. T is the direction
    at α = 0, for the exact target at every α."""
    alpha, error = loss.least_along(target.direction(0.0), spec.pid.lower, spec.pid.upper)
    return [SearchStep(half, alpha, error)]


def _fit_grid(target: ResidualTarget, loss: ReconstructionLoss, spec: AlphaSpec) -> None:
    """Find the grid for a search at the α in closed form: at the first α of the search it would
    favour that α."""
    [near] = closed_form(target, loss, spec, None)
    target.fit_grid(near.alpha)


SEARCHES: dict[AlphaStrategy, Search] = {
    "pid": pid_search,
    "grid": grid_search,
    "closed": closed_form,
}
"""How α is searched, by strategy; `global` searches nothing."""


def best(steps: list[SearchStep]) -> SearchStep:
    """The step with the least J; a step that overflowed counts as the worst."""
    return min(steps, key=lambda step: step.error if math.isfinite(step.error) else math.inf)


def marr(
    target_class: type[ResidualTarget], weight: Tensor, problem: Problem, spec: MethodSpec
) -> Rounding:
    """Search α with each half in turn, average the two best, carry the average over to the whole
    set, and sweep with that."""
    # A value for all linears was asked for: then this is the method without MARR.
    if spec.alpha.strategy == "global":
        return with_constant(target_class, weight, problem, spec)
    search = SEARCHES[spec.alpha.strategy]
    searches: list[list[SearchStep]] = []
    for sweeping, judging, half in _rounds(problem, spec):
        target = target_class(weight, sweeping, problem.weight_spec)
        searches.append(search(target, problem.loss(judging, weight), spec.alpha, half))
    # The least J seen, not the last: a step too far is not taken over.
    alpha = sum(best(steps).alpha for steps in searches) / len(searches)
    if spec.alpha.feedback == "held-out" and alpha > 0:
        # a / (a + b) with b for half the tokens, to a / (a + b / 2).
        alpha = 2 * alpha / (1 + alpha)
    trajectory = tuple(step for steps in searches for step in steps)
    target = target_class(weight, problem.whole, problem.weight_spec)
    return final(target, weight, problem.processes, alpha, trajectory)


def _rounds(problem: Problem, spec: MethodSpec) -> list[tuple[SweepData, SweepData, int | None]]:
    """For each search: the data that sweeps, the data that judges, and the number of its half."""
    if spec.alpha.feedback == "calibration":
        return [(problem.whole, problem.whole, None)]
    # Halves are numbered 0 and 1; a step names the half that judged it.
    first, second = problem.halves
    return [(first, second, 1), (second, first, 0)]
