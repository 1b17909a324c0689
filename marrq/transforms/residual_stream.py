"""Which modules of a model write to its residual stream, and which read from it.

    x ← embedding(image) + tokens       tokens: class token, registers, position embedding
    x ← x + γ ⊙ branch(norm(x))         twice in every block; γ: LayerScale, if the model has it
    logits = head(norm(x))

Rotation must reach every module that touches x, so this file knows families by name: `FAMILIES`
maps the class of a model to its layout. The layout says where the modules are; the model is then
checked against it, and a linear that the layout does not mention is a reason to refuse the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers.norm import RmsNorm, RmsNormFp32
from torch import nn

from marrq.errors import MarrqError

NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)
"""Norms n with n(R x) = R n(x) for the rotations R of marrq/transforms/rotation.py."""


@dataclass(frozen=True)
class ResidualStream:
    """The modules that touch the residual stream of one model, by their paths.

    width: channels of the stream.
    tokens: parameters [..., width] that enter the stream or are added to it.
    writers: linears and convolutions that add to the stream, each with the path of the LayerScale
        behind it, or None.
    readers: norms that read the stream, the final norm too, each with the linears behind it.
    """

    width: int
    tokens: tuple[str, ...]
    writers: dict[str, str | None]
    readers: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Branch:
    """What a block adds to the stream, γ ⊙ module(norm(x)), by names within the block.

    writer: the last linear of `module`; all its other linears read the norm.
    scale: γ; models without LayerScale lack this parameter.
    """

    norm: str
    module: str
    writer: str
    scale: str | None = None


@dataclass(frozen=True)
class Layout:
    """Where a family keeps the modules that touch its stream.

    embedding: path of the patch embedding, a convolution.
    tokens: parameters of the stream; a model need not have all of them.
    blocks: path of the list of blocks, which are alike.
    branches: what each block adds to the stream.
    final_norm: path of the norm before the heads.
    heads: linears that read the final norm.
    """

    embedding: str
    tokens: tuple[str, ...]
    blocks: str
    branches: tuple[Branch, ...]
    final_norm: str
    heads: tuple[str, ...]


def residual_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model of timm or transformers.

    Raises MarrqError if the family is unknown, or if the model differs from its family in a way
    that makes an exact rotation impossible.
    """
    # By the exact class: a subclass may read the stream in other places.
    library = type(model).__module__.partition(".")[0]
    family = FAMILIES.get(f"{library}.{type(model).__name__}")
    if family is None:
        raise refusal(
            model,
            "its residual stream is not known to be one that can be rotated, as those of "
            f"{', '.join(FAMILIES)} are",
        )
    try:
        stream = _stream(model, family(model))
        _check(model, stream)
    except AttributeError as error:
        # A path does not exist: another release of the library names its modules differently.
        raise refusal(model, str(error)) from error
    return stream


def refusal(model: nn.Module, reason: str) -> MarrqError:
    """The error that says why a model cannot be rotated."""
    return MarrqError(
        f"cannot rotate {type(model).__name__}: {reason}; quantize it without rotation"
    )


def _stream(model: nn.Module, layout: Layout) -> ResidualStream:
    """The layout with the paths of every block, and without the parameters that are missing."""
    # The patch embedding writes first; it has no LayerScale.
    parameters = dict(model.named_parameters())
    writers: dict[str, str | None] = {layout.embedding: None}
    readers: dict[str, tuple[str, ...]] = {}
    for name, _ in model.get_submodule(layout.blocks).named_children():
        for branch in layout.branches:
            path = f"{layout.blocks}.{name}"
            # Without LayerScale the path ends in ".None", which no parameter has.
            writer, scale = f"{path}.{branch.writer}", f"{path}.{branch.scale}"
            writers[writer] = scale if scale in parameters else None
            # Every linear of attention or MLP but the last reads the norm: q, k, v; fc1 and gate.
            linears = _linears(model, f"{path}.{branch.module}")
            readers[f"{path}.{branch.norm}"] = tuple(
                linear for linear in linears if linear != writer
            )
    readers[layout.final_norm] = layout.heads
    # The patch embedding has one output channel for each channel of the stream.
    return ResidualStream(
        width=len(model.get_parameter(f"{layout.embedding}.weight")),
        tokens=tuple(token for token in layout.tokens if token in parameters),
        writers=writers,
        readers=readers,
    )


def _linears(model: nn.Module, path: str) -> list[str]:
    return [
        f"{path}.{name}"
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear)
    ]


def _check(model: nn.Module, stream: ResidualStream) -> None:
    """Refuse a model with a module that cannot be rotated, or with a linear out of place."""
    # R mixes the output channels of a writer: they must be the channels of the stream.
    for path in stream.writers:
        writer = model.get_submodule(path)
        if not isinstance(writer, nn.Linear | nn.Conv2d) or len(writer.weight) != stream.width:
            raise refusal(
                model, f"{path} is no linear or convolution that writes {stream.width} channels"
            )
    for path, readers in stream.readers.items():
        _check_readers(model, path, readers, stream.width)
    # A linear that is neither writer nor reader might touch the stream unnoticed.
    described = {*stream.writers}.union(*stream.readers.values())
    unknown = [path for path in _all_linears(model) if path not in described]
    if unknown:
        raise refusal(model, f"what {unknown[0]} reads and writes is not known")


