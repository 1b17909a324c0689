"""Patch embedding and head are linears like all others: found by trial, quantized on the same two
streams, or refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from flavor_files import executed_operators
from onnx import helper
from tiny_models import (
    dinov2,
    distilled,
    noise,
    output_of,
    quantized,
    swin,
    transformers_vit,
    vit,
    vit_with_layer_scale,
)
from torch import Tensor, nn

from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.errors import MarrqError
from marrq.models.blocks import find_blocks
from marrq.models.first_last import put_patches, with_outer_layers
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import ActivationSpec, WeightSpec, parse_scheme
from runtime.session import SessionSettings

IMAGES = noise(24)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[tuple[str, ...], ...]]] = {
    "vit": (vit, "patch_embed.proj", (("head",),)),
    "distilled": (distilled, "patch_embed.proj", (("head",), ("head_dist",))),
    "swin": (swin, "patch_embed.proj", (("head.fc",),)),
    "transformers vit": (
        transformers_vit,
        "model.vit.embeddings.patch_embeddings.projection",
        (("model.classifier",),),
    ),
    "dinov2": (
        dinov2,
        "model.dinov2.embeddings.patch_embeddings.projection",
        (("model.classifier",),),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 4), (2, 8), (1, 1)])
def test_a_convolution_on_patches_is_a_linear(size: tuple[int, int], bias: bool):
    model = nn.Sequential(nn.Conv2d(3, 7, size, size, bias=bias))
    pixels = torch.randn(2, 3, 16, 24)
    expected = model(pixels)
    put_patches(model, "0")
    torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_stem_blocks_and_head_are_the_whole_model(name: str):
    make, patches, head = MODELS[name]
    model, images = make(), IMAGES[:3]
    expected = model(images)
    blocks = find_blocks(model, images)
    chain = with_outer_layers(model, blocks, images[:2])
    assert [block.path for block in chain] == ["", *(block.path for block in blocks), ""]
    assert (chain[0].groups, chain[-1].groups) == (((f"{patches}.linear",),), head)
    tokens = images
    for index, block in enumerate(chain):
        if 0 < index <= len(blocks):
            torch.testing.assert_close(
                tokens, block.input_from(model, images), rtol=1e-4, atol=1e-5
            )
        tokens = block(tokens)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copied_first_and_last_layers_have_parameters_of_their_own_and_share_the_blocks():
    model = vit()
    chain = with_outer_layers(model, find_blocks(model, IMAGES[:2]), IMAGES[:2])
    tokens = chain[1](chain[0](IMAGES[:3]))
    for layers, x in ((chain[0], IMAGES[:3]), (chain[-1], tokens)):
        before, copy = layers(x), layers.copied()
        layers.linear(layers.groups[0][0]).weight.zero_()
        assert torch.equal(copy(x), before)
        assert not torch.equal(layers(x), before)
    assert chain[0].copied().module.blocks[0] is model.blocks[0]


@pytest.mark.parametrize(
    "method", ["marr-exact", "marr", "gptq,equalize=off", "exact,lowrank=srr:4"]
)
@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_j_of_first_and_last_layers_is_the_square_error_of_their_outputs_between_the_two_streams(
    name: str, method: str
):
    """The head's input comes through everything quantized before it, its target through nothing."""
    make, patches, [[head]] = MODELS[name]
    model = quantized(make(), IMAGES, "W4A8-e8", f"{method},token-weights=off")
    assert [report.path for report in model.reports if report.is_outer] == [
        f"{patches}.linear",
        head,
    ]
    assert [model.reports[0].is_outer, model.reports[-1].is_outer] == [True, True]
    for path, report in ((patches, model.reports[0]), (head, model.reports[-1])):
        expected = output_of(make(), path, IMAGES)
        error = (output_of(model.module, path, IMAGES) - expected).double().square().sum()
        assert report.error == pytest.approx(float(error), rel=1e-3)
        assert report.mse == pytest.approx(float(error) / expected.numel(), rel=1e-3)
        assert 0 < report.relative_error < 0.1


