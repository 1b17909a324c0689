"""Every method against a slow float64 NumPy reference of the papers' arithmetic that shares no code with it."""

import numpy as np
import pytest
import torch

from marrq.affine import grid_from_range, search_weight_grid
from marrq.errors import MarrqError
from marrq.methods import METHODS, method_named
from marrq.methods.gptq import sweep
from marrq.methods.marr import newton_step, path_direction, search_alpha
from marrq.methods.problem import PID, Compensation, MethodSpec, Problem
from marrq.statistics import Judge, ResidualStatistics

OUTPUTS, INPUTS = 6, 20
CODE_RANGE = (-4, 3)


def random_weight(seed: int) -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_statistics(seed: int, tokens: int = 200, drift: float = 0.3) -> ResidualStatistics:
    """Correlated inputs, and a drift that is correlated with them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(INPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    x = torch.randn(tokens, INPUTS, dtype=torch.float64, generator=generator) @ mix
    bend = torch.randn(INPUTS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(98)) / INPUTS**0.5
    dx = drift * (x @ bend + torch.randn(tokens, INPUTS, dtype=torch.float64, generator=generator))
    return ResidualStatistics.zeros(INPUTS, x.device).with_batch(x, x + dx)


def random_problem(spec: MethodSpec, drift: float = 0.3) -> Problem:
    return Problem((random_statistics(0, drift=drift), random_statistics(1, drift=drift)), CODE_RANGE, spec)


def reference_codes(
    weight: np.ndarray,
    hessian: np.ndarray,
    drift: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    alpha: float,
    damping: float,
    order: np.ndarray,
) -> np.ndarray:
    """Row by row, column by column, by the formulas; the inverse is formed and factored with NumPy."""
    n = len(hessian)
    damped = (hessian + damping * np.mean(np.diag(hessian)) * np.eye(n))[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    masked = np.triu(drift[np.ix_(order, order)] @ upper.T, 1)
    p1 = np.triu(masked @ upper, 1)
    codes = np.empty_like(weight)
    for row in range(len(weight)):
        w = weight[row, order].copy()
        for j in range(n):
            code = np.clip(np.rint(w[j] / scale[row]) + zero[row], *CODE_RANGE)
            error = (w[j] - (code - zero[row]) * scale[row]) / upper[j, j]
            for k in range(j + 1, n):
                w[k] += -error * upper[j, k] + alpha * w[j] * p1[j, k]
            codes[row, order[j]] = code
    return codes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("name", "alpha"), [("gptq", 0.0), ("gptaq", 0.25), ("gptaq", 1.0)])
def test_codes_are_those_of_the_papers_arithmetic(seed: int, act_order: bool, name: str, alpha: float):
    spec = MethodSpec(name, alpha=alpha, act_order=act_order)
    problem, weight = random_problem(spec), random_weight(seed)
    solution = METHODS[name](weight, problem, spec)
    statistics = problem.whole.statistics
    hessian = statistics.hessian.numpy()
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(INPUTS)
    grid = solution.grid
    expected = reference_codes(
        weight.numpy(), hessian, statistics.drift.numpy(), grid.scale[:, 0].numpy(), grid.zero_point[:, 0].numpy(), alpha, 0.01, order
    )
    assert np.array_equal(solution.codes.numpy(), expected)


@pytest.mark.parametrize("block_size", [1, 3, 7, 20, 128])
def test_the_block_size_changes_no_code(block_size: int):
    compensation = Compensation(random_statistics(0), MethodSpec())
    weight = random_weight(0)
    grid = search_weight_grid(weight, CODE_RANGE)
    codes = [sweep(weight, grid, compensation.factor, compensation.residual, 0.7, size) for size in (block_size, 128)]
    assert torch.equal(*codes)


def test_rounding_to_nearest_ignores_the_data():
    spec = MethodSpec("rtn")
    weight = random_weight(0)
    codes = METHODS["rtn"](weight, random_problem(spec), spec).codes
    assert torch.equal(codes, METHODS["rtn"](weight, random_problem(spec, drift=9.0), spec).codes)
    assert torch.equal(codes, search_weight_grid(weight, CODE_RANGE).quantize(weight))


def test_each_method_lowers_j_below_the_one_before():
    specs = [MethodSpec(name) for name in METHODS]
    problems = [random_problem(spec) for spec in specs]
    errors = {
        spec.name: sum(METHODS[spec.name](random_weight(seed), problem, spec).error for seed in range(10))
        for spec, problem in zip(specs, problems, strict=True)
    }
    assert errors["marr"] < errors["gptaq"] < errors["gptq"] < errors["rtn"]


def test_the_direction_is_the_derivative_of_the_mean_field_path():
    spec, alpha, step = MethodSpec(), 0.4, 1e-6
    compensation, weight = Compensation(random_statistics(0), spec), random_weight(0)
    order = compensation.factor.order

    def path(at: float) -> torch.Tensor:
        moved = weight[:, order] @ torch.linalg.inv(torch.eye(INPUTS) - at * compensation.residual)
        return moved[:, order.argsort()]

    difference = (path(alpha + step) - path(alpha - step)) / (2 * step)
    torch.testing.assert_close(path_direction(weight, alpha, compensation), difference, rtol=1e-5, atol=1e-6)


def test_a_newton_step_lands_on_the_least_j_along_the_direction():
    statistics, weight = random_statistics(0), random_weight(0)
    start, direction = weight + 0.1 * random_weight(1), random_weight(2)
    judge = Judge(statistics, weight)
    value, gradient = judge(start)
    step = newton_step(gradient, direction, statistics.hessian)
    least, _ = judge(start + step * direction)
    assert least < value
    assert least <= min(judge(start + factor * step * direction)[0] for factor in (0.9, 1.1))


def test_marr_finds_the_alpha_that_a_fine_grid_finds_on_the_held_out_half():
    spec = MethodSpec()
    problem, weight = random_problem(spec), random_weight(3)
    grid = grid_from_range(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), (-128, 127))  # fine, so that J is smooth in α
    first, second = problem.halves
    steps = search_alpha(weight, grid, first, second.statistics, spec.pid, half=1)
    judge = Judge(second.statistics, weight)

    def held_out(alpha: float) -> float:
        return judge(grid.dequantize(sweep(weight, grid, first.factor, first.residual, alpha)))[0]

    best = min((0.01 * i for i in range(151)), key=held_out)
    assert steps[-1].alpha == pytest.approx(best, abs=0.03)
    assert steps[0].alpha == spec.pid.initial
    assert all(step.error == pytest.approx(held_out(step.alpha), rel=1e-9) for step in steps)


def test_marr_judges_each_half_by_the_other_and_averages_the_best():
    spec = MethodSpec()
    solution = METHODS["marr"](random_weight(0), random_problem(spec), spec)
    best = [min((step for step in solution.trajectory if step.half == half), key=lambda step: step.error).alpha for half in (0, 1)]
    assert solution.alpha == pytest.approx(sum(best) / 2)
    assert all(spec.pid.lower <= step.alpha <= spec.pid.upper for step in solution.trajectory)


def test_without_drift_alpha_has_no_effect_and_the_search_ends_at_once():
    spec = MethodSpec()
    problem, weight = random_problem(spec, drift=0.0), random_weight(0)
    solution = METHODS["marr"](weight, problem, spec)
    assert len(solution.trajectory) == 2
    assert torch.equal(solution.codes, METHODS["gptq"](weight, problem, spec).codes)


def test_a_residual_that_overflows_falls_back_to_gptq_and_says_so():
    spec = MethodSpec("gptaq", alpha=1e300)
    problem, weight = random_problem(spec), random_weight(0)
    solution = METHODS["gptaq"](weight, problem, spec)
    assert solution.alpha == 0
    assert solution.fallback is not None
    assert "non-finite" in solution.fallback
    assert torch.equal(solution.codes, METHODS["gptq"](weight, problem, spec).codes)


def test_fewer_tokens_than_inputs_still_give_finite_codes():
    spec = MethodSpec()
    problem = Problem((random_statistics(0, tokens=4), random_statistics(1, tokens=4)), CODE_RANGE, spec)
    solution = METHODS["marr"](random_weight(0), problem, spec)
    assert solution.codes.isfinite().all()
    assert solution.error >= 0


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(MarrqError, match=r"unknown method 'awq': choose one of rtn, gptq, gptaq, marr"):
        method_named("awq")


def test_bounds_that_exclude_the_first_alpha_are_refused():
    with pytest.raises(MarrqError, match="lower <= initial <= upper"):
        PID(initial=2.0)
