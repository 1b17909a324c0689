"""Schemes parse to and print from their short form."""

import pytest

from marrq.errors import MarrqError
from marrq.schemes import ACTIVATION_BITS, FLOAT_BITS, WEIGHT_BITS, ActivationSpec, WeightSpec, parse_scheme


@pytest.mark.parametrize("weight", WEIGHT_BITS)
@pytest.mark.parametrize("activation", [*ACTIVATION_BITS, FLOAT_BITS])
def test_every_scheme_prints_what_it_was_parsed_from(weight: int, activation: int):
    text = f"W{weight}A{activation}"
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert scheme.weight.num_bits == weight
    assert (scheme.activation is None) == (activation == FLOAT_BITS)


@pytest.mark.parametrize("text", ["W5A7", "W4", "w4a8", "W4A8 ", "W44A8", "A8W4", ""])
def test_an_unknown_scheme_is_refused_by_name(text: str):
    with pytest.raises(MarrqError, match=f"unknown scheme '{text}'"):
        parse_scheme(text)


def test_code_ranges_are_those_of_the_onnx_types():
    assert WeightSpec(2).code_range == (-2, 1)
    assert WeightSpec(4).code_range == (-8, 7)
    assert WeightSpec(8).code_range == (-128, 127)
    assert ActivationSpec(4).code_range == (0, 15)
    assert ActivationSpec(8).code_range == (0, 255)


def test_an_unknown_activation_strategy_is_refused():
    with pytest.raises(MarrqError, match="per-row"):
        parse_scheme("W4A8", "per-row")  # type: ignore[arg-type]
