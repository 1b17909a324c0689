"""Equalization changes no output, uses a norm only if the norm feeds nothing else, and expects the
error that a sweep then finds."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    dinov2,
    noise,
    quantized,
    swin,
    transformers_vit,
    vit,
    vit_with_layer_scale,
    vit_with_strong_channels,
)
from torch import Tensor, nn

from marrq.methods.factor import factorize
from marrq.methods.gptq import sweep
from marrq.models.blocks import Block, find_blocks
from marrq.quantizers.activations import RangeObserver, smoothed
from marrq.quantizers.affine import search_weight_grid
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import Scheme, parse_scheme
from marrq.transforms.equalization import (
    CANDIDATES,
    choose_scale,
    equalize,
    expected_error,
    find_norm,
    pivots_of,
)

FAMILIES = pytest.mark.parametrize("make", [vit, vit_with_layer_scale, dinov2, transformers_vit])
COARSE = parse_scheme("W4A4", "per-token")


def tokens_and_block(module: nn.Module) -> tuple[Tensor, Block]:
    block = find_blocks(module, noise(2))[0]
    return block.input_from(module, noise(2)), block


def with_strong_channels(count: int, tokens: int, seed: int = 0) -> Tensor:
    """Tokens whose channels differ in size by a factor of thirty, in random order."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-0.75, 0.75, count)[torch.randperm(count, generator=generator)]
    return torch.randn(tokens, count, generator=generator) * size


def swept_error(x: Tensor, weight: Tensor, scheme: Scheme) -> float:
    """‖Q q(x) - W x‖² per token as it comes out: ranges searched, Q swept with the same tokens."""
    quantized = x
    if scheme.activation is not None:
        observer = RangeObserver()
        observer.observe(x)
        quantized = observer.quantizer(scheme.activation, weight)(x)
    factor = factorize((quantized.T @ quantized).double(), 0.01, act_order=True)
    grid = search_weight_grid(weight, scheme.weight)
    rounded = grid.spread(weight.shape[1]).dequantize(sweep(weight, grid, factor))
    return float((quantized @ rounded.T - x @ weight.T).square().sum() / len(x))


@FAMILIES
def test_only_the_linears_behind_the_two_norms_can_be_equalized_by_a_norm(make):
    with torch.no_grad():
        tokens, block = tokens_and_block(make())
        found = [find_norm(block, group, tokens) is not None for group in block.groups]
    assert found == [True, False, True, False]


def test_no_norm_is_found_if_windows_are_cut_between_the_norm_and_the_linear():
    with torch.no_grad():
        tokens, block = tokens_and_block(swin())
        found = {group: find_norm(block, group, tokens) for group in block.groups}
    assert [group for group, norm in found.items() if norm] == [("mlp.fc1",)]


