"""Every method against a slow float64 NumPy reference of the papers' arithmetic that shares no code
with it (tests/reference.py)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.gptq import sweep
from marrq.methods.marr import best, pid_search
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.problem import Problem, Rounding
from marrq.methods.registry import ALIASES, METHODS, method_named
from marrq.methods.solve import IMPLEMENTATIONS, TARGETS, solve
from marrq.methods.spec import (
    PID,
    AlphaSpec,
    Clip,
    LowRankSpec,
    MethodSpec,
    parse_lowrank,
    parse_method,
    text_of,
)
from marrq.methods.statistics import ResidualStatistics
from marrq.schemes import WeightSpec

OUTPUTS, INPUTS = 6, 24
THREE_BITS = WeightSpec(3)


class Smooth(WeightSpec):
    """A grid so fine that J is smooth in α."""

    code_range = (-(2**22), 2**22 - 1)


@dataclass(frozen=True)
class Case:
    """A weight and raw tokens of both halves: x, x_float [tokens, n]; shortfall: e [tokens, m]
    where it is not W dx; importance: [m]."""

    weight: Tensor
    x: Tensor
    x_float: Tensor
    shortfall: Tensor | None = None
    importance: Tensor | None = None

    def statistics(self, tokens: slice) -> ResidualStatistics:
        sums = ResidualStatistics.zeros(INPUTS, self.x.device, self.importance)
        sums.add(
            self.x[tokens],
            (self.x_float - self.x if self.shortfall is None else self.shortfall)[tokens],
        )
        return sums

    def problem(self, spec: MethodSpec, weights: WeightSpec = THREE_BITS) -> Problem:
        half = len(self.x) // 2
        return Problem.of(
            (self.statistics(slice(half)), self.statistics(slice(half, None))), weights, spec
        )

    def moments(self, centre: bool) -> reference.Moments:
        return reference.Moments.of(self.x.numpy(), self.x_float.numpy(), centre)

    def wanted_moment(self, centre: bool) -> np.ndarray:
        """G = Σ e xᵀ."""
        shortfall = (
            (self.x_float - self.x) @ self.weight.T if self.shortfall is None else self.shortfall
        )
        x = self.x
        if centre:
            shortfall, x = shortfall - shortfall.mean(0), x - x.mean(0)
        return (shortfall.T @ x).numpy()

    def error(self, quantized: Tensor, bias: Tensor | float = 0.0) -> float:
        """J from the tokens themselves."""
        wanted = (
            self.x_float @ self.weight.T
            if self.shortfall is None
            else self.x @ self.weight.T + self.shortfall
        )
        square = (self.x @ quantized.T + bias - wanted).square()
        return float((square * (1 if self.importance is None else self.importance)).sum())


def make_case(seed: int, tokens: int = 200, drift: float = 0.3) -> Case:
    """Correlated inputs with means that are not 0, and a drift that is correlated with them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = normal(tokens, INPUTS) @ normal(INPUTS, INPUTS) + 3 * normal(INPUTS)
    dx = drift * (
        x @ normal(INPUTS, INPUTS) / INPUTS**0.5 + normal(tokens, INPUTS) + 2 * normal(INPUTS)
    )
    return Case(normal(OUTPUTS, INPUTS), x, x + dx)


def stream_case(seed: int) -> Case:
    """The same where what is wanted is told by e, and outputs count differently."""
    case, generator = make_case(seed), torch.Generator().manual_seed(seed + 100)
    mix = torch.randn(INPUTS, OUTPUTS, dtype=torch.float64, generator=generator)
    noise = torch.randn(len(case.x), OUTPUTS, dtype=torch.float64, generator=generator)
    return replace(
        case,
        shortfall=0.3 * case.x @ mix + noise + 1,
        importance=torch.linspace(0.1, 2, OUTPUTS, dtype=torch.float64),
    )


def case_for(name: str, seed: int) -> Case:
    """Only the methods that aim at the stream are told what is wanted."""
    return stream_case(seed) if name.endswith("stream") else make_case(seed)