def _all_linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _check_readers(model: nn.Module, path: str, readers: tuple[str, ...], width: int) -> None:
    """Refuse a norm that does not commute with the rotation, or readers of another width."""
    # A norm with statistics of single channels, such as BatchNorm, is not the same after R.
    norm = model.get_submodule(path)
    if not isinstance(norm, NORMS):
        raise refusal(model, f"{path} is a {type(norm).__name__}, no LayerNorm or RMSNorm")
    for linear in map(model.get_submodule, readers):
        # A multiple of the width is allowed: a head may read two tokens side by side.
        if not isinstance(linear, nn.Linear) or linear.in_features % width:
            raise refusal(
                model, f"not all of {', '.join(readers)} are linears that read {width} channels"
            )


def _timm(model: Any) -> Layout:
    """The layout of timm's VisionTransformer (ViT, DeiT, DINOv2) and Eva (EVA-02, DINOv3)."""
    # Eva keeps LayerScale as parameters of the block, VisionTransformer as modules.
    _check_timm(model)
    scales = ("gamma_1", "gamma_2") if type(model).__name__ == "Eva" else ("ls1.gamma", "ls2.gamma")
    return Layout(
        embedding="patch_embed.proj",
        tokens=("cls_token", "reg_token", "dist_token", "pos_embed"),
        blocks="blocks",
        branches=(
            Branch("norm1", "attn", "attn.proj", scales[0]),
            Branch("norm2", "mlp", "mlp.fc2", scales[1]),
        ),
        final_norm="fc_norm" if isinstance(model.norm, nn.Identity) else "norm",
        heads=("head", "head_dist") if hasattr(model, "head_dist") else ("head",),
    )


def _check_timm(model: Any) -> None:
    """Refuse options of timm with which the model does not commute with a rotation."""
    for name, norm in (
        ("norm_pre", model.norm_pre),
        ("patch_embed.norm", getattr(model.patch_embed, "norm", nn.Identity())),
    ):
        # The output of these norms enters the stream, so no linear can take their weight in.
        if not isinstance(norm, nn.Identity):
            raise refusal(
                model, f"{name} multiplies each channel of the stream by a weight of its own"
            )
    # A block that normalizes what it writes multiplies each channel of x by a weight.
    for block in model.blocks:
        if type(block).__name__ not in ("Block", "EvaBlock"):
            raise refusal(
                model,
                f"its blocks are of class {type(block).__name__}, not known to normalize all they "
                "read from the stream",
            )
    # A maximum over tokens, or attention pooling, does not commute with R.
    if model.global_pool not in ("token", "avg"):
        raise refusal(model, f"its pooling {model.global_pool!r} is not linear in the stream")
    # With no norm the head reads x itself; with two the weight of the first has no linear to go to.
    if isinstance(model.norm, nn.Identity) == isinstance(model.fc_norm, nn.Identity):
        raise refusal(model, "not exactly one of norm and fc_norm stands before its head")


def _transformers_vit(model: Any) -> Layout:
    """The layout of transformers' ViT, and of its DeiT with one head or two."""
    branches = (
        Branch("layernorm_before", "attention", "attention.o_proj"),
        Branch("layernorm_after", "mlp", "mlp.fc2"),
    )
    # A distilled DeiT has two heads, each reading a token of its own.
    distilled = hasattr(model, "cls_classifier")
    heads = ("cls_classifier", "distillation_classifier") if distilled else ("classifier",)
    return _transformers(model, "layers", branches, heads)


def _transformers_dinov2(model: Any) -> Layout:
    """The layout of transformers' DINOv2, with or without registers.

    Its head reads the class token and the mean of the patches side by side.
    """
    # DINOv2-g has a gated MLP, whose linears have other names.
    writer = "mlp.down_proj" if model.config.use_swiglu_ffn else "mlp.fc2"
    branches = (
        Branch("norm1", "attention", "attention.o_proj", "layer_scale1.lambda1"),
        Branch("norm2", "mlp", writer, "layer_scale2.lambda1"),
    )
    return _transformers(model, "encoder.layer", branches, ("classifier",))


def _transformers(
    model: Any, blocks: str, branches: tuple[Branch, ...], heads: tuple[str, ...]
) -> Layout:
    """The layout that these families of transformers share. blocks: path within the base model."""
    # The base model is an attribute of the classifier: `vit`, `deit`, `dinov2`, …
    root = model.base_model_prefix
    tokens = (
        "cls_token",
        "distillation_token",
        "register_tokens",
        "mask_token",
        "position_embeddings",
    )
    return Layout(
        embedding=f"{root}.embeddings.patch_embeddings.projection",
        tokens=tuple(f"{root}.embeddings.{name}" for name in tokens),
        blocks=f"{root}.{blocks}",
        branches=branches,
        final_norm=f"{root}.layernorm",
        heads=heads,
    )


FAMILIES: dict[str, Callable[[Any], Layout]] = {
    "timm.VisionTransformer": _timm,
    "timm.VisionTransformerDistilled": _timm,
    "timm.Eva": _timm,
    "transformers.ViTForImageClassification": _transformers_vit,
    "transformers.DeiTForImageClassification": _transformers_vit,
    "transformers.DeiTForImageClassificationWithTeacher": _transformers_vit,
    "transformers.Dinov2ForImageClassification": _transformers_dinov2,
    "transformers.Dinov2WithRegistersForImageClassification": _transformers_dinov2,
}
"""The layout of a model, by library and class."""
