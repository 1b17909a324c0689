"""Blocks are found by trial, not by name, and what cannot be handled is refused."""

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from marrq.errors import MarrqError
from marrq.models.blocks import find_blocks
from marrq.models.transformers_output import TransformersOutput

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SEPARATE = (
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.o_proj",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)
FUSED = (("attn.qkv",), ("attn.proj",), ("mlp.fc1",), ("mlp.fc2",))


def small_timm(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments).eval()


def timm_swin() -> nn.Module:
    arguments = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    }
    return small_timm("swin_tiny_patch4_window7_224", **arguments)


def transformers_swin() -> nn.Module:
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return TransformersOutput(SwinForImageClassification(config)).eval()


MODELS = {
    "timm vit": (
        lambda: small_timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2),
        ["blocks.0", "blocks.1"],
        FUSED,
    ),
    "timm swin": (
        timm_swin,
        [
            "layers.0.blocks.0",
            "layers.0.blocks.1",
            "layers.1.downsample",
            "layers.1.blocks.0",
            "layers.1.blocks.1",
        ],
        FUSED,
    ),
    "vit": (
        lambda: TransformersOutput(ViTForImageClassification(ViTConfig(**SMALL))).eval(),
        ["model.vit.layers.0", "model.vit.layers.1"],
        SEPARATE,
    ),
    "dinov2": (
        lambda: TransformersOutput(Dinov2ForImageClassification(Dinov2Config(**SMALL))).eval(),
        ["model.dinov2.encoder.layer.0", "model.dinov2.encoder.layer.1"],
        SEPARATE,
    ),
    "swin": (
        transformers_swin,
        [
            f"model.swin.encoder.layers.{name}"
            for name in ("0.blocks.0", "0.blocks.1", "0.downsample", "1.blocks.0", "1.blocks.1")
        ],
        SEPARATE,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_each_family_form_a_chain_with_grouped_linears(name: str):
    make, paths, groups = MODELS[name]
    model, images = make(), torch.randn(3, 3, 32, 32)
    blocks = find_blocks(model, images)
    assert [block.path for block in blocks] == paths
    assert blocks[0].groups == groups
    with torch.no_grad():
        tokens = blocks[0].input_from(model, images)
        for block in blocks:
            expected = block.input_from(model, images)
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
            tokens = block(tokens)


def test_the_input_of_a_linear_is_what_the_whole_forward_gives_it():
    model, images = MODELS["timm vit"][0](), torch.randn(2, 3, 32, 32)
    block = find_blocks(model, images)[1]
    seen: list[Tensor] = []
    handle = block.module.mlp.fc2.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model(images)
        handle.remove()
        assert torch.equal(block.input_of("mlp.fc2", block.input_from(model, images)), seen[0])


@torch.no_grad()
def test_nothing_behind_a_linear_is_computed_for_its_input_and_no_hook_stays():
    model, images = MODELS["timm vit"][0](), torch.randn(2, 3, 32, 32)
    block = find_blocks(model, images)[0]
    tokens, calls = block.input_from(model, images), []
    handle = block.module.mlp.fc2.register_forward_hook(lambda *_: calls.append(1))
    block.input_of("mlp.fc1", tokens)
    assert not calls
    block(tokens)
    assert calls == [1]
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_copied_block_has_parameters_of_its_own():
    model, images = MODELS["timm vit"][0](), torch.randn(2, 3, 32, 32)
    block = find_blocks(model, images)[1]
    tokens, copy = block.input_from(model, images), block.copied()
    before = copy(tokens)
    block.linear("mlp.fc2").weight.zero_()
    assert torch.equal(copy(tokens), before)
    assert not torch.equal(block(tokens), before)


@torch.no_grad()
def test_values_that_are_not_numbers_do_not_break_the_chain():
    model = MODELS["timm vit"][0]()
    model.blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    assert [block.path for block in find_blocks(model, torch.randn(2, 3, 32, 32))] == [
        "blocks.0",
        "blocks.1",
    ]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(MarrqError, match="no repeated blocks"):
        find_blocks(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(2, 3, 2, 2))


class Skipping(nn.Module):
    """Its second block's input is not the first one's output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.blocks[1](first + x)


def test_a_block_that_does_not_take_what_the_one_before_gave_is_marked():
    assert [block.follows for block in find_blocks(Skipping(), torch.randn(2, 5, 4))] == [
        False,
        False,
    ]
    assert [
        block.follows for block in find_blocks(MODELS["timm vit"][0](), torch.randn(2, 3, 32, 32))
    ] == [False, True]


class Conditioned(nn.Module):
    """Its block is called with something else that depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].fc = nn.Linear(4, 4)
        self.blocks[0].forward = lambda x, shift: self.blocks[0].fc(x) + shift  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x, x.mean())


