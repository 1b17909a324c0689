"""Rotate the residual stream of a vision transformer, so that no channel stands out (QuaRot, arXiv
2404.00456).

A few channels of the stream carry values many times larger than the rest, and a grid that spans
them is too coarse for all others. An orthogonal R mixes the channels and so spreads the outliers
over all of them. In full precision the model computes what it did before:

    stream x                                  x ← R x
    tokens and position embeddings t          t ← R t
    a writer W with the LayerScale γ after    W ← R diag(γ) W,   bias ← R (γ ⊙ bias),   γ ← 1
    a norm n(x) ⊙ w + b, read by W            W ← W diag(w) Rᵀ,  bias ← bias + W b,     w ← 1, b ← 0

If a reader of the norm has no bias that could take W b (the keys of EVA and DINOv3), b stays in the
norm as R (b / w).

The last line needs n(R x) = R n(x). QuaRot has it for RMSNorm, and turns every LayerNorm into
RMSNorm by centring the writers. Here LayerNorm stays [ours]: R is drawn among the orthogonal
matrices with R 1 = 1. Such an R keeps the mean and the variance of x. So it commutes with
LayerNorm, ε included, and with RMSNorm too:

    R = u uᵀ + B O Bᵀ        u = 1 / √d;   B [d, d - 1] an orthonormal basis of the complement of u;
                             O [d - 1, d - 1] random orthogonal (Haar)

Only the mean over channels is not spread, and LayerNorm removes the mean anyway. So no module
changes its class and no tensor its name or shape: rotated weights load into the architecture that
they came from.

Other differences from QuaRot: R is a dense random matrix and not a Hadamard matrix, since it costs
nothing at run time. Inside the heads marrq/transforms/value_basis.py does more than a rotation. The
online Hadamard transform before the second linear of the MLP is left out.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from marrq.distributed import one_thread
from marrq.models.named_outputs import NamedOutputs, as_tuple
from marrq.transforms.residual_stream import ResidualStream, refusal, residual_stream

TOLERANCE = 1e-4
"""Largest accepted change of an output, relative to its largest number. Rounding in float32 gives
some 1e-6."""


@torch.no_grad()
def rotate(model: nn.Module, images: Tensor, seed: int = 0) -> None:
    """Rotate the residual stream of the model, in place.

    images: [batch, channels, height, width], on which the logits before and after are compared.
    seed: draws R.

    Raises MarrqError if the stream cannot be rotated exactly; then the model is as it was. Raises
    MarrqError too if the logits of `images` change; then the model is rotated, and wrong.
    """
    # Everything that can refuse the model comes before the first change.
    inner = model.model if isinstance(model, NamedOutputs) else model
    stream = residual_stream(inner)
    _check_norms(inner, stream)
    before = as_tuple(model(images))
    rotation = random_rotation(stream.width, torch.Generator().manual_seed(seed))
    _rotate_stream(inner, stream, rotation.to(images.device))
    # The largest over the outputs, each relative to its own largest number.
    difference = max(
        float((after - output).abs().max() / output.abs().max())
        for after, output in zip(as_tuple(model(images)), before, strict=True)
    )
    # `not <=` and not `>`: NaN must count as a difference.
    if not difference <= TOLERANCE:
        raise refusal(
            inner,
            f"its outputs changed by {difference:.1e} of the largest, more than {TOLERANCE:.0e}",
        )


@one_thread()
def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """R: [width, width] in float64, orthogonal, with R 1 = 1."""
    # QR of [1, e₂, e₃, …]: the first column of Q is ±u, the others are B. The sign of u does not
    # matter, since R contains u uᵀ.
    frame = torch.eye(width, dtype=torch.float64)
    frame[:, 0] = 1
    basis = torch.linalg.qr(frame).Q
    inner = random_orthogonal(width - 1, generator)  # O
    # [u, B] diag(1, O) [u, B]ᵀ = u uᵀ + B O Bᵀ
    rotation: Tensor = (
        basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T
    )
    return rotation


@one_thread()
def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """O: [width, width] in float64, uniform over the orthogonal matrices (Haar measure)."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    # Q alone is not uniform: its distribution depends on the sign convention of the QR. A positive
    # diagonal of R makes the factorization unique, and Q uniform.
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal


