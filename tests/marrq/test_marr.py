"""MARR: the search for α, the half that judges, and what is done with the α that was found."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import (
    THREE_BITS,
    Case,
    case_for,
    constant,
    expected_codes,
    make_case,
    stream_case,
)

from marrq.methods.alpha_spec import PID, AlphaSpec
from marrq.methods.marr import best, closed_form, pid_search
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.problem import Rounding
from marrq.methods.solve import IMPLEMENTATIONS, TARGETS, solve
from marrq.methods.spec import MethodSpec
from marrq.schemes import WeightSpec


class Smooth(WeightSpec):
    """A grid so fine that J is smooth in α."""

    code_range = (-(2**22), 2**22 - 1)


@pytest.mark.parametrize("make", [make_case, stream_case])
def test_a_newton_step_lands_on_the_least_j_along_the_direction(make: Callable[[int], Case]):
    case, direction = make(0), make_case(1).weight
    start = case.weight + 0.1 * make_case(2).weight
    loss = ReconstructionLoss(case.statistics(slice(None)), case.weight)
    value, gradient = loss(start)
    step = loss.newton_step(gradient, direction)
    least, _ = loss(start + step * direction)
    assert least < value
    assert least < min(loss(start + factor * step * direction)[0] for factor in (0.99, 1.01))
    assert loss.newton_step(gradient, torch.zeros_like(direction)) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TARGETS)
def test_the_controller_reaches_the_alpha_of_a_fine_grid(name: str, seed: int):
    case, spec = case_for(name, seed), MethodSpec(name)
    first, second = case.problem(spec).halves
    target, loss = (
        TARGETS[name](case.weight, first, Smooth(8)),
        ReconstructionLoss(second.statistics, case.weight),
    )
    fit_grid = target.fit_grid

    def fit_wide_grid(alpha: float) -> None:
        fit_grid(alpha)
        # The grid of gptaq and rescomp is found on W, and would clip what compensation adds.
        target.grid = replace(target.grid, scale=8 * target.grid.scale)

    target.fit_grid = fit_wide_grid if name in ("gptaq", "rescomp") else fit_grid
    steps = pid_search(target, loss, spec.alpha, half=1)
    alphas = torch.linspace(0, 1.5, 151, dtype=torch.float64)
    errors = torch.tensor(
        [loss(quantized)[0] for quantized in target.round_at(alphas).quantized.chunk(len(alphas))]
    )
    assert best(steps).alpha == pytest.approx(float(alphas[errors.argmin()]), abs=0.05)
    assert best(steps).error < 1.03 * errors.min() < errors[25]
    assert (steps[0].half, steps[0].alpha) == (1, spec.alpha.pid.initial)
    assert len(steps) <= spec.alpha.pid.steps


def test_the_controller_keeps_to_its_bounds_and_its_number_of_steps():
    case = make_case(0)
    alpha = AlphaSpec(
        pid=PID(initial=0.1, lower=0.1, upper=0.2, steps=3, settled=0.0, tolerance=0.0)
    )
    rounding = IMPLEMENTATIONS["marr-exact"](
        case.weight, case.problem(MethodSpec()), MethodSpec(alpha=alpha)
    )
    assert [step.alpha for step in rounding.trajectory] == pytest.approx([0.1, 0.2, 0.2] * 2)
    assert rounding.alpha == pytest.approx(2 * 0.2 / 1.2)


def by_half(rounding: Rounding, half: int | None) -> list:
    return [step for step in rounding.trajectory if step.half == half]


@pytest.mark.parametrize("strategy", ["pid", "grid"])
@pytest.mark.parametrize("name", TARGETS)
def test_each_half_is_judged_by_the_other_and_the_best_are_carried_over_to_the_whole(
    name: str, strategy: str
):
    case, spec = case_for(name, 4), MethodSpec(f"marr-{name}", alpha=AlphaSpec(strategy))
    problem = case.problem(spec)
    rounding = IMPLEMENTATIONS[spec.name](case.weight, problem, spec)
    for half, other in ((0, 1), (1, 0)):
        target = TARGETS[name](case.weight, problem.halves[other], THREE_BITS)
        loss = ReconstructionLoss(problem.halves[half].statistics, case.weight)
        target.fit_grid(closed_form(target, loss, spec.alpha, half)[0].alpha)
        for step in by_half(rounding, half):
            quantized = target.round_at(torch.tensor([step.alpha], dtype=torch.float64)).quantized
            assert step.error == pytest.approx(loss(quantized)[0], rel=1e-9)
    mean = (
        sum(min(by_half(rounding, half), key=lambda step: step.error).alpha for half in (0, 1)) / 2
    )
    assert rounding.alpha == pytest.approx(2 * mean / (1 + mean))
    assert len(by_half(rounding, 0)) + len(by_half(rounding, 1)) == len(rounding.trajectory)


def test_with_feedback_from_the_calibration_data_there_is_one_search_on_all_of_it():
    case, spec = make_case(0), MethodSpec("marr-gptaq", alpha=AlphaSpec(feedback="calibration"))
    problem = case.problem(spec)
    rounding = IMPLEMENTATIONS[spec.name](case.weight, problem, spec)
    assert {step.half for step in rounding.trajectory} == {None}
    least = min(rounding.trajectory, key=lambda step: step.error)
    assert rounding.alpha == least.alpha
    assert least.error == pytest.approx(solve(case.weight, problem, spec).error, rel=1e-9)


def test_a_grid_search_tries_every_alpha_of_its_grid():
    case, spec = make_case(0), MethodSpec(alpha=AlphaSpec("grid", grid=(0.0, 0.3, 0.9)))
    rounding = IMPLEMENTATIONS["marr-exact"](case.weight, case.problem(spec), spec)
    assert (
        [step.alpha for step in by_half(rounding, 0)]
        == [step.alpha for step in by_half(rounding, 1)]
        == [0.0, 0.3, 0.9]
    )


def test_a_constant_asked_of_marr_is_the_method_without_a_search():
    case, spec = make_case(0), constant("marr-rescomp", 0.4)
    rounding = IMPLEMENTATIONS["marr-rescomp"](case.weight, case.problem(spec), spec)
    assert (rounding.alpha, rounding.trajectory) == (0.4, ())
    assert np.array_equal(rounding.codes.numpy(), expected_codes(case, spec, 0.4))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["exact", "stream"])
def test_alpha_in_closed_form_has_the_least_held_out_error_without_rounding(name: str, seed: int):
    case, spec = case_for(name, seed), MethodSpec(f"marr-{name}", alpha=AlphaSpec("closed"))
    problem = case.problem(spec)
    rounding = IMPLEMENTATIONS[spec.name](case.weight, problem, spec)
    for half, other in ((0, 1), (1, 0)):
        [step] = by_half(rounding, half)
        loss = ReconstructionLoss(problem.halves[half].statistics, case.weight)
        delta = TARGETS[name](case.weight, problem.halves[other], THREE_BITS).direction(0.0)
        alphas = torch.linspace(0, 1.5, 1501).tolist()
        errors = [loss(case.weight + alpha * delta)[0] for alpha in alphas]
        least = min(range(len(alphas)), key=errors.__getitem__)
        assert step.alpha == pytest.approx(alphas[least], abs=1e-3)
        assert step.error == pytest.approx(errors[least], rel=1e-4)
    mean = sum(step.alpha for step in rounding.trajectory) / 2
    assert rounding.alpha == pytest.approx(2 * mean / (1 + mean))
    assert np.array_equal(rounding.codes.numpy(), expected_codes(case, spec, rounding.alpha))


def test_alpha_in_closed_form_keeps_to_the_bounds_of_the_controller():
    case = make_case(0)
    bounds = PID(initial=0.1, lower=0.1, upper=0.2)
    spec = MethodSpec("marr-exact", alpha=AlphaSpec("closed", pid=bounds))
    rounding = IMPLEMENTATIONS[spec.name](case.weight, case.problem(spec), spec)
    assert {step.alpha for step in rounding.trajectory} <= {0.1, 0.2}


@pytest.mark.parametrize("initial", [0.0, 0.5, 1.0])
def test_the_grid_of_a_search_does_not_depend_on_its_first_alpha(initial: float):
    case = make_case(1)
    spec = MethodSpec("marr-exact", alpha=AlphaSpec(pid=PID(initial=initial)))
    first, second = case.problem(spec).halves
    target = TARGETS["exact"](case.weight, first, THREE_BITS)
    loss = ReconstructionLoss(second.statistics, case.weight)
    pid_search(target, loss, spec.alpha, half=1)
    found = target.grid.scale
    target.fit_grid(closed_form(target, loss, spec.alpha, half=1)[0].alpha)
    assert torch.equal(found, target.grid.scale)


def test_without_drift_alpha_has_no_effect_and_the_search_ends_at_once():
    case = make_case(0, drift=0.0)
    for name in ("marr-gptaq", "marr-exact"):
        spec = MethodSpec(name)
        rounding = IMPLEMENTATIONS[name](case.weight, case.problem(spec), spec)
        assert len(rounding.trajectory) == 2
        assert np.array_equal(rounding.codes.numpy(), expected_codes(case, MethodSpec("gptq"), 0.0))


@pytest.mark.parametrize("name", ["gptaq", "rescomp"])
def test_a_residual_that_overflows_falls_back_to_alpha_0_and_says_so(name: str):
    case, spec = make_case(0), constant(name, 1e300)
    rounding = IMPLEMENTATIONS[name](case.weight, case.problem(spec), spec)
    assert rounding.alpha == 0
    assert rounding.fallback == "alpha 1e+300 gave non-finite weights, alpha 0 was used"
    assert np.array_equal(rounding.codes.numpy(), expected_codes(case, MethodSpec("gptq"), 0.0))
