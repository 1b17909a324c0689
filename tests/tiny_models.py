"""Tiny models of several families with random weights that nothing was trained for, and a short way
to quantize them."""

import hashlib
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from marrq.artifact.tensors import tensors_of
from marrq.methods.spec import parse_method
from marrq.models.load import ModelSource, VisionModel
from marrq.models.preprocessing import Preprocessing
from marrq.models.transformers_models import ATTENTION
from marrq.models.transformers_output import TransformersOutput
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import (
    BATCH_SIZE,
    CalibrationRecord,
    QuantizationSettings,
    QuantizedModel,
)
from marrq.schemes import ActivationStrategy, parse_scheme

VIT = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 5,
}
WIDTHS = {
    "blocks.0.attn.qkv": 4,
    "blocks.0.attn.proj": 2,
    "blocks.0.mlp.fc1": 3,
    "blocks.0.mlp.fc2": 8,
    "blocks.1.attn.qkv": 3,
    "blocks.1.attn.proj": 8,
    "blocks.1.mlp.fc1": 2,
    "blocks.1.mlp.fc2": 4,
}
"""Weight bits of the linears of `vit()`, every width twice."""
TRANSFORMERS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Every parameter with a value that is neither 0 nor 1; vectors that multiply (norm,
    LayerScale) stay away from 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.uniform_(0.3, 1.7, generator=generator)
        else:
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def vit(**changes: object) -> nn.Module:
    return randomized(timm.create_model(**{**VIT, **changes}))


def vit_with_layer_scale() -> nn.Module:
    return vit(init_values=1e-5)


@torch.no_grad()
def vit_with_strong_channels() -> nn.Module:
    """fc2 gets channels of very different size, as a trained model's GELU gives them."""
    model = vit()
    for block in model.blocks:
        block.mlp.fc1.weight *= torch.logspace(-0.75, 0.75, 128)[:, None]
        block.mlp.fc2.weight *= torch.logspace(0.75, -0.75, 128)
    return model


def distilled() -> nn.Module:
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    return randomized(timm.create_model("deit_tiny_distilled_patch16_224", **arguments))


def swin() -> nn.Module:
    arguments = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
    }
    return randomized(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments))


def transformers_vit() -> nn.Module:
    return randomized(
        TransformersOutput(
            ViTForImageClassification._from_config(
                ViTConfig(**TRANSFORMERS), attn_implementation=ATTENTION
            )
        )
    )


def dinov2() -> nn.Module:
    return randomized(
        TransformersOutput(
            Dinov2ForImageClassification._from_config(
                Dinov2Config(**TRANSFORMERS), attn_implementation=ATTENTION
            )
        )
    )


def noise(count: int, seed: int = 0) -> Tensor:
    """Images [count, 3, 32, 32]."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def vision_model(module: nn.Module) -> VisionModel:
    """A module with what belongs to it; its source is that of `vit()`."""
    preprocessing = Preprocessing(
        (3, 32, 32), "bicubic", (35, 35), "center", (0.5,) * 3, (0.5,) * 3
    )
    source = ModelSource("tiny", "timm", VIT, "", ("logits",))
    return VisionModel(module, source, preprocessing, tuple("abcde"))


def quantized(
    module: nn.Module,
    images: Tensor,
    scheme: str,
    method: str,
    device: str = "cpu",
    strategy: ActivationStrategy = "per-tensor",
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> QuantizedModel:
    """The module quantized in place; method as `parse_method` takes it, options as `RunOptions`
    does. A mixed scheme has the WIDTHS, which are those of `vit()`."""
    settings = QuantizationSettings(
        parse_scheme(scheme, strategy),
        parse_method(method),
        CalibrationRecord("noise", len(images), 0, "", batch_size),
        WIDTHS if scheme.startswith("Wmix") else {},
    )
    run = RunOptions(torch.device(device), **options)
    return quantize(vision_model(module), images, settings, run)


def hashed(model: QuantizedModel) -> str:
    """A hash of all tensors and reports."""
    digest = hashlib.sha256(repr(model.reports).encode())
    for name, tensor in sorted(tensors_of(model.module).items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def output_of(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """What the module at a path gives when the model gets the images."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    with torch.no_grad(), model.get_submodule(path).register_forward_hook(keep):
        model(images)
    return seen[0]
