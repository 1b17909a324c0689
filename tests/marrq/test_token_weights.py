"""What an error at a token costs, against explicit Jacobians; and the weights that follow."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import hashed, noise, quantized, swin, vision_model, vit, vit_with_layer_scale
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS
from marrq.errors import MarrqError
from marrq.models.blocks import find_blocks
from marrq.pipeline.block_inputs import cut, in_memory
from marrq.pipeline.collect import TokenSource
from marrq.pipeline.token_weights import fisher_energies, token_weights, weights_of
from marrq.workflows.quantize import shortfalls

DRAWS = 400
"""Copies of one image: each draws signs of its own, so that their mean is the expectation."""


def energies_of(
    module: nn.Module, images: Tensor, kinds: list[str], at_stream: bool = True
) -> dict[str, Tensor]:
    names = {"classes": "logits", "features": "features", "dense": "tokens"}
    model = replace(
        vision_model(module),
        outputs=tuple(names[kind] for kind in kinds),
        labels=tuple("abcde") if "classes" in kinds else (),
    )
    with torch.no_grad():
        blocks = find_blocks(module, images[:2])
        source = TokenSource(module, images, torch.device("cpu"), cut(len(images), 8), in_memory)
        return fisher_energies(source, blocks, model, ONE_PROCESS, at_stream)


def expected_energies(module: nn.Module, path: str, image: Tensor, kinds: list[str]) -> Tensor:
    """E ‖Jᵀ v‖² = tr Jᵀ F J at each token of one image, for the output of the module at a path,
    summed over the model's outputs."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    with torch.enable_grad(), module.get_submodule(path).register_forward_hook(keep):
        outputs = module(image[None])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = torch.zeros(seen[0].shape[1], dtype=torch.float64)
        for output, kind in zip(outputs, kinds, strict=True):
            z = output.flatten()
            rows = [torch.autograd.grad(one, seen[0], retain_graph=True)[0][0] for one in z]
            slopes = torch.stack(rows)  # J: [outputs, tokens, m]
            moved = (metric(z.detach(), kind) @ slopes.flatten(1)).view_as(slopes)  # F J
            total += (slopes * moved).sum((0, 2))
    return total


def metric(z: Tensor, kind: str) -> Tensor:
    """F, [outputs, outputs]: the divergence of a small dz is ½ dzᵀ F dz."""
    if kind == "classes":
        p = z.softmax(0)
        return p.diag() - p.outer(p)
    power = z.square().sum()
    identity = torch.eye(len(z)) / power
    return identity - z.outer(z) / power**2 if kind == "features" else identity


class Tokens(nn.Module):
    """The tokens of a model, alone or beside its logits."""

    def __init__(self, with_logits: bool) -> None:
        super().__init__()
        self.model, self.with_logits = vit(embed_dim=16, num_heads=2, depth=1), with_logits

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(pixels)
        return (self.model.forward_head(tokens), tokens) if self.with_logits else tokens


@pytest.mark.parametrize(
    ("build", "kinds", "linears"),
    [
        # The energies of writers are those of the stream, behind LayerScale.
        (
            vit_with_layer_scale,
            ["classes"],
            {
                "blocks.0.attn.qkv": "blocks.0.attn.qkv",
                "blocks.0.attn.proj": "blocks.0.ls1",
                "blocks.1.mlp.fc1": "blocks.1.mlp.fc1",
                "blocks.1.mlp.fc2": "blocks.1.ls2",
            },
        ),
        (
            lambda: vit(num_classes=0),
            ["features"],
            {"blocks.1.attn.qkv": "blocks.1.attn.qkv"},
        ),
        (
            lambda: Tokens(False),
            ["dense"],
            {"model.blocks.0.mlp.fc1": "model.blocks.0.mlp.fc1"},
        ),
        (
            lambda: Tokens(True),
            ["classes", "dense"],
            {"model.blocks.0.attn.qkv": "model.blocks.0.attn.qkv"},
        ),
    ],
    ids=["classes", "features", "dense", "classes and dense"],
)
def test_energies_are_those_of_the_explicit_jacobian(
    build: Callable[[], nn.Module], kinds: list[str], linears: dict[str, str]
):
    module, image = build(), noise(1)[0]
    found = energies_of(module, image.expand(DRAWS, -1, -1, -1), kinds)
    for path, point in linears.items():
        expected = expected_energies(module, point, image, kinds)
        # The mean of the squares of so many draws is right to 10 %.
        torch.testing.assert_close(
            found[path], expected, rtol=0.3, atol=0.02 * float(expected.max())
        )
        assert found[path].sum() == pytest.approx(float(expected.sum()), rel=0.1)


@pytest.mark.parametrize("kind", ["classes", "features"])
def test_of_an_output_of_one_number_the_size_counts(kind: str):
    module, image = vit(num_classes=1), noise(1)[0]
    found = energies_of(module, image.expand(DRAWS, -1, -1, -1), [kind])
    path = "blocks.1.attn.qkv"
    expected = expected_energies(module, path, image, ["dense"])
    torch.testing.assert_close(found[path], expected, rtol=1e-3, atol=1e-6)


