"""Fisher energies: what an error of a linear's output costs the model, token by token; and the
weights of tokens in the sums over calibration tokens that follow [ours, after GuidedQuant, arXiv
2505.07004].

**Expected divergence.** Let y be the output of one linear at one token, z the model's output for
that image, dy a small error of y and dz = (∂z/∂y) dy what it does to z. In second order a model
loses

    classes     KL(p ‖ p + dp) = ½ dzᵀ F dz            F = diag p - p pᵀ,  p = softmax z
    features    1 - cos(z, z + dz) = ½ dzᵀ F dz        F = (I - u uᵀ) / ‖z‖²,  u = z / ‖z‖
    dense       ½ ‖dz‖² / ‖z‖²                         F = I / ‖z‖²

With a random vector v such that E v vᵀ = F, and g = ∂(v·z)/∂y from one backward pass,

    ½ dzᵀ F dz = ½ E (v·dz)² = ½ E ⟨g, dy⟩²  ≈  ½ E ‖g‖² ‖dy‖² / m        for dy [m] of no preferred
                                                                          direction
so an error counts by the token's energy e = E ‖g‖². With random signs ε the vectors are

    classes     v = √p ∘ ε - p ⟨√p, ε⟩        E v vᵀ = diag p - p pᵀ, with less noise than the
                                              gradient for a label drawn from p
    features    v = (ε - u ⟨u, ε⟩) / ‖z‖
    dense       v = ε / ‖z‖

A model with several outputs has a vector for each; their divergences, and so their energies, add.
An output of one number is dense, whatever its name: it has no softmax and no direction.

**Writers.** The error of a linear that writes to the residual stream is measured in the stream,
s = r + γ ∘ y (marrq/models/residual_writers.py); its energy is that of ∂(v·z)/∂s = g / γ.

**Weights.** The energy of single tokens is noise: weights of their own would leave a few hundred
tokens that count. So energies are averaged over images, to one value a position. The weights are

    w = e / mean(e),  clamped to [0.1, 10],  divided by their mean

The lower clamp is a ridge: no token is given up. In a model that reads its class token the class
token outweighs the others in the last blocks; in a model that pools all tokens w is nearly flat.

Differs from GuidedQuant: it weighs every token of every image by itself, and groups of outputs
apart, by the gradient of the loss against the labels.

The pass runs on the full-precision model, before its first block is quantized. Gradients of
weights are not computed. A few images at a time are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.methods.registry import RESIDUAL_STREAM
from marrq.methods.spec import MethodSpec
from marrq.models.blocks import Block, hooked
from marrq.models.load import VisionModel
from marrq.models.named_outputs import OutputKind, as_tuple, kinds_of_change
from marrq.models.residual_writers import find_residual_writer
from marrq.pipeline.collect import TokenSource

ENERGY_BATCHES = 8
"""Energies are averaged over so many batches at most: a mean for each position needs no more."""
PASS_BYTES = 2**21
"""Images whose tokens fill so many bytes go through a pass together, at least one. What a pass
keeps for its way back is some 10 times that for each block."""
LEAST_WEIGHT, LARGEST_WEIGHT = 0.1, 10.0
WEIGHT_UNIT = 2**-16
"""Weights are multiples of this, so that their sums over tokens are exact in float64."""

Gradients = Callable[[str, Tensor], None]
"""Takes the path of a linear and the gradient at its output for some images, [..., m]."""


def fisher_energies(
    source: TokenSource,
    blocks: Sequence[Block],
    model: VisionModel,
    processes: Processes,
    at_stream: bool = True,
) -> dict[str, Tensor]:
    """The energies e of each linear of the blocks, by its path in the model: [tokens of an image]
    in float64, in the order in which the linear has the tokens of one image, averaged over images.
    They are the same in every process; all processes call this together.

    source: the module in full precision, and the images of this process.
    model: whose outputs and labels say how a change of an output counts.
    at_stream: whether the energies of writers are those of the stream.

    A linear that mixes the tokens of images, or of which no output depends, has no energies.
    Raises MarrqError if the outputs of the model have no gradient.
    """
    images = source.images[:2].to(source.device)
    gains = _gains(source.module, blocks, images) if at_stream else {}
    paths = [block.path_of(name) for block in blocks for group in block.groups for name in group]
    # Every process makes the trial, so that all know of the same linears and their tokens.
    tokens = _tokens_of_an_image(source.module, paths, images, model)
    if not tokens:
        return {}
    at_once = max(1, PASS_BYTES // blocks[0].input_from(source.module, images[:1]).nbytes)
    sampled = [batch for batch in source.batches if batch.is_among(ENERGY_BATCHES)]
    # [batches, tokens of an image]: a row for each batch, so that all processes can add the rows
    # of all in one order.
    sums = {
        path: torch.zeros(len(sampled), count, dtype=torch.float64, device=source.device)
        for path, count in tokens.items()
    }
    for place, batch in enumerate(sampled):
        # After each batch its row is complete; the images of a batch are added in their order.
        def take(path: str, gradient: Tensor, place: int = place) -> None:
            scaled = gradient if path not in gains else _divided(gradient, gains[path])
            energies = scaled.square().sum(-1).reshape(-1, tokens[path])  # [images, tokens]
            sums[path][place] += energies.sum(0, dtype=torch.float64)

        for start in range(batch.rows.start, batch.rows.stop, at_once):
            rows = slice(start, min(start + at_once, batch.rows.stop))
            pixels = source.images[rows].to(source.device)
            # The signs follow from the number of the first image, whoever draws them.
            _backward(source.module, list(tokens), pixels, _Directions(model, start), take)
    counts = torch.tensor([len(batch) for batch in sampled], dtype=torch.float64)
    total = float(processes.all_gather(counts.to(source.device)).sum())
    return {path: processes.all_gather(rows).sum(0) / total for path, rows in sums.items()}


def token_weights(
    source: TokenSource,
    blocks: Sequence[Block],
    model: VisionModel,
    method: MethodSpec,
    processes: Processes,
) -> dict[str, Tensor]:
    """The weights of the tokens that a group of linears reads, by the path of the group's first
    linear: [tokens of an image], float64 on the CPU. The parameters are those of fisher_energies.
    """
    at_stream = method.wants == RESIDUAL_STREAM
    energies = fisher_energies(source, blocks, model, processes, at_stream)
    groups = [[block.path_of(name) for name in group] for block in blocks for group in block.groups]
    # An error of the input reaches all linears of the group: their energies add.
    return {
        paths[0]: weights_of(torch.stack([energies[path] for path in paths]).sum(0).cpu())
        for paths in groups
        if energies.keys() >= set(paths)
    }


def weights_of(energies: Tensor) -> Tensor:
    """The weights of the tokens of an image, about 1 in the mean: float64, as many as energies.

    energies: of one linear, or the sum over linears that share an input."""
    mean = energies.mean()
    # A linear on which nothing depends: all tokens alike.
    relative = torch.where(mean > 0, energies / mean, 1.0)
    clamped = relative.clamp(LEAST_WEIGHT, LARGEST_WEIGHT)
    return (clamped / clamped.mean() / WEIGHT_UNIT).round() * WEIGHT_UNIT


class _Directions:
    """v for the outputs of a batch, the signs drawn from a seed."""

    def __init__(self, model: VisionModel, seed: int) -> None:
        self._model, self._generator = model, torch.Generator().manual_seed(seed)

    def __call__(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The vector v for each output of the model [images, ...], in its shape."""
        kinds = kinds_of_change(outputs, self._model.outputs, self._model.labels)
        return [self._vector(*one) for one in zip(outputs, kinds, strict=True)]

    def _vector(self, output: Tensor, kind: OutputKind) -> Tensor:
        drawn = torch.randint(0, 2, output.shape, generator=self._generator)
        signs = (2 * drawn - 1).to(output)
        if kind == "classes":
            # √p ∘ ε - p ⟨√p, ε⟩
            p = output.softmax(1)
            v: Tensor = p.sqrt() * signs - p * (p.sqrt() * signs).sum(1, keepdim=True)
            return v
        # ‖z‖ of each image; an output of zeros keeps v finite.
        flat, noise = output.flatten(1), signs.flatten(1)
        norm = flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(output.dtype).tiny)
        if kind == "features":
            # ε - u ⟨u, ε⟩: a change along z itself does not turn it.
            unit = flat / norm
            noise = noise - unit * (unit * noise).sum(1, keepdim=True)
        vectors: Tensor = noise / norm
        return vectors.view_as(output)


