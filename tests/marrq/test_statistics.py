"""The sums, J and the factor against their definitions."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.exact_sums import TokenWeights
from marrq.methods.factor import factorize
from marrq.methods.objective import ReconstructionLoss
from marrq.methods.statistics import ResidualStatistics

TOKENS, INPUTS, OUTPUTS = 50, 12, 5
IMPORTANCE = torch.linspace(0.5, 2, OUTPUTS, dtype=torch.float64)
SumsOf = Callable[[Tensor, Tensor], ResidualStatistics]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def streams(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """x, x̃ and e, none with a mean of 0."""
    x = normal(tokens, INPUTS, seed=0) + normal(INPUTS, seed=1)
    x_float = x + 0.1 * normal(tokens, INPUTS, seed=2) + 0.2 * normal(INPUTS, seed=3)
    return x, x_float, 0.3 * normal(tokens, OUTPUTS, seed=4) + 0.1


def of_inputs(x: Tensor, x_float: Tensor) -> ResidualStatistics:
    sums = ResidualStatistics.zeros(x.shape[1], x.device)
    sums.add(x, x_float - x)
    return sums


def of_outputs(x: Tensor, shortfall: Tensor) -> ResidualStatistics:
    sums = ResidualStatistics.zeros(x.shape[1], x.device, IMPORTANCE)
    sums.add(x, shortfall)
    return sums


def assert_same(one: ResidualStatistics, other: ResidualStatistics) -> None:
    assert one.tokens == other.tokens
    for mine, theirs in (one, other), (one.drift, other.drift):
        for field in fields(mine):
            if isinstance(getattr(mine, field.name), Tensor):
                torch.testing.assert_close(
                    getattr(mine, field.name), getattr(theirs, field.name), rtol=1e-10, atol=1e-10
                )


def test_the_sums_are_those_of_the_definition():
    x, x_float, shortfall = streams()
    dx = x_float - x
    for sums, drift, power in (
        (of_inputs(x, x_float), dx, dx.T @ dx),
        (of_outputs(x, shortfall), shortfall, shortfall.square().sum(0)),
    ):
        torch.testing.assert_close(sums.hessian, x.T @ x)
        torch.testing.assert_close(sums.input_sum, x.sum(0))
        torch.testing.assert_close(sums.drift.moment, drift.T @ x)
        torch.testing.assert_close(sums.drift.power, power)
        torch.testing.assert_close(sums.drift.sum, drift.sum(0))
        assert sums.tokens == TOKENS


WEIGHTS = torch.tensor([9.5, 0.25, 1.0, 0.125, 2.0], dtype=torch.float64)
"""Of the tokens of an image; their sum is not their number."""


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("sums_of", [of_inputs, of_outputs])
def test_weighted_sums_are_the_sums_that_numpy_takes_token_by_token(sums_of: SumsOf, mean: float):
    x, x_float, shortfall = (part + mean for part in streams())
    drift = x_float - x if sums_of is of_inputs else shortfall - mean
    importance = None if sums_of is of_inputs else IMPORTANCE
    sums = ResidualStatistics.zeros(INPUTS, x.device, importance)
    # Two batches, of 4 and of 6 images.
    for images, part in ((4, slice(0, 20)), (6, slice(20, 50))):
        weights = TokenWeights.of_images(WEIGHTS, images, x)
        sums.add(x[part], drift[part], weights)
    w = np.tile(WEIGHTS.numpy(), 10)
    rows, drifts = x.numpy(), drift.numpy()
    total = w.sum()
    assert sums.tokens == total
    np.testing.assert_allclose(sums.hessian.numpy(), (rows.T * w) @ rows, rtol=1e-9)
    np.testing.assert_allclose(sums.drift.sum.numpy(), w @ drifts, rtol=1e-8)
    # The centred sums, with weighted means.
    rows, drifts = rows - w @ rows / total, drifts - w @ drifts / total
    sums.centre_()
    for found, expected in (
        (sums.hessian, (rows.T * w) @ rows),
        (sums.drift.moment, (drifts.T * w) @ rows),
        (
            sums.drift.power,
            (drifts.T * w) @ drifts if sums_of is of_inputs else w @ drifts**2,
        ),
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6 * scale)


@pytest.mark.parametrize("sums_of", [of_inputs, of_outputs])
def test_sums_over_batches_and_halves_are_the_sums_over_all(sums_of: SumsOf):
    x, x_float, shortfall = streams()
    drift = x_float if sums_of is of_inputs else shortfall
    first, second, third = (
        sums_of(x[part], drift[part]) for part in (slice(20), slice(20, 23), slice(23, None))
    )
    assert_same(first + second + third, sums_of(x, drift))


@pytest.mark.parametrize("sums_of", [of_inputs, of_outputs])
def test_centred_sums_are_the_sums_of_centred_tokens_but_for_those_of_the_tokens_themselves(
    sums_of: SumsOf,
):
    x, x_float, shortfall = streams()
    drift = x_float if sums_of is of_inputs else shortfall
    sums, expected = sums_of(x, drift), sums_of(x - x.mean(0), drift - drift.mean(0))
    expected.input_sum, expected.drift.sum = sums.input_sum, sums.drift.sum
    assert_same(sums.centre_(), expected)


@pytest.mark.parametrize("mean", [1.0, 1e2, 1e4])
def test_centred_sums_of_float32_tokens_survive_a_mean_far_above_the_deviation(mean: float):
    x, x_float, shortfall = (tokens.float() for tokens in streams(2000))
    x[:, 3], x_float[:, 3] = x[:, 3] + mean, x_float[:, 3] + 1.5 * mean
    for sums_of, drift in (of_inputs, x_float), (of_outputs, shortfall):
        exact, sums = sums_of(x.double(), drift.double()).centre_(), sums_of(x, drift).centre_()
        torch.testing.assert_close(sums.hessian, exact.hessian, rtol=1e-3, atol=1e-4 * TOKENS)
        torch.testing.assert_close(
            sums.drift.moment, exact.drift.moment, rtol=1e-3, atol=1e-3 * TOKENS
        )


def test_a_constant_input_is_dead_in_centred_sums():
    x, x_float, shortfall = (tokens.float() for tokens in streams())
    x[:, 4] = 3.3
    for sums in of_inputs(x, x_float).centre_(), of_outputs(x, shortfall).centre_():
        assert not sums.hessian[4].any()
        assert not sums.hessian[:, 4].any()
        assert not sums.drift.moment[:, 4].any()
        assert sums.drift.moment[4, [3, 5]].all()
        assert (sums.hessian.diagonal() > 1).sum() == INPUTS - 1


@pytest.mark.parametrize("with_output", [True, False])
def test_the_output_shift_makes_the_mean_error_of_the_outputs_zero(with_output: bool):
    x, x_float, shortfall = streams()
    weight, quantized = normal(OUTPUTS, INPUTS, seed=5), normal(OUTPUTS, INPUTS, seed=6)
    wanted = x @ weight.T + shortfall if with_output else x_float @ weight.T
    sums = of_outputs(x, shortfall) if with_output else of_inputs(x, x_float)
    mean = (x @ quantized.T + sums.output_shift(weight, quantized) - wanted).mean(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    assert (x @ quantized.T - wanted).mean(0).abs().min() > 1e-3


def error_of(
    tokens: tuple[Tensor, Tensor, Tensor], weight: Tensor, quantized: Tensor, with_output: bool
) -> Tensor:
    """J from the tokens."""
    x, x_float, shortfall = tokens
    if with_output:
        return ((x @ quantized.T - x @ weight.T - shortfall).square() * IMPORTANCE).sum()
    return (x @ quantized.T - x_float @ weight.T).square().sum()


@pytest.mark.parametrize("with_output", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_j_from_statistics_is_the_square_error_of_the_outputs(centre: bool, with_output: bool):
    x, x_float, shortfall = streams()
    weight = normal(OUTPUTS, INPUTS, seed=5)
    quantized = weight.mul(4).round().div(4)
    sums = of_outputs(x, shortfall) if with_output else of_inputs(x, x_float)
    tokens = (x, x_float, shortfall)
    if centre:
        sums, tokens = sums.centre_(), tuple(part - part.mean(0) for part in tokens)
    value, _ = ReconstructionLoss(sums, weight)(quantized)
    assert value == pytest.approx(float(error_of(tokens, weight, quantized, with_output)), rel=1e-9)


@pytest.mark.parametrize("with_output", [True, False])
def test_the_output_power_is_j_of_a_weight_of_zeros(with_output: bool):
    x, x_float, shortfall = streams()
    weight = normal(OUTPUTS, INPUTS, seed=5)
    loss = ReconstructionLoss(
        of_outputs(x, shortfall) if with_output else of_inputs(x, x_float), weight
    )
    expected = error_of((x, x_float, shortfall), weight, torch.zeros_like(weight), with_output)
    assert loss.output_power == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("with_output", [True, False])
def test_the_gradient_of_j_is_what_autograd_finds(with_output: bool):
    tokens = streams()
    weight = normal(OUTPUTS, INPUTS, seed=5)
    quantized = (weight + 0.1 * normal(OUTPUTS, INPUTS, seed=6)).requires_grad_()
    error_of(tokens, weight, quantized, with_output).backward()
    loss = ReconstructionLoss(
        of_outputs(tokens[0], tokens[2]) if with_output else of_inputs(*tokens[:2]), weight
    )
    _, half_gradient = loss(quantized.detach())
    torch.testing.assert_close(2 * half_gradient, quantized.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_upper_and_gives_the_damped_inverse(act_order: bool):
    x, x_float, _ = streams()
    hessian = of_inputs(x, x_float).hessian
    factor = factorize(hessian, 0.01, act_order)
    identity = torch.eye(INPUTS, dtype=torch.float64)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * identity)[factor.order][:, factor.order]
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(
        factor.upper.T @ factor.upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12
    )
    assert factor.damping == 0.01
    if act_order:
        assert (hessian.diagonal()[factor.order].diff() <= 0).all()
    else:
        assert torch.equal(factor.order, torch.arange(INPUTS))


def test_a_dead_input_is_left_out_of_all_compensation():
    x, x_float, _ = streams()
    x[:, 4] = 0
    factor = factorize(of_inputs(x, x_float).hessian, 0.01, act_order=False)
    off_diagonal = factor.upper - torch.diag(factor.upper.diagonal())
    assert not off_diagonal[4].any()
    assert not off_diagonal[:, 4].any()


def test_a_singular_hessian_gets_the_damping_it_needs_and_says_so():
    x, x_float, _ = streams(tokens=3)
    factor = factorize(of_inputs(x, x_float).hessian, 0.0, act_order=True)
    assert factor.damping > 0
    assert factor.upper.isfinite().all()


def test_inputs_that_are_all_zero_still_have_a_factor():
    assert (
        factorize(torch.zeros(4, 4, dtype=torch.float64), 0.01, act_order=True)
        .upper.isfinite()
        .all()
    )


def test_a_matrix_that_no_damping_mends_is_an_error():
    indefinite = torch.tensor([[1.0, 1e20], [1e20, 1.0]], dtype=torch.float64)
    with pytest.raises(MarrqError, match=r"cannot be factored even with damping 1e\+\d+"):
        factorize(indefinite, 0.01, act_order=True)


def test_a_hessian_with_nan_is_an_error():
    with pytest.raises(MarrqError, match="not finite"):
        factorize(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.01, act_order=True)
