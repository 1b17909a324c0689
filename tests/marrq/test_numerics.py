"""Inputs and settings that break naive code, each taken through the real methods or the whole
pipeline."""

import pytest
import torch
from tiny_models import noise, quantized, vit
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.methods.alpha_spec import AlphaSpec
from marrq.methods.problem import Problem
from marrq.methods.registry import METHODS
from marrq.methods.solve import TARGETS, Solution, solve
from marrq.methods.spec import MethodSpec, parse_method
from marrq.methods.statistics import ResidualStatistics
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import WeightSpec

OUTPUTS, INPUTS = 5, 16
WEIGHT = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(1))
ALL = pytest.mark.parametrize(
    "method",
    [*METHODS, "marr-exact,bias-correction=off", "gptaq,alpha=global=1", "exact,lowrank=srr:4"],
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem_of(x: Tensor, x_float: Tensor, spec: MethodSpec, num_bits: int = 3) -> Problem:
    halves = []
    for part, part_float in zip(x.tensor_split(2), x_float.tensor_split(2), strict=True):
        halves.append(ResidualStatistics.zeros(x.shape[1], x.device))
        halves[-1].add(part, part_float - part)
    return Problem.of((halves[0], halves[1]), WeightSpec(num_bits), spec)


def solved(method: str, x: Tensor, x_float: Tensor | None = None, num_bits: int = 3) -> Solution:
    """The solution for tokens [tokens, n] in float32, as the pipeline has them; checked to be one,
    with the J that it tells."""
    spec = parse_method(method)
    x_float = x + 0.1 * normal(*x.shape, seed=2) if x_float is None else x_float
    solution = solve(WEIGHT, problem_of(x, x_float, spec, num_bits), spec)
    low, high = WeightSpec(num_bits).code_range
    assert solution.rounding.codes.isfinite().all()
    assert low <= solution.rounding.codes.min()
    assert solution.rounding.codes.max() <= high
    quantized_weight = solution.rounding.quantized + (
        0 if solution.lowrank is None else solution.lowrank.product
    )
    bias = 0.0 if solution.bias_shift is None else solution.bias_shift.double()
    outputs, wanted = (
        x.double() @ quantized_weight.double().T + bias,
        x_float.double() @ WEIGHT.double().T,
    )
    error, power = float((outputs - wanted).square().sum()), float(wanted.square().sum())
    assert solution.error == pytest.approx(error, rel=1e-3, abs=1e-6 * power + 1e-9)
    return solution


@ALL
def test_the_weights_of_a_dead_input_are_simply_rounded(method: str):
    x = normal(200, INPUTS)
    x[:, 7] = 0
    rounding = solved(method, x).rounding
    if "lowrank" not in method:  # which takes something out of the weight before
        assert torch.equal(
            rounding.codes[:, 7], rounding.grid.spread(INPUTS).quantize(WEIGHT)[:, 7]
        )


@ALL
def test_inputs_that_are_all_dead_have_no_error_to_relate_to(method: str):
    x = torch.zeros(40, INPUTS)
    solution = solved(method, x, x)
    assert (solution.error, solution.relative_error) == (0, 0)


@ALL
def test_a_constant_input_is_left_to_the_bias(method: str):
    x = normal(200, INPUTS)
    x[:, 7] = 3.3
    solution = solved(method, x)
    if solution.bias_shift is not None and "lowrank" not in method:
        rounding = solution.rounding
        assert torch.equal(
            rounding.codes[:, 7], rounding.grid.spread(INPUTS).quantize(WEIGHT)[:, 7]
        )
    assert solution.relative_error < 0.2


@ALL
def test_inputs_that_are_all_constant_are_solved(method: str):
    x = normal(1, INPUTS).repeat(40, 1)
    x_float = x + 0.1 * normal(1, INPUTS, seed=2)
    solution = solved(method, x, x_float)
    assert solution.relative_error < 0.1
    if solution.bias_shift is not None:
        assert solution.error < 1e-9


@ALL
def test_two_inputs_that_are_one_and_the_same_are_solved(method: str):
    x = normal(200, INPUTS)
    x[:, 3] = x[:, 9]
    assert solved(method, x).relative_error < 0.2


@pytest.mark.parametrize(
    "method", ["gptq,damping=0", "marr-gptaq,damping=0", "exact,damping=0,target-damping=0"]
)
def test_a_singular_hessian_without_damping_gets_the_damping_it_needs_and_says_so(method: str):
    x = normal(200, INPUTS)
    x[:, 3] = x[:, 9]
    x[:, 4] = x[:, 5] + x[:, 6]
    found = solved(method, x)
    assert 0 < found.damping < 0.01
    assert (found.target_damping is not None) == method.startswith("exact")
    assert found.target_damping is None or 0 < found.target_damping < 0.01


@ALL
def test_fewer_tokens_than_inputs_are_solved(method: str):
    assert solved(method, normal(10, INPUTS)).error >= 0


@ALL
def test_one_token_in_each_half_is_solved(method: str):
    assert solved(method, normal(2, INPUTS)).error >= 0


@ALL
@pytest.mark.parametrize(("deviation", "mean"), [(1e4, 0), (1, 1e4)])
def test_an_outlier_channel_does_not_drown_what_its_weights_are_worth(
    method: str, deviation: float, mean: float
):
    x = normal(200, INPUTS)
    x[:, 7] = deviation * x[:, 7] + mean
    solution = solved(method, x, num_bits=4)
    if solution.bias_shift is not None or deviation > 1:
        assert solution.relative_error < 0.1


@pytest.mark.parametrize("name", [*TARGETS, *(f"marr-{name}" for name in TARGETS)])
def test_an_alpha_that_overflows_float32_falls_back_to_0_and_says_so(name: str):
    x = normal(200, INPUTS)
    spec = MethodSpec(name, alpha=AlphaSpec("global", 1e39))
    solution = solve(WEIGHT, problem_of(x, x + 0.1 * normal(*x.shape, seed=2), spec), spec)
    assert solution.rounding.fallback == "alpha 1e+39 gave non-finite weights, alpha 0 was used"
    assert solution.rounding.alpha == 0
    expected = solve(WEIGHT, problem_of(x, x, MethodSpec("gptq")), MethodSpec("gptq"))
    assert torch.equal(solution.rounding.codes, expected.rounding.codes)


def feeding_back(inputs: int) -> tuple[Tensor, Tensor]:
    """Tokens whose drift is so large that the residual term multiplies what it is fed with, column
    after column."""
    x = normal(300, inputs)
    return x, x + 30 * x @ normal(inputs, inputs, seed=2)


def test_2_bit_feedback_that_overflows_falls_back_and_says_so():
    (x, x_float), weight = feeding_back(64), normal(OUTPUTS, 64, seed=3)
    spec = MethodSpec("gptaq", alpha=AlphaSpec("global", 1.0))
    solution = solve(weight, problem_of(x, x_float, spec, num_bits=2), spec)
    assert solution.rounding.fallback == "alpha 1 gave non-finite weights, alpha 0 was used"
    assert solution.rounding.codes.isfinite().all()
    assert solution.relative_error < 1


@pytest.mark.parametrize("strategy", ["pid", "grid"])
@pytest.mark.parametrize("name", ["marr-gptaq", "marr-rescomp", "marr-exact"])
def test_a_search_through_2_bit_feedback_ends_where_nothing_overflows(name: str, strategy: str):
    (x, x_float), weight = feeding_back(64), normal(OUTPUTS, 64, seed=3)
    spec = MethodSpec(name, alpha=AlphaSpec(strategy))
    solution = solve(weight, problem_of(x, x_float, spec, num_bits=2), spec)
    assert solution.rounding.codes.isfinite().all()
    assert solution.relative_error < 1


PIPELINE = pytest.mark.parametrize(
    "method",
    [
        "gptaq",
        pytest.param("marr-rescomp", marks=pytest.mark.slow),
        pytest.param("marr-stream,lowrank=srr:4", marks=pytest.mark.slow),
    ],
)


@torch.no_grad()
def measured(path: str, model: QuantizedModel, original: nn.Module, images: Tensor) -> float:
    """The square error of a linear's outputs between the two models."""
    outputs: list[Tensor] = []
    for module in (model.module, original):
        with module.get_submodule(path).register_forward_hook(
            lambda _, arguments, output: outputs.append(output.double())
        ):
            module(images)
    return float((outputs[0] - outputs[1]).square().sum())


@torch.no_grad()
def with_outlier(weight: float, bias: float) -> nn.Module:
    """A ViT in which a norm of the second block puts out one channel of another size."""
    model = vit()
    model.get_parameter("blocks.1.norm1.weight")[5] = weight
    model.get_parameter("blocks.1.norm1.bias")[5] = bias
    return model


@PIPELINE
@pytest.mark.parametrize(("weight", "bias"), [(0.0, 0.0), (0.0, 3.3), (1.0, 1e4), (1e4, 0.0)])
def test_a_channel_out_of_the_ordinary_leaves_the_error_measured_right(
    weight: float, bias: float, method: str
):
    images = noise(8)
    even = f"{method},token-weights=off"
    model = quantized(with_outlier(weight, bias), images, "W4A16", even)
    report = next(report for report in model.reports if report.path == "blocks.1.attn.qkv")
    error = measured(report.path, model, with_outlier(weight, bias), images)
    assert report.error == pytest.approx(error, rel=0.02)
    assert all(
        torch.tensor([report.error, report.relative_error, report.mse]).isfinite().all()
        for report in model.reports
    )


@PIPELINE
@torch.no_grad()
def test_a_linear_whose_inputs_no_image_changes_stays_in_floating_point(method: str):
    def constant() -> nn.Module:
        model = vit()
        model.get_parameter("blocks.1.norm1.weight").zero_()
        return model

    images = noise(8)
    model = quantized(constant(), images, "W2A8", method)
    assert not any(report.path.startswith("blocks.1.attn") for report in model.reports)
    assert type(model.module.get_submodule("blocks.1.attn.qkv")) is nn.Linear
    assert model.module(images).isfinite().all()


@PIPELINE
@torch.no_grad()
def test_two_images_are_enough_to_run(method: str):
    model = quantized(vit(), noise(2), "W3A8", method)
    assert model.module(noise(4, seed=1)).isfinite().all()
    assert all(report.error >= 0 for report in model.reports)


@PIPELINE
@torch.no_grad()
def test_images_that_are_all_the_same_are_enough_to_run(method: str):
    model = quantized(vit(), noise(1).repeat(6, 1, 1, 1), "W3A4", method)
    assert model.module(noise(4, seed=1)).isfinite().all()


@pytest.mark.parametrize(
    "parameter", ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"]
)
@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("rtn", float("nan")),
        ("stream", float("inf")),
        pytest.param("rtn", float("inf"), marks=pytest.mark.slow),
        pytest.param("stream", float("nan"), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_module(
    method: str, value: float, parameter: str
):
    model = vit()
    model.get_parameter(parameter)[3, 2] = value
    with pytest.raises(
        MarrqError,
        match=f"^{parameter.removesuffix('.weight')}: the weight has NaN or infinite values",
    ):
        quantized(model, noise(4), "W4A8", method)


@torch.no_grad()
def test_a_norm_that_is_not_finite_is_an_error_that_names_the_module_behind_it():
    model = vit()
    model.get_parameter("blocks.1.norm2.weight")[3] = torch.nan
    with pytest.raises(
        MarrqError, match=r"^blocks\.1\.mlp\.fc1: the inputs of the linear are not finite"
    ):
        quantized(model, noise(4), "W4A8", "marr")


@torch.no_grad()
def test_a_fallback_is_told_in_the_report():
    model = quantized(vit(), noise(4), "W2A4", "gptaq,alpha=global=1e39")
    for report in model.reports[1:]:  # nothing has drifted before the first
        assert report.fallback == "alpha 1e+39 gave non-finite weights, alpha 0 was used"
        assert report.alpha == 0
    for linear in quantized_linears(model.module).values():
        assert linear.weight.isfinite().all()
    assert model.module(noise(2)).isfinite().all()