@pytest.mark.parametrize(
    ("scheme", "grid", "activation"),
    [("W2A4", "asymmetric", 8), ("W4A16-g16-sym", "symmetric", None)],
)
def test_first_and_last_layers_have_eight_bits_a_grid_per_channel_and_no_branch(
    scheme: str, grid: str, activation: int | None
):
    strategy = "per-tensor" if "A16" in scheme else "per-token"
    model = quantized(vit(), IMAGES, f"{scheme}-e8", "gptq,lowrank=srr:4", strategy=strategy)
    linears = quantized_linears(model.module)
    assert list(linears) == [
        "patch_embed.proj.linear",
        *quantized_linears(quantized(vit(), IMAGES, scheme, "rtn").module),
        "head",
    ]
    for path in ("patch_embed.proj.linear", "head"):
        linear = linears.pop(path)
        assert linear.spec == WeightSpec(8, grid=grid, reduce_range=activation is not None)  # type: ignore[arg-type]
        assert linear.lowrank is None
        assert (None if linear.input is None else linear.input.spec) == (
            None if activation is None else ActivationSpec(activation)
        )
    assert all(
        linear.spec == parse_scheme(scheme).weight and linear.lowrank is not None
        for linear in linears.values()
    )


def test_the_blocks_work_with_what_the_quantized_patch_embedding_gives():
    """With eight bits everywhere, what a block is given differs between the streams by the patch
    embedding's rounding alone."""
    found = {
        scheme: quantized(vit(), IMAGES, scheme, "gptq").module.blocks[0].attn.qkv.input.scale
        for scheme in ("W4A8", "W4A8-e8")
    }
    x = output_of(quantized(vit(), IMAGES, "W4A8-e8", "gptq").module, "blocks.0.norm1", IMAGES)
    assert found["W4A8"] != found["W4A8-e8"]
    assert found["W4A8-e8"] <= (x.amax() - x.amin()) / 255 * 1.0001


def test_a_model_without_a_head_has_its_patch_embedding_quantized():
    model = quantized(vit(num_classes=0), IMAGES, "W4A8-e8", "gptq")
    assert [report.path for report in model.reports if report.is_outer] == [
        "patch_embed.proj.linear"
    ]


class FromPixels(nn.Module):
    """A head that looks at the image again."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vit(pixels) + pixels.mean((1, 2, 3))[:, None]


def overlapping() -> nn.Module:
    model = vit()
    model.patch_embed.proj = nn.Conv2d(3, 64, 10, 8, 1)
    return model


def two_layers() -> nn.Module:
    model = vit()
    model.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 64, 4, 4))
    return model


def convolved_head() -> nn.Module:
    model = vit()
    model.head = nn.Sequential(nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 5, 1), nn.Flatten())
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            overlapping,
            r"its patch embedding 'patch_embed.proj' is no convolution with a stride of its "
            r"kernel: Conv2d\(3, 64",
        ),
        (two_layers, r"2 layers before its first block have weights, not one patch embedding"),
        (convolved_head, r"'head.1' behind its last block is no linear that runs once"),
        (FromPixels, r"its outputs do not follow from the tokens behind its last block alone"),
    ],
)
def test_first_and_last_layers_that_are_no_linears_are_refused_with_the_reason(
    make: Callable[[], nn.Module], reason: str
):
    with pytest.raises(
        MarrqError,
        match=f"patch embedding and head cannot be quantized, {reason}.*: "
        "choose a scheme without -e8",
    ):
        quantized(make(), IMAGES, "W4A8-e8", "rtn")


@pytest.mark.slow
def test_pixels_get_torchs_codes_and_first_and_last_layers_run_on_integer_kernels(tmp_path: Path):
    made = quantized(vit_with_layer_scale(), IMAGES, "W4A8-e8", "gptq")
    write(trace_quantized(made, "hash"), "integer", tmp_path / "m.onnx")
    executed = executed_operators(tmp_path / "m.onnx", SessionSettings(), tmp_path)
    assert executed["MatMulIntegerToFloat"] == 2 * 6 + 2
    assert not {"Conv", "Gemm", "MatMul", "FusedMatMul"} & executed.keys()
    graph = onnx.load(tmp_path / "m.onnx")
    [kernel] = [
        node
        for node in graph.graph.node
        if node.name.startswith("patch_embed.proj.linear/MatMulIntegerToFloat")
    ]
    graph.graph.output.append(
        helper.make_tensor_value_info(kernel.input[0], onnx.TensorProto.UINT8, None)
    )
    running = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = 3 * noise(4, seed=2)  # beyond the range of calibration too
    codes = running.run([kernel.input[0]], {"pixels": pixels.numpy()})[0]
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
    quantizer = quantized_linears(made.module)["patch_embed.proj.linear"].input
    assert quantizer is not None
    np.testing.assert_array_equal(codes, quantizer.grid(patches).quantize(patches).numpy())
    assert {int(codes.min()), int(codes.max())} == {0, 255}
