"""Another basis for values changes no output; value paths are found; no other basis does less
harm."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from tiny_models import (
    dinov2,
    noise,
    quantized,
    randomized,
    swin,
    transformers_vit,
    vit,
    vit_with_layer_scale,
)
from torch import Tensor, nn

from marrq.models.blocks import Block, find_blocks
from marrq.models.timm_models import with_joined_biases
from marrq.transforms.value_basis import ValuePath, balancing_basis, find_value_path, fold_basis
from marrq.workflows.quantize import shortfalls


def gated() -> nn.Module:
    """EVA-02 with its gated MLP, and no norm inside it."""
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "scale_mlp": False,
        "num_classes": 5,
    }
    return with_joined_biases(randomized(timm.create_model("eva02_tiny_patch14_224", **arguments)))


def of_projection(values: str, start: int, width: int, projection: str) -> dict[str, ValuePath]:
    return {projection: ValuePath(values, start, projection, width)}


FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, ValuePath]]] = {
    "vit": (vit, of_projection("attn.qkv", 128, 16, "attn.proj")),
    "vit with LayerScale": (vit_with_layer_scale, of_projection("attn.qkv", 128, 16, "attn.proj")),
    "swin": (swin, of_projection("attn.qkv", 48, 12, "attn.proj")),
}


def block_and_tokens(model: nn.Module) -> tuple[Block, Tensor]:
    block = find_blocks(model, noise(2))[0]
    return block, block.input_from(model, noise(2))


def value_paths(block: Block, tokens: Tensor) -> dict[str, ValuePath]:
    found = {
        group[0]: find_value_path(block, group[0], tokens)
        for group in block.groups
        if len(group) == 1
    }
    return {target: value_path for target, value_path in found.items() if value_path is not None}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_values_and_the_width_of_a_head_are_found(family: str):
    make, expected = FAMILIES[family]
    assert value_paths(*block_and_tokens(make())) == expected


@pytest.mark.parametrize("make", [transformers_vit, dinov2])
@torch.no_grad()
def test_values_with_a_linear_of_their_own_are_found(make: Callable[[], nn.Module]):
    [value_path] = value_paths(*block_and_tokens(make())).values()
    assert "value" in value_path.source or "v_proj" in value_path.source
    assert (value_path.start, value_path.width) == (0, 16)


@torch.no_grad()
def test_the_channels_of_a_gated_mlp_form_groups_of_one_channel():
    found = value_paths(*block_and_tokens(gated()))
    assert found["mlp.fc2"].width == 1
    assert found["attn.proj"].width == 16


@pytest.mark.parametrize("make", [vit, swin, transformers_vit, gated])
@torch.no_grad()
def test_another_basis_changes_no_output(make: Callable[[], nn.Module]):
    block, tokens = block_and_tokens(make())
    before = block(tokens)
    for target, value_path in value_paths(block, tokens).items():
        weight = block.linear(target).weight.clone()
        inputs = block.input_of(target, tokens).flatten(0, -2)
        fold_basis(
            block,
            value_path,
            balancing_basis(inputs, weight, value_path.width, torch.Generator().manual_seed(0)),
        )
        assert not torch.allclose(block.linear(target).weight, weight, rtol=0.1)
    torch.testing.assert_close(block(tokens), before, rtol=1e-3, atol=1e-4)


def harm(change: Tensor, inputs: Tensor, weight: Tensor) -> float:
    """tr(T H Tᵀ) · tr(T⁻ᵀ M T⁻¹), from the tokens and the weights themselves."""
    return float(
        (inputs @ change.T).square().mean(0).sum() * (weight @ change.inverse()).square().sum()
    )


@pytest.mark.parametrize("width", [1, 4, 12])
def test_no_other_basis_does_less_harm(width: int):
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = normal(400, 12) @ normal(12, 12) * torch.logspace(-0.5, 0.5, 12, dtype=torch.float64)
    weight = normal(7, 12) @ normal(12, 12)
    best = balancing_basis(inputs, weight, width, generator)
    mask = torch.block_diag(*[torch.ones(width, width, dtype=torch.float64)] * (12 // width))
    assert torch.equal(best, best * mask)
    # The 1 % that H and M are damped by may cost as much.
    least = harm(best, inputs, weight) / 1.02
    assert least < 0.8 * harm(torch.eye(12, dtype=torch.float64), inputs, weight)
    for size in (1e-2, 0.1, 0.5):
        assert all(
            least < harm(best + size * normal(12, 12) * mask, inputs, weight) for _ in range(20)
        )


def test_dead_inputs_and_weights_of_zeros_still_have_a_basis():
    inputs, weight = torch.randn(50, 8), torch.randn(6, 8)
    inputs[:, :4] = 0
    weight[:, 2:6] = 0
    for width in (1, 2, 4):
        change = balancing_basis(inputs, weight, width, torch.Generator().manual_seed(0))
        assert change.isfinite().all()
        assert change.inverse().isfinite().all()


def test_a_balanced_model_gives_the_outputs_of_its_own_float_model_and_says_what_was_balanced():
    images = noise(6)
    with torch.no_grad():
        expected = vit()(images)
        model = quantized(vit(), images, "W8A16", "gptq,balance=on")
        error = (model.module(images) - expected).norm() / expected.norm()
    assert error < 0.02
    assert [report.path for report in model.reports if report.balanced] == [
        "blocks.0.attn.proj",
        "blocks.1.attn.proj",
    ]


def test_balance_that_was_asked_for_and_balances_nothing_is_told():
    for setting, count in (("on", 1), ("auto", 0)):
        mixer = MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
        made = quantized(randomized(mixer), noise(4), "W4A4", f"rtn,balance={setting}")
        told = [sentence for sentence in shortfalls(made) if "nothing is balanced" in sentence]
        assert len(told) == count


@pytest.mark.parametrize(
    ("scheme", "balanced"),
    [
        ("W4A4", True),
        pytest.param("W3A3", True, marks=pytest.mark.slow),
        ("W2A8", False),
        ("W4A16", False),
    ],
)
def test_values_are_balanced_by_default_only_if_activations_are_coarse(scheme: str, balanced: bool):
    images = noise(4)
    for setting, expected in ("auto", balanced), ("on", True), ("off", False):
        model = quantized(vit(depth=1), images, scheme, f"rtn,balance={setting}")
        assert any(report.balanced for report in model.reports) == expected
