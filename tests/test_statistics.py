"""J, the factor and the sums against their definitions."""

import pytest
import torch

from marrq.errors import MarrqError
from marrq.statistics import Judge, ResidualStatistics, factorize


def streams(tokens: int = 50, inputs: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=torch.float64, generator=generator)
    return x, x + 0.1 * torch.randn(tokens, inputs, dtype=torch.float64, generator=generator)


def statistics(x: torch.Tensor, x_float: torch.Tensor) -> ResidualStatistics:
    return ResidualStatistics.zeros(x.shape[1], x.device).with_batch(x, x_float)


def test_sums_over_batches_and_halves_are_the_sums_over_all():
    x, x_float = streams()
    whole = statistics(x, x_float)
    parts = statistics(x[:20], x_float[:20]).with_batch(x[20:23], x_float[20:23]) + statistics(x[23:], x_float[23:])
    assert parts.tokens == whole.tokens == 50
    for name in ("hessian", "drift", "drift_power"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_j_from_statistics_is_the_square_error_of_the_outputs():
    x, x_float = streams()
    weight = torch.randn(5, 12, dtype=torch.float64)
    quantized = weight.mul(4).round().div(4)
    expected = (x @ quantized.T - x_float @ weight.T).square().sum().item()
    value, _ = Judge(statistics(x, x_float), weight)(quantized)
    assert value == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_j_is_what_autograd_finds():
    x, x_float = streams()
    weight = torch.randn(5, 12, dtype=torch.float64)
    quantized = (weight + 0.1 * torch.randn_like(weight)).requires_grad_()
    (x @ quantized.T - x_float @ weight.T).square().sum().backward()
    assert quantized.grad is not None
    _, half_gradient = Judge(statistics(x, x_float), weight)(quantized.detach())
    torch.testing.assert_close(2 * half_gradient, quantized.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_upper_and_gives_the_damped_inverse(act_order: bool):
    x, x_float = streams()
    hessian = statistics(x, x_float).hessian
    factor = factorize(hessian, 0.01, act_order)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64))[factor.order][:, factor.order]
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped), rtol=1e-9, atol=1e-12)
    assert factor.damping == 0.01
    if act_order:
        assert (hessian.diagonal()[factor.order].diff() <= 0).all()


def test_a_dead_input_is_left_out_of_all_compensation():
    x, x_float = streams()
    x[:, 4] = 0
    factor = factorize(statistics(x, x_float).hessian, 0.01, act_order=False)
    off_diagonal = factor.upper - torch.diag(factor.upper.diagonal())
    assert not off_diagonal[4].any()
    assert not off_diagonal[:, 4].any()


def test_a_singular_hessian_gets_the_damping_it_needs_and_says_so():
    x, x_float = streams(tokens=3)
    factor = factorize(statistics(x, x_float).hessian, 0.0, act_order=True)
    assert factor.damping > 0
    assert factor.upper.isfinite().all()


def test_inputs_that_are_all_zero_still_have_a_factor():
    assert factorize(torch.zeros(4, 4, dtype=torch.float64), 0.01, act_order=True).upper.isfinite().all()


def test_a_hessian_with_nan_is_an_error():
    with pytest.raises(MarrqError, match="not finite"):
        factorize(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.01, act_order=True)
