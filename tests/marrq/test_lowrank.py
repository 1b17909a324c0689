"""The low-rank branch against its definition in NumPy, its optimality, what storing it costs, and
the inputs that break naive code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.lowrank import (
    NOISE_SEED,
    Scaling,
    input_scaling,
    preserved,
    refit,
    split,
)
from marrq.methods.lowrank_spec import LowRankKind, LowRankSpec, parse_lowrank
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.linear import LowRank

SHAPES = [(24, 40), (40, 24), (24, 24), (7, 3)]
KINDS: list[LowRankKind] = ["srr", "qera", "lqer"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def inputs(count: int, tokens: int = 400) -> Tensor:
    """[tokens, count], correlated and of uneven size."""
    return normal(tokens, count, seed=1) @ (
        normal(count, count, seed=2) + torch.linspace(0.2, 4, count).diag()
    )


def statistics(x: Tensor) -> ResidualStatistics:
    return of_hessian(x.T @ x, len(x))


def of_hessian(hessian: Tensor, tokens: int) -> ResidualStatistics:
    return replace(
        ResidualStatistics.zeros(len(hessian), hessian.device), hessian=hessian, tokens=tokens
    )


def round_to_quarter(weight: Tensor) -> Tensor:
    return weight.mul(4).round().div(4)


def output_error(residual: Tensor, low_rank: LowRank | Tensor, x: Tensor) -> float:
    product = low_rank.product if isinstance(low_rank, LowRank) else low_rank
    return float((x @ (residual - product).T).square().sum())


def reference_root(x: Tensor, kind: LowRankKind) -> np.ndarray:
    """The S of the papers, symmetric."""
    second_moments = x.numpy().T @ x.numpy() / len(x)
    if kind == "lqer":
        return np.diag(np.sqrt(np.diag(second_moments)))
    values, vectors = np.linalg.eigh(second_moments)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def reference_truncation(weight: Tensor, root: np.ndarray, rank: int) -> np.ndarray:
    """SVD_r(W Sᵀ) S⁻ᵀ, step by step."""
    u, sigma, vt = np.linalg.svd(weight.numpy() @ root.T, full_matrices=False)
    return u[:, :rank] @ np.diag(sigma[:rank]) @ vt[:rank] @ np.linalg.inv(root.T)


def reference_split(weight: Tensor, noise: Tensor, root: np.ndarray, rank: int) -> int:
    def unexplained(matrix: np.ndarray, p: int) -> float:
        sigma = np.linalg.svd(matrix, compute_uv=False)
        return 1 - (sigma[:p] ** 2).sum() / (matrix**2).sum()

    products = [
        unexplained(weight.numpy() @ root.T, k) * unexplained(noise.numpy() @ root.T, rank - k)
        for k in range(rank + 1)
    ]
    return int(np.argmin(products))


def spiked(out_features: int, in_features: int, spikes: int) -> Tensor:
    """A weight with some large singular values among others like those of noise."""
    low_rank = normal(out_features, spikes, seed=5) @ normal(spikes, in_features, seed=6)
    return normal(out_features, in_features) + 10 * low_rank


def flat_weight(scaling: Scaling) -> Tensor:
    """[24, 40], all of whose singular values are 1 under the scaling."""
    return torch.linalg.solve_triangular(
        scaling.transposed, torch.linalg.qr(normal(40, 40)).Q[:24], upper=False, left=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_refit_is_the_truncated_svd_of_the_scaled_residual(
    out_features: int, in_features: int, kind: LowRankKind
):
    x, weight = inputs(in_features), normal(out_features, in_features)
    residual = weight - round_to_quarter(weight)
    expected = reference_truncation(residual, reference_root(x, kind), 3)
    low_rank = refit(residual, input_scaling(statistics(x), kind), LowRankSpec(kind, 3))
    assert (low_rank.left.codes.shape, low_rank.right.codes.shape) == (
        (out_features, 3),
        (3, in_features),
    )
    assert np.abs(low_rank.product.numpy() - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("spikes", [0, 1, 2, 4, 12])
def test_srr_preserves_as_many_ranks_and_the_same_product_as_its_definition(
    out_features: int, in_features: int, spikes: int
):
    x, weight = inputs(in_features), spiked(out_features, in_features, spikes)
    rank, root = min(out_features, in_features) // 2, reference_root(x, "srr")
    noise = (
        torch.rand(out_features, in_features, dtype=torch.float64, generator=generator(NOISE_SEED))
        * 2
        - 1
    )
    kept, k = preserved(weight, input_scaling(statistics(x), "srr"), LowRankSpec("srr", rank))
    assert k == reference_split(weight, noise, root, rank)
    np.testing.assert_allclose(kept.numpy(), reference_truncation(weight, root, k), atol=1e-4)


def test_the_split_lies_between_none_for_a_flat_spectrum_and_all_for_a_weight_of_that_rank():
    x = inputs(40)
    scaling = input_scaling(statistics(x), "srr")
    flat = flat_weight(scaling)
    assert split(flat, scaling, 8) == 0
    assert 0 < split(spiked(24, 40, 2), scaling, 8) < 8
    assert split(normal(24, 8) @ normal(8, 40), scaling, 8) == 8


def test_srr_that_preserves_nothing_is_qera():
    x = inputs(40)
    scaling = input_scaling(statistics(x), "srr")
    flat = flat_weight(scaling)
    branches = []
    for spec in (LowRankSpec("srr", 8), LowRankSpec("qera", 8)):
        scaling = input_scaling(statistics(x), spec.kind)
        kept, k = preserved(flat, scaling, spec)
        assert k == 0
        assert not kept.any()
        branches.append(refit(flat - round_to_quarter(flat - kept), scaling, spec))
    assert torch.equal(branches[0].product, branches[1].product)


@pytest.mark.parametrize("kind", ["qera", "lqer"])
def test_qera_and_lqer_quantize_the_whole_weight(kind: LowRankKind):
    weight = spiked(24, 40, 2)
    kept, k = preserved(weight, input_scaling(statistics(inputs(40)), kind), LowRankSpec(kind, 8))
    assert k == 0
    assert torch.equal(kept, torch.zeros_like(weight))


def test_refitting_all_ranks_is_never_worse_than_keeping_what_was_preserved():
    x, weight = inputs(40), spiked(24, 40, 2)
    spec, scaling = LowRankSpec("srr", 8), input_scaling(statistics(x), "srr")
    kept, k = preserved(weight, scaling, spec)
    assert 0 < k < 8
    residual = weight - round_to_quarter(weight - kept)
    in_two_parts = kept + refit(residual - kept, scaling, LowRankSpec("srr", 8 - k)).product
    assert output_error(residual, refit(residual, scaling, spec), x) <= output_error(
        residual, in_two_parts, x
    )


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES[:3])
def test_no_branch_near_by_and_no_plain_svd_beats_the_exact_one_on_the_outputs(
    out_features: int, in_features: int
):
    x, residual = inputs(in_features), normal(out_features, in_features)
    low_rank = refit(residual, input_scaling(statistics(x), "qera"), LowRankSpec("qera", 4))
    least = output_error(residual, low_rank, x)
    plain = torch.from_numpy(reference_truncation(residual, np.eye(in_features), 4))
    assert least < output_error(residual, plain, x)
    left, right = low_rank.left.values, low_rank.right.values
    for seed in range(50):
        size = 10.0 ** -(seed % 3)
        near_by = (left + size * normal(*left.shape, seed=seed)) @ (
            right + size * normal(*right.shape, seed=seed + 99)
        )
        assert least < output_error(residual, near_by, x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_exact_scaling_is_never_worse_on_the_outputs_than_diagonal(
    out_features: int, in_features: int, seed: int
):
    x, residual = inputs(in_features), normal(out_features, in_features, seed=seed)
    qera, lqer = (
        refit(residual, input_scaling(statistics(x), kind), LowRankSpec(kind, 2))
        for kind in ("qera", "lqer")
    )
    assert output_error(residual, qera, x) <= output_error(residual, lqer, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_bits", "tolerance"), [(16, 1e-3), (8, 3e-2)])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_full_rank_gives_the_residual_back(
    out_features: int, in_features: int, num_bits: int, tolerance: float, kind: LowRankKind
):
    residual = normal(out_features, in_features)
    spec = LowRankSpec(kind, min(out_features, in_features), num_bits)
    product = refit(residual, input_scaling(statistics(inputs(in_features)), kind), spec).product
    assert (product - residual).norm() < tolerance * residual.norm()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_stored_factors_are_off_by_half_a_step_at_most_whatever_the_size_of_the_weight(size: float):
    residual, scaling = size * normal(24, 40), input_scaling(statistics(inputs(40)), "qera")
    half, byte = (refit(residual, scaling, LowRankSpec("qera", 6, bits)) for bits in (16, 8))
    exact = reference_truncation(residual, reference_root(inputs(40), "qera"), 6)
    assert np.linalg.norm(half.product.numpy() - exact) < 2**-10 * np.linalg.norm(exact)
    for sixteen, eight in ((half.left, byte.left), (half.right, byte.right)):
        assert eight.scale is not None
        # float16 itself is off by 2⁻¹¹ of a value that is 127 steps long at most
        assert (
            (eight.values - sixteen.values).abs() <= eight.scale * (0.5 + 127 * 2**-11 + 1e-3)
        ).all()


def test_the_components_of_both_factors_have_one_norm():
    low_rank = refit(
        1e-4 * normal(24, 40), input_scaling(statistics(inputs(40)), "qera"), LowRankSpec("qera", 6)
    )
    torch.testing.assert_close(
        low_rank.left.values.norm(dim=0), low_rank.right.values.norm(dim=1), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("num_bits", [8, 16])
def test_the_stored_bits_are_those_of_the_stored_tensors(num_bits: int):
    spec = LowRankSpec("qera", 6, num_bits)
    low_rank = refit(normal(24, 40), input_scaling(statistics(inputs(40)), "qera"), spec)
    tensors = [
        t
        for factor in (low_rank.left, low_rank.right)
        for t in (factor.codes, factor.scale)
        if t is not None
    ]
    assert (
        low_rank.stored_bits
        == sum(8 * t.nbytes for t in tensors)
        == {16: 16 * 6 * 64, 8: 8 * 6 * 64 + 32 * 12}[num_bits]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bits", [8, 16])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_dead_inputs_few_tokens_and_zero_weights_give_finite_branches(
    out_features: int, in_features: int, num_bits: int, kind: LowRankKind
):
    some_dead = inputs(in_features)
    some_dead[:, :2] = 0
    spec = LowRankSpec(kind, 2, num_bits)
    for x in (some_dead, inputs(in_features)[:1], torch.zeros(5, in_features, dtype=torch.float64)):
        scaling = input_scaling(statistics(x), kind)
        for weight in (normal(out_features, in_features), torch.zeros(out_features, in_features)):
            kept, _ = preserved(weight, scaling, spec)
            assert torch.isfinite(kept).all()
            product = refit(weight, scaling, spec).product
            assert torch.isfinite(product).all()
            assert product.any() == weight.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_input_changes_nothing_for_the_others(kind: LowRankKind):
    x, weight = inputs(24), normal(40, 24)
    x[:, 5] = 0
    alive = [i for i in range(24) if i != 5]
    spec = LowRankSpec(kind, 4)
    with_dead = refit(weight, input_scaling(statistics(x), kind), spec).product[:, alive]
    without = refit(weight[:, alive], input_scaling(statistics(x[:, alive]), kind), spec).product
    torch.testing.assert_close(with_dead, without, rtol=0, atol=2e-3)


def test_a_singular_hessian_gets_the_least_damping_that_works_and_says_so():
    x = inputs(40)
    assert input_scaling(statistics(x), "lqer").damping == 0
    assert input_scaling(statistics(x), "qera").damping == 1e-6
    indefinite = of_hessian(statistics(x[:10]).hessian - 1e-2 * torch.eye(40), 10)
    scaling = input_scaling(indefinite, "qera")
    assert 1e-6 < scaling.damping < 1
    mean = indefinite.hessian.diagonal().mean()
    damped = indefinite.hessian + scaling.damping * mean * torch.eye(40)
    torch.testing.assert_close(scaling.transposed @ scaling.transposed.T, damped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_diagonal_that_rounding_took_below_zero_is_a_dead_input(kind: LowRankKind):
    x = inputs(40)
    x[:, 7] = 0
    dead, below = statistics(x), statistics(x).hessian
    below[7, 7] = -1e-12
    spec, weight = LowRankSpec(kind, 8), normal(24, 40)
    products = [
        refit(weight, input_scaling(s, kind), spec).product
        for s in (dead, of_hessian(below, len(x)))
    ]
    torch.testing.assert_close(*products)


def test_the_branch_depends_on_the_statistics_up_to_a_factor_alone():
    x, weight = inputs(40), normal(24, 40)
    once, twice = (input_scaling(s, "srr") for s in (statistics(x), statistics(x) + statistics(x)))
    assert split(weight, once, 8) == split(weight, twice, 8)
    spec = LowRankSpec("srr", 8)
    torch.testing.assert_close(
        refit(weight, once, spec).product, refit(weight, twice, spec).product, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_finite_are_refused(kind: LowRankKind):
    x = inputs(8)
    x[3, 2] = torch.nan
    with pytest.raises(MarrqError, match="not finite"):
        input_scaling(statistics(x), kind)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_rank_larger_than_the_weight_has_is_refused(shape: tuple[int, int]):
    scaling, spec = Scaling(torch.eye(shape[1], dtype=torch.float64), 0.0), LowRankSpec("srr", 25)
    message = rf"srr:25 is larger than a weight of {shape[0]} × {shape[1]} can have: use 24 or less"
    with pytest.raises(MarrqError, match=message):
        preserved(normal(*shape), scaling, spec)
    with pytest.raises(MarrqError, match=message):
        refit(normal(*shape), scaling, spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bits", [8, 16])
def test_a_spec_is_read_back_from_its_text(kind: LowRankKind, num_bits: int):
    spec = LowRankSpec(kind, 32, num_bits)
    assert parse_lowrank(str(spec)) == spec
    assert str(parse_lowrank(f"{kind}:32:int8")) == f"{kind}:32:int8"
    assert str(parse_lowrank(f"{kind}:32:fp16")) == str(parse_lowrank(f"{kind}:32")) == f"{kind}:32"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "srr",
        "srr:",
        ":32",
        "srr:-1",
        "srr:0",
        "srr:4.5",
        "svd:32",
        "srr:32:int4",
        "srr:32:",
        "srr:32:int8:x",
        "SRR:8",
    ],
)
def test_text_that_is_no_spec_is_refused(text: str):
    with pytest.raises(MarrqError, match="low-rank branch"):
        parse_lowrank(text)


def test_a_spec_with_other_bits_is_refused():
    with pytest.raises(MarrqError, match="8 \\(int8\\) or 16 \\(float16\\) bits: got 4"):
        LowRankSpec("srr", 8, 4)
