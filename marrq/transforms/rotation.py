"""Rotate the residual stream of a vision transformer, so that no channel of it stands out (QuaRot,
arXiv 2404.00456).

A few channels of the stream carry values many times larger than the rest, and a grid that spans
them is too coarse for the others. An orthogonal R mixes the channels: outliers spread over all of
them. In full precision nothing changes. With x the stream, n(x) a norm without its affine map, w
and b that map, W a linear layer, γ the LayerScale after it:

    a norm n(x) w + b, read by W:       W ← W diag(w) Rᵀ,    bias ← bias + W b,    then w = 1 and b = 0
    what W adds to x, scaled by γ:      W ← R diag(γ) W,     bias ← R (γ bias),    then γ = 1
    tokens and position embeddings:     t ← R t

Where a reader of a norm has no bias to take W b (EVA's keys, DINOv3), b stays in the norm as R (b /
w).

This needs n(R x) = R n(x). QuaRot gets it for RMSNorm, to which it turns every LayerNorm by
centring the writers. Ours keeps LayerNorm: R is drawn among the orthogonal matrices with R 1 = 1.
It then keeps the mean and the variance of x, so it commutes with LayerNorm, ε included, and with
RMSNorm as well:

    R = u uᵀ + B O Bᵀ,    u = 1 / √d,    B an orthonormal basis of what is orthogonal to u,    O random orthogonal (Haar), d - 1 wide

Only the mean over the channels is not spread, which LayerNorm drops anyway.

So no module changes its class and no tensor its name or shape: the rotated weights load into the
architecture they came from. Other differences: R is a dense random matrix, not a Hadamard one, for
it costs nothing at run time; inside the heads marrq/transforms/value_basis.py does more, without an
operator at run time; QuaRot's online Hadamard before the second linear of the MLP is left out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.norm import RmsNorm, RmsNormFp32
from torch import Tensor, nn

from marrq.distributed import one_thread
from marrq.errors import MarrqError
from marrq.models.load import TransformersOutput

TOLERANCE = 1e-4
"""How much logits may differ after the rotation, relative to the largest logit: float32 rounding
gives some 1e-6."""

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)
"""Norms that commute with R."""


@torch.no_grad()
def rotate(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Rotate the residual stream of the model, in place. images: [batch, channels, height, width],
    to verify on; seed: draws R.

    Raises MarrqError, with the model as it was, when its stream cannot be rotated exactly; and when
    the logits of `images` differ after the rotation, which then has happened."""
    inner = model.model if isinstance(model, TransformersOutput) else model
    stream = _describe(inner)
    before = model(images)
    rotation = random_rotation(stream.width, torch.Generator().manual_seed(seed))
    _rotate_stream(inner, stream, rotation.to(images.device))
    difference = float((model(images) - before).abs().max() / before.abs().max())
    if not difference <= TOLERANCE:  # NaN too is a difference
        raise _refusal(
            inner,
            f"its logits changed by {difference:.1e} of the largest, more than {TOLERANCE:.0e}",
        )


@one_thread()
def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """R: [width, width], float64, orthogonal, with R 1 = 1."""
    frame = torch.eye(width, dtype=torch.float64)
    frame[:, 0] = 1
    basis = torch.linalg.qr(frame).Q  # ±u, then B
    inner = random_orthogonal(width - 1, generator)
    rotation: Tensor = (
        basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T
    )
    return rotation