def test_a_block_that_reads_more_of_the_images_than_its_tokens_is_refused_by_name():
    with pytest.raises(MarrqError, match=r"block 'blocks\.0' gives other tokens alone"):
        find_blocks(Conditioned(), torch.randn(2, 5, 4))


class WithPositions(nn.Module):
    """Its block has a linear that does not see the tokens, as Swin v2 has for relative
    positions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].fc, self.blocks[0].positions = nn.Linear(4, 4), nn.Linear(2, 4)
        self.blocks[0].forward = lambda x: (
            self.blocks[0].fc(x) + self.blocks[0].positions(torch.ones(5, 2))
        )  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_a_linear_whose_input_does_not_depend_on_the_images_is_left_out():
    assert find_blocks(WithPositions(), torch.randn(2, 5, 4))[0].groups == (("fc",),)


class Functional(nn.Module):
    """Uses a linear's weight without calling the linear."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].fc = nn.Linear(4, 4)
        self.blocks[0].forward = lambda x: nn.functional.linear(x, self.blocks[0].fc.weight)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_a_linear_that_is_never_called_is_refused_by_name():
    with pytest.raises(MarrqError, match=r"linear blocks\.0\.fc is called 0 times"):
        find_blocks(Functional(), torch.randn(2, 5, 4))


class TwoStreams(nn.Module):
    """Its block changes two streams of tokens, as TNT's does: the first does not need the
    second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].fc = nn.Linear(4, 4)
        self.blocks[0].forward = lambda x, y: (  # type: ignore[method-assign]
            self.blocks[0].fc(x),
            y + x,
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks[0](x, x.flip(-1))
        return first + second


def test_a_block_with_a_second_stream_of_tokens_is_refused_by_name():
    with pytest.raises(MarrqError, match=r"block 'blocks\.0' gives other tokens alone"):
        find_blocks(TwoStreams(), torch.randn(2, 5, 4))


class TableOfImages(nn.Module):
    """Gives its block a table that has a row for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].fc = nn.Linear(4, 4)
        self.blocks[0].forward = lambda x, table: torch.cat(  # type: ignore[method-assign]
            [self.blocks[0].fc(x), table], dim=1
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x, torch.ones(len(x), 1, 4))


def test_a_block_whose_arguments_depend_on_the_number_of_images_is_refused_by_name():
    with pytest.raises(MarrqError, match=r"block 'blocks\.0' gives other tokens alone"):
        find_blocks(TableOfImages(), torch.randn(2, 5, 4))


TWINS = {
    "img_size": 32,
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (1, 2, 2, 2),
    "depths": (1, 1, 1, 1),
}


@pytest.mark.parametrize(
    ("name", "arguments", "paths"),
    [
        # A list of lists, of which the inner lists are never called.
        ("twins_svt_small", TWINS, [f"blocks.{stage}.0" for stage in range(4)]),
        # A list with a number in its name.
        (
            "coat_lite_tiny",
            {"img_size": 32, "serial_depths": (1, 1, 1, 1)},
            [f"serial_blocks{stage}.0" for stage in range(1, 5)],
        ),
        # Blocks that read class token and patches apart are no candidates: they stay as they are.
        (
            "cait_xxs24_224",
            {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
            ["blocks.0"],
        ),
        # Blocks in a sequence in a list, beside one that is called by hand.
        (
            "davit_tiny",
            {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)},
            [f"stages.{stage}.blocks.0.{index}" for stage in range(2) for index in range(2)],
        ),
    ],
)
def test_blocks_are_the_innermost_modules_that_run(
    name: str, arguments: dict[str, object], paths: list[str]
):
    blocks = find_blocks(small_timm(name, **arguments), torch.randn(2, 3, 32, 32))
    assert [block.path for block in blocks] == paths
    assert all(block.groups for block in blocks)


class OnPositions(nn.Module):
    """A block whose linear makes a bias of positions and reads no token, as in CoAtNet."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Buffer(torch.randn(4, 8))
        self.mlp = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mlp(self.positions)


def test_a_model_whose_linears_read_no_token_is_refused():
    model = nn.Module()
    model.blocks = nn.Sequential(OnPositions(), OnPositions())
    model.forward = lambda image: model.blocks(image.reshape(len(image), -1, 8)[:, :4])
    with pytest.raises(MarrqError, match="no linear of the model's blocks reads the image"):
        find_blocks(model.eval(), torch.randn(1, 3, 8, 8))
