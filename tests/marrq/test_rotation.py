"""A rotated model is the same function, and no channel of its stream stands out.

A model that cannot be rotated is refused.
"""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.mlp import GluMlp
from timm.layers.norm import RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from tiny_models import TRANSFORMERS, randomized
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from marrq.errors import MarrqError
from marrq.models.load import load_model
from marrq.models.transformers_output import TransformersOutput
from marrq.transforms.rotation import random_rotation, rotate

TIMM = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}
ROPE = {**TIMM, "use_rot_pos_emb": True}


def vit(**arguments: object) -> nn.Module:
    return randomized(VisionTransformer(**{**TIMM, **arguments}))


def eva(**arguments: object) -> nn.Module:
    return randomized(Eva(**{**TIMM, **arguments}))


def transformers(model: type[nn.Module], config: type, **arguments: object) -> nn.Module:
    return randomized(TransformersOutput(model(config(**TRANSFORMERS, **arguments))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit, mean of the patches": lambda: vit(global_pool="avg"),
    "vit, mean of the patches, norm before it": lambda: vit(global_pool="avg", fc_norm=False),
    "vit, no biases in qkv": lambda: vit(qkv_bias=False),
    "vit, no biases, SwiGLU, norms within": lambda: vit(
        qkv_bias=False,
        proj_bias=False,
        mlp_layer=GluMlp,
        qk_norm=True,
        scale_attn_norm=True,
        scale_mlp_norm=True,
    ),
    "vit, RMSNorm": lambda: vit(norm_layer=RmsNorm, qkv_bias=False),
    "vit, norms without affine maps": lambda: vit(
        norm_layer=lambda width, **_: nn.LayerNorm(width, elementwise_affine=False)
    ),
    "deit": lambda: randomized(timm.create_model("deit_tiny_distilled_patch16_224", **TIMM)),
    "deit 3": lambda: vit(no_embed_class=True, init_values=1e-6),
    "dinov2": lambda: vit(
        init_values=1e-5, reg_tokens=4, no_embed_class=True, dynamic_img_size=True
    ),
    "eva": lambda: eva(init_values=0.1),
    "eva 2": lambda: eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True, **ROPE),
    "eva 2, small": lambda: eva(
        swiglu_mlp=True, scale_attn_inner=True, global_pool="token", **ROPE
    ),
    "dinov3": lambda: eva(
        qkv_bias=False,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        init_values=1e-5,
        **ROPE,
    ),
    "transformers vit": lambda: transformers(ViTForImageClassification, ViTConfig),
    "transformers deit": lambda: transformers(DeiTForImageClassification, DeiTConfig),
    "transformers deit, two heads": lambda: transformers(
        DeiTForImageClassificationWithTeacher, DeiTConfig
    ),
    "transformers dinov2": lambda: transformers(Dinov2ForImageClassification, Dinov2Config),
    "transformers dinov2, SwiGLU": lambda: transformers(
        Dinov2ForImageClassification, Dinov2Config, use_swiglu_ffn=True
    ),
    "transformers dinov2, registers": lambda: transformers(
        Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig
    ),
}

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            embed_dim=24,
            depths=(2, 2),
            window_size=4,
        ),
        "cannot rotate SwinTransformer: its residual stream is not known to be one that can be "
        "rotated",
    ),
    "norm before the blocks": (
        lambda: vit(pre_norm=True),
        "VisionTransformer: norm_pre multiplies",
    ),
    "norm in the embedding": (
        lambda: vit(embed_norm_layer=nn.LayerNorm),
        "patch_embed.norm multiplies",
    ),
    "norm after the branch": (lambda: vit(block_fn=ResPostBlock), "class ResPostBlock"),
    "eva, norm after the branch": (
        lambda: eva(use_post_norm=True),
        "cannot rotate Eva: its blocks are of class EvaBlockPostNorm",
    ),
    "largest of the patches": (lambda: vit(global_pool="max"), "pooling 'max' is not linear"),
    "attention as pooling": (lambda: vit(global_pool="map"), "pooling 'map' is not linear"),
    "two norms at the end": (
        lambda: eva(use_post_transformer_norm=True, use_fc_norm=True),
        "not exactly one of norm and fc_norm",
    ),
    "no head": (lambda: vit(num_classes=0), "not all of head are linears that read 48 channels"),
    "another kind of norm": (
        lambda: vit(norm_layer=lambda width, **_: nn.Tanh()),
        "blocks.0.norm1 is a Tanh, no LayerNorm or RMSNorm",
    ),
    "no second linear": (
        lambda: without_second_linear(vit()),
        "blocks.1.mlp.fc2 is no linear or convolution that writes 48 channels",
    ),
    "a linear nobody knows": (
        lambda: with_linear(vit()),
        "what blocks.1.extra reads and writes is not known",
    ),
    "a weight of zero and no bias": (
        lambda: with_zero(vit(qkv_bias=False)),
        "blocks.1.norm1 has a weight of zero, and not all of",
    ),
    "modules named otherwise": (lambda: without_final_norm(), "has no attribute `layernorm`"),
}