@pytest.mark.parametrize("read", ["reshaped", "added", "by its linear alone"])
def test_no_norm_is_found_if_something_else_reads_it_than_modules_that_are_given_it(read: str):
    """As PVT v2's attention, whose keys come from a reduced image of the same norm."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            if read == "reshaped":
                pairs = self.other(x.reshape(len(x), -1, 16))
                return self.q(x) + pairs.repeat_interleave(2, 1)
            return self.q(x) + x if read == "added" else self.q(x)

    block = Block("", Attention(), (("q",),), True, (), {})
    with torch.no_grad():
        found = find_norm(block, ("q",), torch.randn(2, 4, 8))
    assert found == ("norm" if read == "by its linear alone" else None)


@FAMILIES
def test_a_scale_that_a_norm_holds_changes_no_output(make):
    with torch.no_grad():
        tokens, block = tokens_and_block(make())
        before, group = block(tokens), block.groups[0]
        norm = find_norm(block, group, tokens)
        weight = block.linear(group[0]).weight.clone()
        made = equalize(block, group, norm, with_strong_channels(tokens.shape[-1], 500), COARSE)
        assert made is not None
        assert made.norm == norm
        assert made.smoothing is None
        torch.testing.assert_close(block(tokens), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.linear(group[0]).weight, weight * made.scale)


def test_without_a_norm_before_the_linear_its_input_is_multiplied_at_run_time():
    with torch.no_grad():
        _, block = tokens_and_block(vit())
        x = with_strong_channels(128, 500)
        before = F.linear(x, block.linear("mlp.fc2").weight)
        made = equalize(block, ("mlp.fc2",), None, x, COARSE)
        assert made is not None
        torch.testing.assert_close(
            F.linear(smoothed(x, made.smoothing), block.linear("mlp.fc2").weight),
            before,
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_small_gain_is_not_worth_a_pass_at_run_time():
    with torch.no_grad():
        _, block = tokens_and_block(vit())
        weight = block.linear("mlp.fc2").weight.clone()
        x = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
        assert equalize(block, ("mlp.fc2",), None, x, COARSE) is None
        assert torch.equal(block.linear("mlp.fc2").weight, weight)


def test_columns_of_very_different_size_are_evened_out():
    size = torch.logspace(-1, 1, 32)
    sample = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) * size
    scale, left = choose_scale(sample, weight, parse_scheme("W4A8"))
    assert (weight * scale).norm(dim=0).std() < weight.norm(dim=0).std()
    assert scale.log().mean().item() == pytest.approx(0, abs=1e-5)
    assert left < 1


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("text", "nearly"),
    [("W2A8", 1.8), ("W3A16", 1.2), ("W4A4", 1.2), ("W3A3", 1.2), ("W4A4-g16", 1.2)],
)
def test_the_expected_error_is_near_that_of_a_sweep_and_chooses_nearly_the_best_scale(
    text: str, nearly: float, seed: int
):
    """The two errors differ, since a sweep clips ranges further.

    The difference is nearly the same for all candidates, so it hardly changes the choice. With 2
    bits it does.
    """
    assert CANDIDATES[0] == (0.0, 0.0)
    scheme = parse_scheme(text, "per-tensor" if "A16" in text else "per-token")
    turn = torch.linalg.qr(
        torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
    ).Q.lerp(torch.eye(32), 0.7)
    sample = with_strong_channels(32, 2000, seed) @ turn
    weight = with_strong_channels(32, 24, seed + 10)
    strengths = [values.square().mean(0).sqrt() for values in (sample, weight)]
    scales = [strengths[0] ** a * strengths[1] ** -b for a, b in CANDIDATES]
    expected = [
        float(expected_error(sample / s, weight * s, pivots_of(sample / s), scheme)) for s in scales
    ]
    found = [swept_error(sample / s, weight * s, scheme) for s in scales]
    assert all(0.2 < one / other < 1.5 for one, other in zip(found, expected, strict=True))
    scale, _ = choose_scale(sample, weight, scheme)
    chosen = swept_error(sample / scale, weight * scale, scheme)
    assert chosen < nearly * min(found) <= nearly * found[0]


def test_a_channel_nearly_dead_in_calibration_does_not_drown_the_others_when_it_comes_alive():
    x, weight = (
        with_strong_channels(128, 500),
        torch.randn(24, 128, generator=torch.Generator().manual_seed(1)),
    )
    x[:, 7] *= 1e-9
    scale, left = choose_scale(x, weight, COARSE)
    assert left < 0.7
    assert scale.median() / scale[7] < 2e3


def test_a_dead_channel_does_not_change_the_scale_of_the_others():
    x, weight = (
        with_strong_channels(128, 500),
        torch.randn(24, 128, generator=torch.Generator().manual_seed(1)),
    )
    x[:, 7] = 0
    rest = torch.arange(128) != 7
    (scale, left), (alone, left_alone) = (
        choose_scale(x, weight, COARSE),
        choose_scale(x[:, rest], weight[:, rest], COARSE),
    )
    torch.testing.assert_close(
        scale[rest] / scale[rest].mean(), alone / alone.mean(), rtol=1e-5, atol=0
    )
    assert left == pytest.approx(left_alone, rel=0.05)
    assert choose_scale(torch.zeros(40, 128), weight, COARSE)[0].isfinite().all()


def test_the_sample_is_of_evenly_spaced_tokens_of_four_batches_at_most(
    monkeypatch: pytest.MonkeyPatch,
):
    images, seen = noise(130), list[Tensor]()
    # Each half ends in a batch of one image, and the second of these is in the sample.

    def spy(
        block: Block, group: tuple[str, ...], norm: str | None, sample: Tensor, scheme: Scheme
    ) -> None:
        seen.append(sample)

    monkeypatch.setattr("marrq.pipeline.group.equalize", spy)
    monkeypatch.setattr("marrq.pipeline.group.EQUALIZATION_TOKENS", 100)
    with torch.no_grad():
        model = vit()
        first = find_blocks(model, images[:2])[0]
        starts = [*range(0, 65, 16), *range(65, 130, 16)]  # of the batches, half by half
        ends = [*starts[1:], 130]
        batches = [
            first.input_of("attn.qkv", first.input_from(model, images[a:b]))
            for a, b in zip(starts, ends, strict=True)
        ][::3]  # of ten batches the first, the fourth, the seventh and the last
        tokens = torch.cat([x.flatten(0, 1) for x in batches])
        quantized(vit(), images, "W4A8", "rtn")
    torch.testing.assert_close(seen[0], tokens[torch.linspace(0, len(tokens) - 1, 100).long()])


def test_pivots_scale_as_the_inputs_do():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    order = sample.square().sum(0)  # so little a change keeps the order of the sweep
    scale = 1 + 1e-3 * torch.linspace(-1, 1, 16)[order.argsort().argsort()].flip(0)
    torch.testing.assert_close(
        pivots_of(sample / scale), pivots_of(sample) / scale.square(), rtol=2e-2, atol=0
    )


def test_an_equalized_model_gives_the_outputs_of_its_own_float_model():
    images = noise(6)
    with torch.no_grad():
        expected = vit()(images)
        model = quantized(vit(), images, "W8A16", "gptq,equalize=on")
        error = (model.module(images) - expected).norm() / expected.norm()
    assert error < 0.02
    norm = model.module.get_submodule("blocks.0.norm1").weight
    assert not torch.equal(norm, vit().get_submodule("blocks.0.norm1").weight)


@pytest.mark.parametrize("method", ["gptq", "marr"])
def test_j_of_an_equalized_model_is_the_square_error_of_its_outputs(method: str):
    """J is computed from inputs that were scaled on both paths; the outputs know nothing of
    scales."""
    images, method = noise(8), f"{method},balance=off,token-weights=off"
    model = quantized(vit_with_strong_channels(), images, "W4A4", method, strategy="per-token")
    smoothings = {
        path
        for path, linear in quantized_linears(model.module).items()
        if linear.input.smoothing is not None
    }
    assert {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"} <= smoothings
    report = next(report for report in model.reports if report.path == "blocks.1.mlp.fc2")
    ends: list[Tensor] = []
    with torch.no_grad():
        for module in (model.module, vit_with_strong_channels()):
            place = module.blocks[1] if report.writes_stream else module.blocks[1].mlp.fc2
            handle = place.register_forward_hook(lambda _, inputs, output: ends.append(output))
            module(images)
            handle.remove()
    assert report.error == pytest.approx(
        float((ends[0] - ends[1]).double().square().sum()), rel=1e-2
    )


@pytest.mark.parametrize(
    ("scheme", "at_run_time"),
    [
        ("W4A4", True),
        pytest.param("W3A3", True, marks=pytest.mark.slow),
        ("W2A8", False),
        ("W4A16", False),
    ],
)
def test_inputs_are_multiplied_at_run_time_only_if_activations_are_coarse(
    scheme: str, at_run_time: bool
):
    for setting in ("on", "off"):
        model = quantized(vit_with_strong_channels(), noise(4), scheme, f"rtn,equalize={setting}")
        inputs = [
            linear.input
            for linear in quantized_linears(model.module).values()
            if linear.input is not None
        ]
        assert any(quantizer.smoothing is not None for quantizer in inputs) == (
            at_run_time and setting == "on"
        )
        assert any(report.equalized for report in model.reports) == (setting == "on")
