"""Schemes parse to and print from their short form."""

import pytest
import torch
from torch import nn

from marrq.errors import MarrqError
from marrq.methods.lowrank import input_scaling, refit
from marrq.methods.lowrank_spec import LowRankSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.affine import search_weight_grid
from marrq.quantizers.linear import QuantizedWeight, QuantLinear, bits_per_weight
from marrq.schemes import (
    ACTIVATION_BITS,
    FLOAT_BITS,
    WEIGHT_BITS,
    ActivationSpec,
    Scheme,
    WeightSpec,
    parse_scheme,
)

SUFFIXES = [
    "",
    "-sym",
    "-g128",
    "-g64-sym",
    "-g1",
    "-mxint",
    "-e8",
    "-g128-e8",
    "-sym-e8",
    "-mxint-e8",
]


@pytest.mark.parametrize("weight", WEIGHT_BITS)
@pytest.mark.parametrize("activation", [*ACTIVATION_BITS, FLOAT_BITS])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_scheme_prints_what_it_was_parsed_from(weight: int, activation: int, suffix: str):
    text = f"W{weight}A{activation}{suffix}"
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert scheme.weight.num_bits == weight
    assert (scheme.activation is None) == (activation == FLOAT_BITS)
    assert scheme.outer_layers == text.endswith("-e8")


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A8", Scheme(WeightSpec(4), ActivationSpec(8))),
        ("W4A16-g128", Scheme(WeightSpec(4, 128), None)),
        (
            "W4A8-sym",
            Scheme(WeightSpec(4, None, "symmetric"), ActivationSpec(8, symmetric=True)),
        ),
        ("W4A16-g64-sym", Scheme(WeightSpec(4, 64, "symmetric"), None)),
        ("W4A16-mxint", Scheme(WeightSpec(4, 32, "mxint"), None)),
        ("W4A8-e8", Scheme(WeightSpec(4), ActivationSpec(8), outer_layers=True)),
    ],
)
def test_a_scheme_says_how_the_grids_are_laid(text: str, scheme: Scheme):
    assert parse_scheme(text) == scheme
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    [
        "W5A7",
        "W4",
        "w4a8",
        "W4A8 ",
        "W44A8",
        "A8W4",
        "",
        "W4A8-g0",
        "W4A8-g",
        "W4A8-sym-g64",
        "W4A8-g64-mxint",
        "W4A8-asym",
        "W4A8-g-64",
        "W4A8-e4",
        "W4A8-e8-sym",
    ],
)
def test_an_unknown_scheme_is_refused_by_name(text: str):
    with pytest.raises(MarrqError, match=f"unknown scheme '{text}'"):
        parse_scheme(text)


def test_a_scheme_may_name_its_activations_if_there_are_any():
    assert parse_scheme("W4A8:per-token") == parse_scheme("W4A8", "per-token")
    assert parse_scheme("W4A8:per-tensor") == parse_scheme("W4A8")
    with pytest.raises(MarrqError, match="must be one of per-tensor, per-token: got 'per-row'"):
        parse_scheme("W4A8:per-row")
    with pytest.raises(MarrqError, match="W4A8:per-tensor and --activations per-token differ"):
        parse_scheme("W4A8:per-tensor", "per-token")
    for given in (("W4A16", "per-token"), ("W4A16:per-token",)):
        with pytest.raises(MarrqError, match="stay in float, so nothing can be per-token: leave"):
            parse_scheme(*given)


def test_code_ranges_are_those_of_the_onnx_types():
    assert WeightSpec(2).code_range == (-2, 1)
    assert WeightSpec(4).code_range == (-8, 7)
    assert WeightSpec(8).code_range == (-128, 127)
    assert WeightSpec(8, reduce_range=True).code_range == (-64, 63)
    assert ActivationSpec(4).code_range == (0, 15)
    assert ActivationSpec(8).code_range == (0, 255)
    assert ActivationSpec(4, symmetric=True).code_range == (-8, 7)
    assert ActivationSpec(8, symmetric=True).code_range == (-128, 127)