def constant(name: str, alpha: float, **changes: object) -> MethodSpec:
    return MethodSpec(name, alpha=AlphaSpec("global", alpha), **changes)


def expected_codes(
    case: Case, spec: MethodSpec, alpha: float, kind: WeightSpec = THREE_BITS
) -> np.ndarray:
    """The codes of a method with a given α, by the reference."""
    moments, weight = case.moments(spec.correct_bias), case.weight.numpy()
    family = spec.name.removeprefix("marr-")
    alphas = {"gptaq": (alpha, 0.0), "rescomp": (alpha, alpha)}.get(family, (0.0, 0.0))
    if family in ("exact", "stream"):
        weight = reference.target(
            weight, case.wanted_moment(spec.correct_bias), moments, alpha, spec.target_damping
        )
    laid = (weight, kind.num_bits, kind.group_size, kind.grid)
    grid, order = reference.weight_grid(*laid), moments.order(spec.act_order)
    if family == "rtn":
        return grid.codes(weight)
    if spec.clip == "outputs":
        clipped = [reference.weight_grid(*laid, (1 - 0.06 * i,)) for i in range(12)]
        grid = reference.swept_grid(weight, [*clipped, grid], moments, order, spec.damping)
    return reference.sweep(weight, grid, moments, order, alphas, spec.damping)


CONSTANTS = [
    ("rtn", 0),
    ("gptq", 0),
    ("gptaq", 0.25),
    ("gptaq", 1),
    ("rescomp", 0.25),
    ("rescomp", 1),
    ("exact", 1),
    ("exact", 0.5),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("clip", ["weights", "outputs"])
@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("name", "alpha"), CONSTANTS)
def test_codes_are_those_of_the_papers_arithmetic(
    name: str, alpha: float, act_order: bool, correct_bias: bool, clip: Clip, seed: int
):
    case, spec = (
        make_case(seed),
        constant(name, alpha, act_order=act_order, correct_bias=correct_bias, clip=clip),
    )
    codes = IMPLEMENTATIONS[name](case.weight, case.problem(spec), spec).codes
    assert np.array_equal(codes.numpy(), expected_codes(case, spec, alpha))


@pytest.mark.parametrize(
    "kind", [WeightSpec(2, 8), WeightSpec(4, 12, "symmetric"), WeightSpec(2, None, "symmetric")]
)
@pytest.mark.parametrize(("name", "alpha"), CONSTANTS)
def test_codes_on_other_grids_are_those_of_the_papers_arithmetic(
    name: str, alpha: float, kind: WeightSpec
):
    case, spec = make_case(0), constant(name, alpha)
    codes = IMPLEMENTATIONS[name](case.weight, case.problem(spec, kind), spec).codes
    assert np.array_equal(codes.numpy(), expected_codes(case, spec, alpha, kind))


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("name", ["marr-gptaq", "marr-rescomp", "marr-exact", "marr-stream"])
def test_marr_gives_the_codes_of_its_method_at_the_alpha_it_found(name: str, correct_bias: bool):
    case, spec = case_for(name, 3), MethodSpec(name, correct_bias=correct_bias)
    rounding = IMPLEMENTATIONS[name](case.weight, case.problem(spec), spec)
    assert rounding.fallback is None
    assert 0 < rounding.alpha < 1.5
    assert np.array_equal(rounding.codes.numpy(), expected_codes(case, spec, rounding.alpha))


@pytest.mark.parametrize("seed", range(2))
def test_stream_aims_at_the_shortfall_it_is_told(seed: int):
    case, spec = stream_case(seed), constant("stream", 0.7)
    codes = IMPLEMENTATIONS["stream"](case.weight, case.problem(spec), spec).codes
    assert np.array_equal(codes.numpy(), expected_codes(case, spec, 0.7))