def without_second_linear(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.1.mlp").fc2 = nn.Identity()
    return model


def with_linear(model: nn.Module) -> nn.Module:
    model.get_submodule("blocks.1").extra = nn.Linear(48, 48)
    return model


@torch.no_grad()
def with_zero(model: nn.Module) -> nn.Module:
    model.get_parameter("blocks.1.norm1.weight")[7] = 0
    return model


def without_final_norm() -> nn.Module:
    model = transformers(ViTForImageClassification, ViTConfig)
    del model.get_submodule("model.vit").layernorm
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def peak(model: nn.Module, images: Tensor) -> float:
    """The largest value in the stream between the blocks, relative to its root mean square."""
    reached: list[Tensor] = []
    handle = model.get_submodule("blocks.1").register_forward_pre_hook(
        lambda _, arguments: reached.append(arguments[0])
    )
    model(images)
    handle.remove()
    return float(reached[0].abs().max() / reached[0].square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_as_they_were(name: str, images: Tensor):
    model = MODELS[name]()
    before = model(images)
    rotate(model, images[:1])
    assert before.std() > 0.1
    assert (model(images) - before).abs().max() <= 1e-4 * before.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rotated_weights_load_into_the_architecture_they_came_from(name: str, images: Tensor):
    model, fresh = MODELS[name](), MODELS[name]()
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rotate(model, images[:1])
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(images), model(images))
    matrices = [key for key in original if key.endswith("weight") and original[key].dim() > 1]
    assert len(matrices) >= 10
    assert all((model.state_dict()[key] - original[key]).abs().max() > 0.01 for key in matrices)


@pytest.mark.parametrize("width", [2, 48, 192])
def test_the_rotation_is_orthogonal_and_keeps_the_ones(width: int):
    rotation = random_rotation(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(rotation.sum(1), torch.ones(width, dtype=torch.float64))


def test_the_rotation_commutes_with_layer_norm_and_keeps_its_epsilon():
    rotation = random_rotation(48, torch.Generator().manual_seed(0))
    x = torch.randn(10, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 3
    norm = nn.LayerNorm(48, eps=0.1, elementwise_affine=False)
    torch.testing.assert_close(norm(x @ rotation.T), norm(x) @ rotation.T)


def test_norms_and_layer_scales_are_ones_and_zeros_afterwards(images: Tensor):
    model = MODELS["dinov2"]()
    rotate(model, images)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("gamma"):
            assert torch.equal(
                parameter, torch.full_like(parameter, float(not name.endswith("bias")))
            ), name


@torch.no_grad()
def test_a_channel_that_stands_out_is_spread_over_all(images: Tensor):
    model = vit()
    model.get_parameter("pos_embed")[..., 7] += 50
    before = peak(model, images)
    rotate(model, images)
    assert before > 6  # the square root of the width, 6.9, is the most there can be
    assert peak(model, images) < 4


def test_the_seed_alone_decides_the_rotation(images: Tensor):
    first, second, third = vit(), vit(), vit()
    rotate(first, images, seed=1)
    rotate(second, images[:1], seed=1)
    rotate(third, images, seed=2)
    weights = [model.get_parameter("blocks.0.attn.qkv.weight") for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=0.1)


@torch.no_grad()
def test_the_demo_can_be_rotated():
    demo = load_model("demo")
    images = torch.rand(
        4, *demo.preprocessing.input_size, generator=torch.Generator().manual_seed(0)
    )
    before = demo.module(images)
    rotate(demo.module, images)
    torch.testing.assert_close(demo.module(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_rotated_is_refused_with_the_reason_and_left_alone(
    name: str, images: Tensor
):
    build, reason = REFUSED[name]
    model = build().eval()
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(MarrqError, match=reason):
        rotate(model, images)
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


def test_a_rotation_that_changes_the_logits_is_an_error(images: Tensor):
    model = vit()
    model.get_submodule("blocks.0").register_forward_hook(
        lambda module, arguments, tokens: tokens * torch.linspace(0.5, 1.5, 48)
    )
    with pytest.raises(
        MarrqError,
        match=r"cannot rotate VisionTransformer: its outputs changed by \d\.\de[+-]\d\d of the",
    ):
        rotate(model, images)