def _backward(
    module: nn.Module,
    paths: Sequence[str],
    pixels: Tensor,
    directions: Callable[[tuple[Tensor, ...]], list[Tensor]],
    take: Gradients,
) -> None:
    """One forward and one backward pass: `take` gets the gradient of v·z, summed over images and
    outputs, at the output of each linear.

    pixels: [images, channels, height, width]; directions: gives v for each output z."""
    roots: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        # No weight has a gradient. The graph begins at the input of the first linears.
        x = arguments[0]
        if not x.requires_grad:
            roots.append(x.detach().requires_grad_())
            x = roots[-1]
        return (x, *arguments[1:])

    def leave(path: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            # Given out as soon as it is known, and kept by nobody.
            if output.requires_grad:
                output.register_hook(lambda gradient: take(path, gradient))

        return hook

    linears = {path: module.get_submodule(path) for path in paths}
    handles = [linear.register_forward_pre_hook(enter) for linear in linears.values()]
    handles += [linear.register_forward_hook(leave(path)) for path, linear in linears.items()]
    with hooked(handles), _frozen(module), torch.enable_grad():
        outputs = as_tuple(module(pixels))
        vectors = directions(tuple(z.detach() for z in outputs))
        found = [(z, v) for z, v in zip(outputs, vectors, strict=True) if z.requires_grad]
        if not found:
            raise MarrqError(
                "the model's outputs have no gradient, by which tokens are weighed and widths are "
                "chosen: choose --set token-weights=off, and no budget"
            )
        asked, given = zip(*found, strict=True)
        torch.autograd.grad(asked, roots, given, allow_unused=True)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the module has a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _tokens_of_an_image(
    module: nn.Module, paths: Sequence[str], images: Tensor, model: VisionModel
) -> dict[str, int]:
    """How many tokens of an image each linear has, for the linears whose tokens lie image by image.

    images: two, on the device of the module."""
    tokens: dict[str, int] = {}

    def take(path: str, gradient: Tensor) -> None:
        # v is 0 for the second image: its tokens, the second half, must have no gradient.
        halves = gradient.reshape(2, -1, gradient.shape[-1])
        if halves[1].eq(0).all():
            tokens[path] = halves.shape[1]

    first_alone = _Directions(model, 0)

    def directions(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        vectors = first_alone(outputs)
        for v in vectors:
            v[1:] = 0
        return vectors

    _backward(module, paths, images, directions, take)
    # In the order of the linears: gradients come backwards.
    return {path: tokens[path] for path in paths if path in tokens}


def _gains(module: nn.Module, blocks: Sequence[Block], images: Tensor) -> Mapping[str, Tensor]:
    """γ of each linear that writes to the residual stream, by its path in the model: [m]."""
    gains: dict[str, Tensor] = {}
    for block in blocks:
        entering = block.input_from(module, images[:1])
        for group in block.groups:
            # Linears that share an input are q, k and v or gates: none of them writes alone.
            writer = find_residual_writer(block, group[0], entering) if len(group) == 1 else None
            if writer is not None:
                gains[block.path_of(group[0])] = writer.gain
    return gains


def _divided(gradient: Tensor, gain: Tensor) -> Tensor:
    """The gradient in the stream, g / γ; 0 if γ = 0: then no error reaches the stream."""
    return torch.where(gain == 0, 0, gradient / gain)