def test_symmetric_means_that_no_zero_point_is_stored():
    scheme = parse_scheme("W8A8-sym-e8")
    for numbers in (scheme, scheme.of_outer_layers):
        assert numbers.weight.grid == "symmetric"
        assert numbers.activation is not None
        assert numbers.activation.symmetric
    # Zero points of tokens are found at run time.
    tokens = parse_scheme("W8A8-sym", "per-token")
    assert tokens.activation == ActivationSpec(8, "per-token")
    assert str(tokens) == "W8A8-sym"
    with pytest.raises(MarrqError, match="per-token activations find their zero point at run time"):
        ActivationSpec(8, "per-token", symmetric=True)


@pytest.mark.parametrize(
    "text", ["W2A4", "W3A8", "W4A8", "W8A8", "W8A3", "W8A8-g64-sym", "W8A8-mxint"]
)
def test_no_two_products_of_a_scheme_s_codes_leave_sixteen_bits(text: str):
    scheme = parse_scheme(text)
    assert scheme.activation is not None
    for numbers in (scheme, scheme.of_outer_layers):
        largest = max(map(abs, numbers.weight.code_range))
        assert 2 * 255 * largest <= 2**15 - 1


def test_weights_keep_all_eight_bits_where_activations_are_float():
    assert parse_scheme("W8A16-e8").weight.code_range == (-128, 127)
    assert parse_scheme("W4A16-e8").of_outer_layers.weight.code_range == (-128, 127)
    with pytest.raises(MarrqError, match="only 8-bit codes have a range to reduce: got 4 bits"):
        WeightSpec(4, reduce_range=True)


@pytest.mark.parametrize("text", ["W4A8", "W4A16"])
def test_an_unknown_activation_strategy_is_refused(text: str):
    with pytest.raises(MarrqError, match="per-row"):
        parse_scheme(text, "per-row")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ((5,), "weight bits must be one of"),
        ((4, None, "log"), "a weight grid must be one of .*: got 'log'"),
        ((4, 64, "mxint"), "mxint has blocks of 32 inputs: got group size 64"),
        ((4, None, "mxint"), "mxint has blocks of 32 inputs: got group size None"),
    ],
)
def test_a_weight_grid_that_does_not_exist_is_refused(wrong: tuple, reason: str):
    with pytest.raises(MarrqError, match=reason):
        WeightSpec(*wrong)


def quant_linear(text: str, lowrank: LowRankSpec | None = None) -> QuantLinear:
    spec, weight = (
        parse_scheme(text).weight,
        torch.randn(48, 64, generator=torch.Generator().manual_seed(0)),
    )
    grid = search_weight_grid(weight, spec)
    codes = grid.spread(64).quantize(weight)
    branch = None
    if lowrank is not None:
        statistics = ResidualStatistics.zeros(64, weight.device)
        statistics.add(weight, weight)
        branch = refit(weight, input_scaling(statistics, lowrank.kind), lowrank)
    return QuantLinear(QuantizedWeight.on_grid(spec, codes, grid), None, None, branch)


# Beside the codes: 32 bits of scale and 8 of zero point for each row or group; no zero points where
# all are 0; 8-bit scales for mxint.
BITS = {
    "W4A16": 4 + 40 / 64,
    "W4A16-sym": 4 + 32 / 64,
    "W4A16-g16": 4 + 40 / 16,
    "W2A8-g32-sym": 2 + 32 / 32,
    "W4A16-mxint": 4 + 8 / 32,
    "W3A16-mxint": 3 + 8 / 32,
}


@pytest.mark.parametrize("text", BITS)
def test_the_bits_of_a_weight_count_everything_that_is_stored_for_it(text: str):
    assert bits_per_weight(nn.ModuleDict({"fc": quant_linear(text)})) == pytest.approx(BITS[text])


@pytest.mark.parametrize(
    ("num_bits", "bits"), [(16, 16 * 4 * (48 + 64)), (8, 8 * 4 * (48 + 64) + 2 * 4 * 32)]
)
def test_the_bits_of_a_weight_count_its_low_rank_branch(num_bits: int, bits: int):
    linear = quant_linear("W4A16", LowRankSpec("qera", 4, num_bits))
    assert bits_per_weight(linear) == pytest.approx(BITS["W4A16"] + bits / (48 * 64))


def test_the_bits_of_a_model_are_those_of_its_linears_together():
    first, second = quant_linear("W2A8-g16"), quant_linear("W8A8")
    both = bits_per_weight(nn.ModuleDict({"a": first, "b": second, "c": nn.Linear(9, 9)}))
    assert both == pytest.approx((bits_per_weight(first) + bits_per_weight(second)) / 2)