def test_the_energy_of_a_writer_is_that_of_its_output_if_the_stream_is_no_aim():
    module, images = vit_with_layer_scale(), noise(16)
    own, stream = (energies_of(module, images, ["classes"], at) for at in (False, True))
    assert torch.equal(own["blocks.0.mlp.fc1"], stream["blocks.0.mlp.fc1"])
    assert not torch.allclose(own["blocks.0.mlp.fc2"], stream["blocks.0.mlp.fc2"], rtol=0.01)


def test_the_pass_leaves_the_model_as_it_was():
    module, images = vit(), noise(16)
    module.head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in module.named_parameters()}
    first, second = (energies_of(module, images, ["classes"]) for _ in range(2))
    assert all(torch.equal(first[path], second[path]) for path in first)
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_windows_keep_the_order_of_their_tokens():
    module = swin()
    found = energies_of(module, noise(16), ["classes"])
    # 16 · 16 patches, then 8 · 8; the energies of a window are those of its patches.
    assert len(found["layers.0.blocks.0.attn.qkv"]) == 256
    assert len(found["layers.1.blocks.1.mlp.fc2"]) == 64


class TokensFirst(nn.Module):
    """Runs the model's block with the axes of tokens and images exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8))])

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.blocks[0](pixels.flatten(2).permute(2, 0, 1))
        return tokens.mean(0)


def test_a_linear_whose_tokens_do_not_lie_image_by_image_has_no_energies():
    assert energies_of(TokensFirst(), noise(16), ["features"]) == {}


def test_linears_whose_tokens_have_no_weights_are_named(monkeypatch: pytest.MonkeyPatch):
    def without_fc2(*given: Any) -> dict[str, Tensor]:
        found = token_weights(*given)
        del found["blocks.1.mlp.fc2"]
        return found

    everywhere = quantized(vit(), noise(4), "W4A8", "gptq")
    monkeypatch.setattr("marrq.pipeline.quantize.token_weights", without_fc2)
    but_one = quantized(vit(), noise(4), "W4A8", "gptq")
    nowhere = quantized(vit(), noise(4), "W4A8", "gptq,token-weights=off")
    assert [report.path for report in but_one.reports if not report.weighted] == [
        "blocks.1.mlp.fc2"
    ]
    [told] = shortfalls(but_one)
    assert told.startswith("the tokens of 1 of 8 linears have no weights")
    assert told.endswith(": blocks.1.mlp.fc2")
    # Nothing is missing if all have weights, or if none were asked for.
    assert not [*shortfalls(everywhere), *shortfalls(nowhere)]
    assert {report.weighted for report in nowhere.reports} == {False}


def test_outputs_without_a_gradient_are_refused_with_the_way_out():
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = vit()

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels).detach()

    with pytest.raises(MarrqError, match=r"no gradient.*: choose --set token-weights=off"):
        energies_of(Detached(), noise(16), ["classes"])


def test_weights_are_relative_energies_within_their_bounds():
    energies = torch.tensor([4000.0, 1e-9, *[10.0] * 30, *[20.0] * 30], dtype=torch.float64)
    weights = weights_of(energies)
    assert weights.mean() == pytest.approx(1, abs=1e-4)
    assert weights[-1] == pytest.approx(2 * float(weights[2]), rel=1e-3)
    # 0.1 and 10 before the last division.
    assert weights[0] == pytest.approx(100 * float(weights[1]), rel=1e-2)
    assert torch.equal(weights_of(7 * energies), weights)
    # Sums of any order are exact.
    assert torch.equal(weights * 2**16, (weights * 2**16).round())


def test_a_linear_on_which_nothing_depends_has_even_weights():
    assert torch.equal(weights_of(torch.zeros(5, dtype=torch.float64)), torch.ones(5).double())


@pytest.mark.parametrize(
    ("build", "scheme", "method"),
    [
        (lambda: vit(depth=1), "W4A8", "stream"),
        pytest.param(swin, "W4A8", "gptq", marks=pytest.mark.slow),
        pytest.param(vit_with_layer_scale, "W3A4", "marr-exact", marks=pytest.mark.slow),
    ],
)
def test_weights_of_1_give_what_no_weights_give_to_the_last_bit(
    build: Callable[[], nn.Module], scheme: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    def result(setting: str) -> str:
        text = f"{method},token-weights={setting}"
        model = quantized(build(), noise(13), scheme, text, batch_size=2)
        # Whether tokens were weighed is the one thing that the reports tell apart.
        reports = tuple(replace(report, weighted=False) for report in model.reports)
        return hashed(replace(model, reports=reports))

    off, on = result("off"), result("on")
    monkeypatch.setattr("marrq.pipeline.token_weights.weights_of", torch.ones_like)
    assert result("on") == off != on