def _rotate_stream(model: nn.Module, stream: ResidualStream, rotation: Tensor) -> None:
    # t ← R t; the channels are the last dimension, so the product is t Rᵀ.
    for path in stream.tokens:
        token = model.get_parameter(path)
        token.copy_(token.double() @ rotation.T)
    # Writers and readers are independent of each other: each is changed once, in any order.
    for path, scale in stream.writers.items():
        writer = cast(nn.Linear | nn.Conv2d, model.get_submodule(path))
        _rotate_writer(writer, None if scale is None else model.get_parameter(scale), rotation)
    for path in stream.readers:
        _rotate_readers(model.get_submodule(path), _readers(model, stream, path), rotation)


def _readers(model: nn.Module, stream: ResidualStream, norm: str) -> list[nn.Linear]:
    return [cast(nn.Linear, model.get_submodule(path)) for path in stream.readers[norm]]


def _rotate_writer(writer: nn.Linear | nn.Conv2d, scale: Tensor | None, rotation: Tensor) -> None:
    """W ← R diag(γ) W,  bias ← R (γ ⊙ bias),  γ ← 1."""
    scaled = rotation if scale is None else rotation * scale.double()  # R diag(γ): [d, d]
    # A convolution's weight is [d, channels, height, width]; R acts on its first dimension.
    writer.weight.copy_((scaled @ writer.weight.double().flatten(1)).view_as(writer.weight))
    if writer.bias is not None:
        writer.bias.copy_(scaled @ writer.bias.double())
    if scale is not None:
        scale.fill_(1)


def _rotate_readers(norm: Any, readers: list[nn.Linear], rotation: Tensor) -> None:
    """W ← W diag(w) Rᵀ,  w ← 1;  bias ← bias + W b,  b ← 0, or b ← R (b / w) without biases."""
    gain, shift = _affine(norm, readers)
    kept = _kept_shift(gain, shift, readers)
    for reader in readers:
        # [out, parts, d]: a head may read two tokens side by side, each of d channels.
        parts = reader.weight.double().unflatten(1, (-1, len(gain)))
        if reader.bias is not None:
            # W b, less the part that the norm keeps: it comes back as W diag(w) Rᵀ R (b / w).
            reader.bias.copy_(reader.bias.double() + (parts @ (shift - gain * kept)).sum(1))
        reader.weight.copy_((parts * gain @ rotation.T).flatten(1))
    # What the readers took in is removed from the norm: w ← 1, and b ← R (b / w) or 0.
    if norm.weight is not None:
        norm.weight.fill_(1)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(rotation @ kept)


def _affine(norm: Any, readers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    """The affine map w, b of a norm: [d] each, in float64; 1 and 0 if the norm has none."""
    ones = readers[0].weight.new_ones(norm.normalized_shape, dtype=torch.float64)
    bias = getattr(norm, "bias", None)  # RMSNorm has no such attribute
    gain = ones if norm.weight is None else norm.weight.double()
    return gain, torch.zeros_like(ones) if bias is None else bias.double()


def _kept_shift(gain: Tensor, shift: Tensor, readers: list[nn.Linear]) -> Tensor:
    """The part of b that stays in the norm, before the rotation: [d].

    0 if all readers have biases, else b / w.
    """
    if all(reader.bias is not None for reader in readers):
        return torch.zeros_like(shift)
    return torch.where(shift == 0, shift, shift / gain)  # 0 / 0 counts as 0


def _check_norms(model: nn.Module, stream: ResidualStream) -> None:
    """Refuse a norm whose shift would have to be divided by a weight of 0."""
    for path, names in stream.readers.items():
        readers = _readers(model, stream, path)
        gain, shift = _affine(model.get_submodule(path), readers)
        if not _kept_shift(gain, shift, readers).isfinite().all():
            raise refusal(
                model,
                f"{path} has a weight of zero, and not all of {', '.join(names)} have a bias to "
                "take its own",
            )