@one_thread()
def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """O: [width, width], float64, uniform over the orthogonal matrices (Haar)."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal


@dataclass(frozen=True)
class Residual:
    """The residual stream of one model: paths of all that touches it.

    width: its channels; tokens: parameters [..., width] that enter it or are added to it; writers:
    linears and convolutions that add to it, each with the LayerScale after it or None; readers: its
    norms, the final one too, each with the linears that read it."""

    width: int
    tokens: tuple[str, ...]
    writers: dict[str, str | None]
    readers: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Branch:
    """What a block adds to the stream, γ ⊙ module(norm(x)), as names within the block.

    writer: the module's last linear, all its others read the norm; scale: γ, where a model has it.
    """

    norm: str
    module: str
    writer: str
    scale: str | None = None


def _rotate_stream(model: nn.Module, stream: Residual, rotation: Tensor) -> None:
    for path in stream.tokens:
        token = model.get_parameter(path)
        token.copy_(token.double() @ rotation.T)
    for path, scale in stream.writers.items():
        writer = cast(nn.Linear | nn.Conv2d, model.get_submodule(path))
        _rotate_writer(writer, None if scale is None else model.get_parameter(scale), rotation)
    for path, readers in stream.readers.items():
        _rotate_readers(
            model.get_submodule(path),
            [cast(nn.Linear, model.get_submodule(reader)) for reader in readers],
            rotation,
        )


def _rotate_writer(writer: nn.Linear | nn.Conv2d, scale: Tensor | None, rotation: Tensor) -> None:
    """W ← R diag(γ) W, bias ← R (γ bias), γ ← 1."""
    scaled = rotation if scale is None else rotation * scale.double()  # R diag(γ)
    writer.weight.copy_((scaled @ writer.weight.double().flatten(1)).view_as(writer.weight))
    if writer.bias is not None:
        writer.bias.copy_(scaled @ writer.bias.double())
    if scale is not None:
        scale.fill_(1)


def _rotate_readers(norm: Any, readers: list[nn.Linear], rotation: Tensor) -> None:
    """W ← W diag(w) Rᵀ, w ← 1; bias ← bias + W b, b ← 0, or else b ← R (b / w)."""
    gain, shift = _affine(norm, readers)
    kept = _kept_shift(gain, shift, readers)
    for reader in readers:
        parts = reader.weight.double().unflatten(
            1, (-1, len(gain))
        )  # [d_out, parts, d]: a head may read two tokens side by side
        if reader.bias is not None:
            reader.bias.copy_(reader.bias.double() + (parts @ (shift - gain * kept)).sum(1))
        reader.weight.copy_((parts * gain @ rotation.T).flatten(1))
    if norm.weight is not None:
        norm.weight.fill_(1)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(rotation @ kept)


def _affine(norm: Any, readers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """The affine map of a norm, w and b: [d], float64; 1 and 0 where it has none."""
    ones = readers[0].weight.new_ones(norm.normalized_shape, dtype=torch.float64)
    bias = getattr(norm, "bias", None)  # RMSNorm has no such attribute
    return ones if norm.weight is None else norm.weight.double(), torch.zeros_like(
        ones
    ) if bias is None else bias.double()


def _kept_shift(gain: Tensor, shift: Tensor, readers: list[nn.Linear]) -> Tensor:
    """What of b stays in the norm, before the rotation: nothing when all readers have biases to
    take it, else b / w."""
    if all(reader.bias is not None for reader in readers):
        return torch.zeros_like(shift)
    return torch.where(shift == 0, shift, shift / gain)


def _describe(model: nn.Module) -> Residual:
    """The model's stream, checked. Raises MarrqError when it is unknown or cannot be rotated
    exactly."""
    family = FAMILIES.get(f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}")
    if family is None:
        raise _refusal(
            model,
            "its residual stream is not known to be one that can be rotated, as those of "
            f"{', '.join(FAMILIES)} are",
        )
    try:
        stream = family(model)
        _check(model, stream)
    except (
        AttributeError
    ) as error:  # a path that is not there: this release of its library names modules otherwise
        raise _refusal(model, str(error)) from error
    return stream


def _refusal(model: nn.Module, reason: str) -> MarrqError:
    return MarrqError(
        f"cannot rotate {type(model).__name__}: {reason}; quantize it without rotation"
    )


def _check(model: nn.Module, stream: Residual) -> None:
    """All that the stream names can be rotated, and it names every linear."""
    for path in stream.writers:
        writer = model.get_submodule(path)
        if not isinstance(writer, nn.Linear | nn.Conv2d) or len(writer.weight) != stream.width:
            raise _refusal(
                model, f"{path} is no linear or convolution that writes {stream.width} channels"
            )
    for path, readers in stream.readers.items():
        _check_readers(model, path, readers, stream.width)
    described = {
        *stream.writers,
        *(reader for readers in stream.readers.values() for reader in readers),
    }
    unknown = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path not in described
    ]
    if unknown:
        raise _refusal(model, f"what {unknown[0]} reads and writes is not known")


def _check_readers(model: nn.Module, path: str, readers: tuple[str, ...], width: int) -> None:
    norm = model.get_submodule(path)
    if not isinstance(norm, NORMS):
        raise _refusal(model, f"{path} is a {type(norm).__name__}, no LayerNorm or RMSNorm")
    linears = [
        module
        for module in map(model.get_submodule, readers)
        if isinstance(module, nn.Linear) and module.in_features % width == 0
    ]
    if len(linears) != len(readers):
        raise _refusal(
            model, f"not all of {', '.join(readers)} are linears that read {width} channels"
        )
    if not _kept_shift(*_affine(norm, linears), linears).isfinite().all():
        raise _refusal(
            model,
            f"{path} has a weight of zero, and not all of {', '.join(readers)} have a bias to take "
            "its own",
        )


def _timm(model: Any) -> Residual:
    """The stream of timm's ViT (DeiT, DINOv2), with a distillation token or without, and of its Eva
    (EVA-02, DINOv3)."""
    _check_timm(model)
    scales = ("gamma_1", "gamma_2") if type(model).__name__ == "Eva" else ("ls1.gamma", "ls2.gamma")
    branches = (
        Branch("norm1", "attn", "attn.proj", scales[0]),
        Branch("norm2", "mlp", "mlp.fc2", scales[1]),
    )
    tokens = ("cls_token", "reg_token", "dist_token", "pos_embed")
    final_norm = "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"
    heads = ("head", "head_dist") if hasattr(model, "head_dist") else ("head",)
    return _stream(model, "patch_embed.proj", tokens, "blocks", branches, final_norm, heads)


def _check_timm(model: Any) -> None:
    """None of the options is set with which the stream does not commute with R."""
    for name, norm in (
        ("norm_pre", model.norm_pre),
        ("patch_embed.norm", getattr(model.patch_embed, "norm", nn.Identity())),
    ):
        if not isinstance(norm, nn.Identity):
            raise _refusal(
                model, f"{name} multiplies each channel of the stream by a weight of its own"
            )
    for block in model.blocks:
        if type(block).__name__ not in ("Block", "EvaBlock"):
            raise _refusal(
                model,
                f"its blocks are of class {type(block).__name__}, not known to normalize all they "
                "read from the stream",
            )
    if model.global_pool not in ("token", "avg"):
        raise _refusal(model, f"its pooling {model.global_pool!r} is not linear in the stream")
    if isinstance(model.norm, nn.Identity) == isinstance(model.fc_norm, nn.Identity):
        raise _refusal(model, "not exactly one of norm and fc_norm stands before its head")


def _transformers_vit(model: Any) -> Residual:
    """The stream of transformers' ViT and DeiT, the latter with one head or two."""
    root = model.base_model_prefix
    branches = (
        Branch("layernorm_before", "attention", "attention.o_proj"),
        Branch("layernorm_after", "mlp", "mlp.fc2"),
    )
    heads = (
        ("cls_classifier", "distillation_classifier")
        if hasattr(model, "cls_classifier")
        else ("classifier",)
    )
    return _transformers(model, f"{root}.layers", branches, heads)


