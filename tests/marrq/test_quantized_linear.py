"""A quantized linear computes what a slow reference computes from its integers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from marrq.quantizers.activations import ActivationQuantizer, RangeObserver
from marrq.quantizers.affine import search_weight_grid
from marrq.quantizers.linear import LowRank, QuantizedWeight, QuantLinear, StoredFactor
from marrq.schemes import ActivationSpec, Scheme, parse_scheme

ROWS, COLUMNS, TOKENS, RANK = 5, 32, 7, 2
BRANCHES = {
    "no branch": None,
    "float16": LowRank(
        StoredFactor(torch.linspace(-1, 1, ROWS * RANK).reshape(ROWS, RANK).half()),
        StoredFactor(torch.linspace(-1, 2, RANK * COLUMNS).reshape(RANK, COLUMNS).half()),
    ),
    "int8": LowRank(
        StoredFactor(
            torch.arange(ROWS * RANK).reshape(ROWS, RANK).to(torch.int8), torch.tensor([[0.1, 0.3]])
        ),
        StoredFactor(
            torch.arange(-32, 32).reshape(RANK, COLUMNS).to(torch.int8),
            torch.tensor([[0.01], [0.02]]),
        ),
    ),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized_weight(scheme: Scheme) -> QuantizedWeight:
    weight = normal(ROWS, COLUMNS, seed=0)
    grid = search_weight_grid(weight, scheme.weight)
    return QuantizedWeight.on_grid(scheme.weight, grid.spread(COLUMNS).quantize(weight), grid)


def quantizer(spec: ActivationSpec | None, x: Tensor, smoothed: bool) -> ActivationQuantizer | None:
    if spec is None:
        return None
    observer = RangeObserver(torch.linspace(0.5, 2, COLUMNS) if smoothed else None)
    observer.observe(x)
    return observer.quantizer(spec, normal(ROWS, COLUMNS, seed=0))


def reference_weight(weight: QuantizedWeight) -> NDArray[np.float64]:
    size = COLUMNS // weight.scale.shape[1]
    return np.array(
        [
            [
                (int(weight.codes[i, j]) - int(weight.zero_point[i, j // size]))
                * float(weight.scale[i, j // size])
                for j in range(COLUMNS)
            ]
            for i in range(ROWS)
        ]
    )


def reference_input(linear: QuantLinear, x: Tensor) -> NDArray[np.float64]:
    """What the linear multiplies with, token by token."""
    if linear.input is None:
        return x.numpy().astype(np.float64)
    factors = linear.input.smoothing
    tokens = []
    for token in x if factors is None else x * factors:
        if linear.input.spec.is_static:
            scale, zero = float(linear.input.scale), float(linear.input.zero_point)
        else:
            low = min(0.0, float(token.min() * linear.input.clip))
            high = max(0.0, float(token.max() * linear.input.clip))
            scale = (high - low) / (2**linear.input.spec.num_bits - 1)
            zero = np.round(-low / scale)
        codes = np.clip(
            np.round(token.numpy() / scale) + zero, 0, 2**linear.input.spec.num_bits - 1
        )
        tokens.append((codes - zero) * scale)
    return np.array(tokens)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("W4A16", "per-tensor"),
        ("W4A16-g16-sym", "per-tensor"),
        ("W2A8-mxint", "per-tensor"),
        ("W3A4-g8", "per-token"),
        ("W8A8", "per-tensor"),
    ],
)
def test_the_outputs_are_those_of_the_integers(
    text: str, strategy: str, smoothed: bool, branch: str
):
    scheme, x, bias = parse_scheme(text, strategy), normal(TOKENS, COLUMNS, seed=1), torch.ones(5)
    lowrank = BRANCHES[branch]
    weight = quantized_weight(scheme)
    linear = QuantLinear(weight, bias, quantizer(scheme.activation, x, smoothed), lowrank)
    read = reference_input(linear, x)
    expected = read @ reference_weight(weight).T + 1
    if lowrank is not None:
        left, right = (factor.values.numpy() for factor in (lowrank.left, lowrank.right))
        expected += read @ right.T.astype(np.float64) @ left.T
    np.testing.assert_allclose(linear(x).numpy(), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(linear.weight.numpy(), reference_weight(weight), rtol=1e-6)


def test_a_state_dict_holds_the_parts_that_are_there_and_nothing_else():
    weight = quantized_weight(parse_scheme("W4A16"))
    assert [*QuantLinear(weight, None, None).state_dict()] == ["codes", "scale", "zero_point"]
    with_branch = QuantLinear(weight, torch.ones(5), None, BRANCHES["int8"])
    assert {*with_branch.state_dict()} == {
        *("codes", "scale", "zero_point", "bias"),
        *("lowrank_left", "lowrank_left_scale", "lowrank_right", "lowrank_right_scale"),
    }


def test_the_parts_follow_the_module_to_another_type():
    module = nn.ModuleDict({"fc": QuantLinear(quantized_weight(parse_scheme("W4A16")), None, None)})
    linear = module.double()["fc"]
    assert isinstance(linear, QuantLinear)
    assert linear.quantized_weight.codes.dtype == torch.int8
    assert linear.weight.dtype == torch.float64