def test_a_method_without_a_value_takes_its_own_constant():
    for name, alpha in (("gptaq", 0.25), ("rescomp", 0.25), ("exact", 1.0), ("stream", 1.0)):
        case, spec = make_case(0), MethodSpec(name)
        rounding = IMPLEMENTATIONS[name](case.weight, case.problem(spec), spec)
        assert rounding.alpha == alpha
        assert np.array_equal(rounding.codes.numpy(), expected_codes(case, spec, alpha))


def test_rounding_to_nearest_looks_at_no_data():
    spec = MethodSpec("rtn")
    first, second = (
        IMPLEMENTATIONS["rtn"](make_case(0).weight, make_case(seed).problem(spec), spec)
        for seed in (0, 1)
    )
    assert torch.equal(first.codes, second.codes)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_error_told_is_the_square_error_of_the_outputs(name: str, correct_bias: bool):
    case, spec = case_for(name, 5), MethodSpec(name, correct_bias=correct_bias)
    solution = solve(case.weight, case.problem(spec), spec)
    assert (solution.bias_shift is not None) == correct_bias
    expected = case.error(solution.rounding.quantized, solution.bias_shift if correct_bias else 0.0)
    assert solution.error == pytest.approx(expected, rel=1e-9)


def test_the_bias_that_corrects_is_the_best_there_is():
    case, spec = make_case(0), MethodSpec("gptq")
    solution = solve(case.weight, case.problem(spec), spec)
    quantized = solution.rounding.quantized
    for output in range(OUTPUTS):
        for nudge in (1e-3, -1e-3):
            moved = solution.bias_shift.clone()
            moved[output] += nudge
            assert case.error(quantized, moved) > solution.error


def test_the_relative_error_is_that_of_the_wanted_outputs_about_their_mean():
    case, spec = make_case(0), MethodSpec("gptq")
    for correct_bias in (True, False):
        solution = solve(
            case.weight,
            case.problem(replace(spec, correct_bias=correct_bias)),
            replace(spec, correct_bias=correct_bias),
        )
        wanted = case.x_float @ case.weight.T
        power = (wanted - wanted.mean(0) if correct_bias else wanted).square().sum()
        assert solution.relative_error == pytest.approx(solution.error / float(power), rel=1e-9)


def total_error(spec: MethodSpec) -> float:
    cases = [case_for(spec.name, seed) for seed in range(8)]
    return sum(solve(case.weight, case.problem(spec), spec).relative_error for case in cases)


def test_each_method_lowers_j_below_the_one_before():
    errors = [
        total_error(MethodSpec(name)) for name in ("exact", "marr-gptaq", "gptaq", "gptq", "rtn")
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    "kind", [WeightSpec(3), WeightSpec(3, 8), WeightSpec(2, None, "symmetric")]
)
def test_a_grid_chosen_by_the_outputs_is_never_worse_for_them(kind: WeightSpec):
    errors = {}
    for clip in ("outputs", "weights"):
        spec, cases = (
            MethodSpec("gptq", clip=clip),
            [make_case(seed, drift=0.0) for seed in range(6)],
        )
        errors[clip] = torch.tensor(
            [solve(case.weight, case.problem(spec, kind), spec).error for case in cases]
        )
    assert (errors["outputs"] <= errors["weights"]).all()
    assert errors["outputs"].sum() < 0.98 * errors["weights"].sum()


@pytest.mark.parametrize("branch", ["srr:4", "qera:4", "qera:4:int8", "lqer:4"])
@pytest.mark.parametrize("name", METHODS)
def test_a_low_rank_branch_lowers_j_whatever_the_method(name: str, branch: str):
    spec = MethodSpec(name)
    assert total_error(replace(spec, lowrank=parse_lowrank(branch))) < total_error(spec)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_error_told_counts_the_low_rank_branch(name: str, correct_bias: bool):
    case, spec = (
        case_for(name, 0),
        MethodSpec(name, correct_bias=correct_bias, lowrank=LowRankSpec("srr", 3)),
    )
    solution = solve(case.weight, case.problem(spec), spec)
    quantized = solution.rounding.quantized + solution.lowrank.product
    assert solution.error == pytest.approx(
        case.error(quantized, solution.bias_shift if correct_bias else 0.0), rel=1e-9
    )


