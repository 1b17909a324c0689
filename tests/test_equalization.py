"""Equalization changes no output, takes only what a norm alone feeds, and does no harm by its own measure."""

import pytest
import torch
from tiny_models import dinov2, noise, quantized, swin, transformers_vit, vit, vit_with_layer_scale
from torch import Tensor, nn

from marrq.blocks import find_blocks, first_input
from marrq.equalization import CANDIDATES, choose_scale, find_norm, fold_scale, output_error
from marrq.schemes import parse_scheme

FAMILIES = pytest.mark.parametrize("make", [vit, vit_with_layer_scale, dinov2, transformers_vit])


def tokens_and_block(module: nn.Module) -> tuple[Tensor, object]:
    block = find_blocks(module, noise(2))[0]
    return first_input(module, block, noise(2)), block


@FAMILIES
def test_the_linears_behind_the_two_norms_can_be_equalized_and_no_others(make):
    with torch.no_grad():
        tokens, block = tokens_and_block(make())
        found = [find_norm(block, group, tokens) is not None for group in block.groups]
    assert found == [True, False, True, False]


def test_windows_between_the_norm_and_the_linear_are_left_alone():
    with torch.no_grad():
        tokens, block = tokens_and_block(swin())
        found = {group: find_norm(block, group, tokens) for group in block.groups}
    assert [group for group, norm in found.items() if norm] == [("mlp.fc1",)]


@FAMILIES
def test_folding_a_scale_changes_no_output(make):
    with torch.no_grad():
        tokens, block = tokens_and_block(make())
        before = block(tokens)
        group = block.groups[0]
        norm = find_norm(block, group, tokens)
        scale = torch.rand(tokens.shape[-1]) + 0.5
        weight = block.linear(group[0]).weight.clone()
        fold_scale(block, norm, group, scale)
        torch.testing.assert_close(block(tokens), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.linear(group[0]).weight, weight * scale)


def test_columns_of_very_different_size_are_evened_out():
    size = torch.logspace(-1, 1, 32)
    sample = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)) * size
    scale = choose_scale(sample, weight, parse_scheme("W4A8"))
    assert (weight * scale).norm(dim=0).std() < weight.norm(dim=0).std()
    assert scale.log().mean().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scheme", ["W2A8", "W3A16", "W4A4"])
def test_what_is_chosen_rounds_no_worse_than_leaving_all_as_it_is(scheme: str):
    assert CANDIDATES[0] == (0.0, 0.0)
    numbers = parse_scheme(scheme)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(200, 32, generator=generator) * torch.rand(32, generator=generator)
        weight = torch.randn(12, 32, generator=generator) * torch.rand(32, generator=generator)
        scale = choose_scale(sample, weight, numbers)
        assert output_error(sample / scale, weight * scale, numbers) <= output_error(sample, weight, numbers)


def test_an_equalized_model_gives_the_outputs_of_its_own_float_model():
    images = noise(6)
    with torch.no_grad():
        expected = vit()(images)
        model = quantized(vit(), images, "W8A16", "gptq,equalize=on")
        error = (model.module(images) - expected).norm() / expected.norm()
    assert error < 0.02
    norm = model.module.get_submodule("blocks.0.norm1").weight
    assert not torch.equal(norm, vit().get_submodule("blocks.0.norm1").weight)
