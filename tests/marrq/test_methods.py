"""Every method against a slow float64 NumPy reference of the papers' arithmetic that shares no code
with it (tests/reference.py)."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from method_cases import (
    INPUTS,
    OUTPUTS,
    THREE_BITS,
    Case,
    case_for,
    constant,
    expected_codes,
    make_case,
    stream_case,
)

from marrq.methods.gptq import sweep
from marrq.methods.lowrank_spec import LowRankSpec, parse_lowrank
from marrq.methods.registry import METHODS
from marrq.methods.solve import IMPLEMENTATIONS, TARGETS, solve
from marrq.methods.spec import Clip, MethodSpec
from marrq.schemes import WeightSpec

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


QUICK = [("rtn", "qera:4:int8"), ("gptq", "lqer:4"), ("exact", "qera:4"), ("marr-stream", "srr:4")]
BRANCHES = ["srr:4", "qera:4", "qera:4:int8", "lqer:4"]
OTHERS = [pair for pair in itertools.product(METHODS, BRANCHES) if pair not in QUICK]


@pytest.mark.parametrize(
    ("name", "branch"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]
)
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
    target.fit_grid(0.0)
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
    target.fit_grid(0.0)
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


def test_q_k_and_v_share_what_depends_on_their_input_alone():
    factors = make_case(0).problem(MethodSpec()).whole.factors
    for name in ("factor", "drift_residual", "error_residual", "target_inverse"):
        assert getattr(factors, name) is getattr(factors, name)