@pytest.mark.parametrize("kind", [WeightSpec(3), WeightSpec(3, 8), WeightSpec(4, 12, "symmetric")])
@pytest.mark.parametrize("name", ["gptaq", "rescomp"])
def test_the_block_size_changes_no_code(name: str, kind: WeightSpec):
    case, spec = make_case(1), MethodSpec(name)
    target = TARGETS[name](case.weight, case.problem(spec).whole, kind)
    whole, *others = (
        sweep(case.weight, target.grid, target.factor, target.residuals, 0.8, block_size)
        for block_size in (INPUTS, 1, 5, 8)
    )
    for codes in others:
        assert torch.equal(codes, whole)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", [WeightSpec(3), WeightSpec(3, 8)])
def test_alphas_swept_together_give_what_each_gives_alone(name: str, kind: WeightSpec):
    case, spec = make_case(2), MethodSpec(name)
    target = TARGETS[name](case.weight, case.problem(spec).whole, kind)
    alphas = torch.tensor([0.0, 0.3, 1.0, 1.4], dtype=torch.float64)
    stacked = target.round_at(alphas)
    alone = [target.round_at(alpha[None]) for alpha in alphas]
    assert torch.equal(stacked.codes, torch.cat([rounding.codes for rounding in alone]))
    assert torch.equal(stacked.quantized, torch.cat([rounding.quantized for rounding in alone]))
    assert not torch.equal(alone[0].codes, alone[2].codes)


def weights_without_rounding(case: Case, name: str, alpha: float, spec: MethodSpec) -> np.ndarray:
    moments, weight = case.moments(centre=True), case.weight.numpy()
    if name in ("exact", "stream"):
        return reference.target(weight, case.wanted_moment(centre=True), moments, alpha)
    return reference.sweep(
        weight,
        None,
        moments,
        moments.order(spec.act_order),
        (alpha, alpha if name == "rescomp" else 0.0),
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.2])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_the_direction_is_the_derivative_of_the_sweep_without_rounding(
    name: str, act_order: bool, alpha: float
):
    case, spec, step = case_for(name, 0), MethodSpec(name, act_order=act_order), 1e-5
    direction = TARGETS[name](case.weight, case.problem(spec).whole, THREE_BITS).direction(alpha)
    ahead, behind = (
        weights_without_rounding(case, name, alpha + sign * step, spec) for sign in (1, -1)
    )
    expected = (ahead - behind) / (2 * step)
    assert np.abs(direction.numpy() - expected).max() < 1e-6 * np.abs(expected).max()


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
    if name in (
        "gptaq",
        "rescomp",
    ):  # whose grid is found on W, and would clip what compensation adds
        target.grid = replace(target.grid, scale=8 * target.grid.scale)
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


def test_q_k_and_v_share_what_depends_on_their_input_alone():
    factors = make_case(0).problem(MethodSpec()).whole.factors
    for name in ("factor", "drift_residual", "error_residual", "target_factor"):
        assert getattr(factors, name) is getattr(factors, name)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(
        MarrqError,
        match=r"unknown method 'awq': choose one of rtn, gptq, gptaq, .*, marr-stream, marr$",
    ):
        method_named("awq")


def test_marr_is_short_for_the_best_variant():
    assert method_named("marr") == ALIASES["marr"]
    assert parse_method("marr") == MethodSpec(ALIASES["marr"]) == MethodSpec()


@pytest.mark.parametrize(
    "wrong",
    [{"initial": 2.0}, {"lower": 0.5}, {"upper": 0.1}, {"steps": 0}],
)
def test_a_controller_that_cannot_start_is_refused(wrong: dict[str, float]):
    with pytest.raises(MarrqError, match="lower <= initial <= upper and at least one step"):
        PID(**wrong)


