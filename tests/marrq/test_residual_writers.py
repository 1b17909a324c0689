"""The linears that write to the residual stream are found by trial, the stream is read right, and
`stream` answers for it."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import dinov2, noise, quantized, swin, transformers_vit, vit, vit_with_layer_scale
from torch import Tensor, nn

from marrq.models.blocks import Block, find_blocks
from marrq.models.residual_writers import ResidualWriter, find_residual_writer, read_stream

# The module whose input is the stream behind each writer, and the parameters that scale what it
# writes.
TIMM = {"attn.proj": ("norm2", None), "mlp.fc2": (None, None)}
SCALED = {"attn.proj": ("norm2", "ls1.gamma"), "mlp.fc2": (None, "ls2.gamma")}
MODELS = {
    "timm vit": (vit, TIMM),
    "timm vit with LayerScale": (vit_with_layer_scale, SCALED),
    "timm swin": (swin, {"mlp.fc2": (None, None)}),  # proj writes in the order of the windows
    "timm vit without a stream": (lambda: vit(block_fn=Straight), {}),
    "transformers vit": (
        transformers_vit,
        {"attention.o_proj": ("layernorm_after", None), "mlp.fc2": (None, None)},
    ),
    "dinov2": (
        dinov2,
        {
            "attention.o_proj": ("norm2", "layer_scale1.lambda1"),
            "mlp.fc2": (None, "layer_scale2.lambda1"),
        },
    ),
}


class Straight(nn.Module):
    """A block in which something that is not linear follows on every linear."""

    def __init__(self, dim: int, *_: object, **__: object) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc2(torch.relu(self.fc1(x))))


def blocks_with_tokens(model: nn.Module) -> list[tuple[Block, Tensor]]:
    images = noise(3)
    with torch.no_grad():
        return [(block, block.input_from(model, images)) for block in find_blocks(model, images)]


@pytest.mark.parametrize("name", MODELS)
def test_writers_are_found_with_their_gain_and_their_reader_and_nothing_else_is(name: str):
    make, expected = MODELS[name]
    for block, tokens in blocks_with_tokens(make()):
        for linear in (linear for group in block.groups for linear in group):
            writer = find_residual_writer(block, linear, tokens)
            if linear not in expected:
                assert writer is None
                continue
            reader, scale = expected[linear]
            assert (writer.linear, writer.reader) == (linear, reader)
            gain = (
                torch.ones(tokens.shape[-1]) if scale is None else block.module.get_parameter(scale)
            )
            torch.testing.assert_close(writer.gain, gain.detach(), rtol=1e-6, atol=0)


def test_a_search_leaves_the_block_as_it_was():
    for block, tokens in blocks_with_tokens(vit_with_layer_scale()):
        with torch.no_grad():
            before = block(tokens)
            find_residual_writer(block, "attn.proj", tokens)
            assert torch.equal(block(tokens), before)
        assert {parameter.dtype for parameter in block.module.parameters()} == {torch.float32}


def stream_by_hand(block: Block, writer: ResidualWriter, tokens: Tensor, x: Tensor) -> Tensor:
    """What the writer adds for an input x of its own, on top of the stream before it."""
    before = tokens if writer.reader is not None else block.input_of("norm2", tokens)
    return before + writer.gain * block.linear(writer.linear)(x)


@torch.no_grad()
@pytest.mark.parametrize("linear", ["attn.proj", "mlp.fc2"])
@pytest.mark.parametrize("make", [vit, vit_with_layer_scale])
def test_the_stream_behind_a_writer_is_the_stream_before_it_and_what_it_adds(
    make: Callable[[], nn.Module], linear: str
):
    for block, tokens in blocks_with_tokens(make()):
        writer = find_residual_writer(block, linear, tokens)
        for change in (lambda x: x, lambda x: 0.5 * x + 1):
            expected = change(block.input_of(linear, tokens))
            x, stream = read_stream(block, writer, tokens, change)
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(
                stream, stream_by_hand(block, writer, tokens, expected), rtol=1e-5, atol=1e-5
            )


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm swin", "transformers vit", "dinov2"])
def test_the_stream_behind_the_last_linear_is_the_output_of_the_block(name: str):
    for block, tokens in blocks_with_tokens(MODELS[name][0]()):
        if "mlp.fc2" in (linear for group in block.groups for linear in group):
            x, stream = read_stream(
                block, find_residual_writer(block, "mlp.fc2", tokens), tokens, nn.Identity()
            )
            assert torch.equal(stream, block(tokens))
            assert torch.equal(x, block.input_of("mlp.fc2", tokens))


@torch.no_grad()
def test_a_channel_that_layer_scale_shuts_has_a_gain_of_zero():
    model = vit_with_layer_scale()
    model.get_parameter("blocks.0.ls2.gamma")[5] = 0
    block, tokens = blocks_with_tokens(model)[0]
    gain = find_residual_writer(block, "mlp.fc2", tokens).gain
    assert gain[5] == 0
    assert gain[[4, 6]].all()
    model = quantized(model, noise(6), "W4A8", "stream").module
    assert model(noise(2)).isfinite().all()


@torch.no_grad()
def test_a_linear_whose_way_to_the_stream_is_shut_answers_for_its_own_output():
    model = vit_with_layer_scale()
    model.get_parameter("blocks.0.ls1.gamma").zero_()
    block, tokens = blocks_with_tokens(model)[0]
    assert find_residual_writer(block, "attn.proj", tokens).reader == "ls1"


def inputs_of(model: nn.Module, path: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0])
        ),
    ):
        model(images)
    return seen[0]


BEHIND = {  # where the stream behind the last block's proj and fc2 enters
    "timm vit": ("blocks.1.norm2", "norm"),
    "timm vit with LayerScale": ("blocks.1.norm2", "norm"),
    "transformers vit": ("model.vit.layers.1.layernorm_after", "model.vit.layernorm"),
    "dinov2": ("model.dinov2.encoder.layer.1.norm2", "model.dinov2.layernorm"),
}


@pytest.mark.parametrize(
    "method",
    [
        "stream",
        pytest.param("stream,bias-correction=off", marks=pytest.mark.slow),
        pytest.param("marr-stream", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", BEHIND)
def test_the_error_of_a_writer_is_the_square_error_of_the_stream_behind_it(name: str, method: str):
    make, images = MODELS[name][0], noise(12)
    original, model = make(), quantized(make(), images, "W3A8", f"{method},token-weights=off")
    by_path = {
        report.path.rsplit(".", 2)[-1]: report for report in model.reports
    }  # of the last block
    for linear, path in zip(
        ("o_proj" if "o_proj" in by_path else "proj", "fc2"), BEHIND[name], strict=True
    ):
        drift = (inputs_of(model.module, path, images) - inputs_of(original, path, images)).double()
        assert by_path[linear].error == pytest.approx(float(drift.square().sum()), rel=1e-3)


def test_stream_ends_nearer_to_the_full_precision_stream_than_exact_and_exact_than_gptq():
    images = noise(24)
    original = inputs_of(vit_with_layer_scale(), "norm", images)

    def drift(method: str) -> float:
        model = quantized(vit_with_layer_scale(), images, "W3A8", method).module
        return float((inputs_of(model, "norm", images) - original).square().sum())

    assert drift("stream") < drift("exact") < drift("gptq")