def _transformers_dinov2(model: Any) -> Residual:
    """The stream of transformers' DINOv2, with registers or without. Its head reads the class token
    and the patches' mean side by side."""
    writer = "mlp.down_proj" if model.config.use_swiglu_ffn else "mlp.fc2"
    attention = Branch("norm1", "attention", "attention.o_proj", "layer_scale1.lambda1")
    branches = attention, Branch("norm2", "mlp", writer, "layer_scale2.lambda1")
    return _transformers(
        model, f"{model.base_model_prefix}.encoder.layer", branches, ("classifier",)
    )


def _transformers(
    model: Any, blocks: str, branches: tuple[Branch, ...], heads: tuple[str, ...]
) -> Residual:
    """What these families of transformers have in common: the names of the embeddings and of the
    final norm."""
    root = model.base_model_prefix
    names = (
        "cls_token",
        "distillation_token",
        "register_tokens",
        "mask_token",
        "position_embeddings",
    )
    tokens = tuple(f"{root}.embeddings.{name}" for name in names)
    return _stream(
        model,
        f"{root}.embeddings.patch_embeddings.projection",
        tokens,
        blocks,
        branches,
        f"{root}.layernorm",
        heads,
    )


def _stream(
    model: nn.Module,
    embedding: str,
    tokens: tuple[str, ...],
    blocks: str,
    branches: tuple[Branch, ...],
    final_norm: str,
    heads: tuple[str, ...],
) -> Residual:
    """The stream of a model whose blocks are alike. Of the tokens and scales, those that the model
    has."""
    parameters = dict(model.named_parameters())
    writers: dict[str, str | None] = {embedding: None}
    readers: dict[str, tuple[str, ...]] = {}
    for name, _ in model.get_submodule(blocks).named_children():
        for branch in branches:
            path = f"{blocks}.{name}"
            writer, scale = f"{path}.{branch.writer}", f"{path}.{branch.scale}"
            writers[writer] = scale if scale in parameters else None
            linears = _linears(model, f"{path}.{branch.module}")
            readers[f"{path}.{branch.norm}"] = tuple(
                linear for linear in linears if linear != writer
            )
    readers[final_norm] = heads
    width = len(model.get_parameter(f"{embedding}.weight"))
    return Residual(
        width, tuple(token for token in tokens if token in parameters), writers, readers
    )


def _linears(model: nn.Module, path: str) -> list[str]:
    return [
        f"{path}.{name}"
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear)
    ]


FAMILIES: dict[str, Callable[[Any], Residual]] = {
    "timm.VisionTransformer": _timm,
    "timm.VisionTransformerDistilled": _timm,
    "timm.Eva": _timm,
    "transformers.ViTForImageClassification": _transformers_vit,
    "transformers.DeiTForImageClassification": _transformers_vit,
    "transformers.DeiTForImageClassificationWithTeacher": _transformers_vit,
    "transformers.Dinov2ForImageClassification": _transformers_dinov2,
    "transformers.Dinov2WithRegistersForImageClassification": _transformers_dinov2,
}
"""What describes the stream of a model, by library and class."""