@pytest.mark.parametrize(
    "wrong", [("newton",), ("pid", 0.5), ("grid", 0.5), ("global",), ("pid", None, "test set")]
)
def test_an_alpha_that_nobody_can_find_is_refused(wrong: tuple):
    with pytest.raises(MarrqError, match="alpha"):
        AlphaSpec(*wrong)


positive = st.floats(1e-6, 10)
gains = (positive, positive, positive, positive)
bounds = (st.floats(0.1, 0.9), st.floats(-1, 0), st.floats(1, 3))
controllers = st.builds(PID, *gains, *bounds, st.integers(1, 50), positive, positive)
searches = st.builds(
    AlphaSpec,
    st.sampled_from(["pid", "grid"]),
    st.none(),
    st.sampled_from(["held-out", "calibration"]),
    pid=controllers,
)
constants = st.builds(AlphaSpec, st.just("global"), st.floats(-1e9, 1e9))
branches = st.builds(
    LowRankSpec,
    st.sampled_from(["srr", "qera", "lqer"]),
    st.integers(1, 999),
    st.sampled_from([8, 16]),
)
around = {
    "damping": positive,
    "target_damping": positive,
    "act_order": st.booleans(),
    "clip": st.sampled_from(["weights", "outputs"]),
    "correct_bias": st.booleans(),
    "lowrank": st.none() | branches,
    "rotation": st.none() | st.integers(0, 2**31),
}
specs = (
    st.builds(
        MethodSpec,
        st.sampled_from([f"marr-{name}" for name in TARGETS]),
        alpha=searches | constants,
        **around,
    )
    | st.builds(
        MethodSpec, st.sampled_from(list(TARGETS)), alpha=constants | st.just(AlphaSpec()), **around
    )
    | st.builds(MethodSpec, st.sampled_from(["rtn", "gptq"]), **around)
)


@settings(deadline=None)
@given(specs)
def test_a_method_is_read_back_from_its_text(spec: MethodSpec):
    assert parse_method(text_of(spec)) == spec


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_its_defaults_is_written_as_its_name(name: str):
    assert text_of(MethodSpec(name)) == name
    assert parse_method(name) == MethodSpec(name)


def test_only_what_differs_is_written():
    text = "marr-gptaq,alpha=grid,feedback=calibration,bias-correction=off,lowrank=srr:32:int8,rotate=0,pid.initial=0.5"
    assert text_of(parse_method(text)) == text


REFUSED = {
    "awq": "unknown method 'awq'",
    "gptq,bits=4": r"unknown setting 'bits' of a method: choose one of alpha, .*pid\.settled",
    "marr,pid.gain=1": "unknown setting 'pid.gain' of a method",
    "gptq,damping=much": "setting 'damping' must be a number: got 'much'",
    "marr,rotate=0.5": "setting 'rotate' must be a whole number: got '0.5'",
    "gptq,clip=tokens": "setting 'clip' must be one of weights, outputs: got 'tokens'",
    "gptq,act-order=yes": "setting 'act-order' must be one of on, off: got 'yes'",
    "marr,alpha=global": "goes with the strategy global alone, .*: got global, None",
    "marr,alpha=pid=0.5": "goes with the strategy global alone, .*: got pid, 0.5",
    "marr,feedback=test": "setting 'feedback' must be one of held-out, calibration: got 'test'",
    "marr,pid.initial=9": "lower <= initial <= upper",
    "marr,lowrank=svd": "unknown low-rank branch 'svd'",
    "gptaq,alpha=grid": "method 'gptaq' searches no alpha: choose marr-gptaq",
    "exact,pid.steps=3": "method 'exact' searches no alpha: choose marr-exact",
    "gptq,alpha=global=0.5": "method 'gptq' searches no alpha: choose marr-stream",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_method_text_that_is_wrong_is_refused_with_the_reason(text: str):
    with pytest.raises(MarrqError, match=REFUSED[text]):
        parse_method(text)
