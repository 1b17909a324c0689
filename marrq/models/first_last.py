"""Patch embedding and head, the edges of a vision transformer: the linears before its first block
and behind its last.

A convolution whose stride is its kernel reads every pixel once, and so is a linear on patches,

    y = W p + b,        p: the pixels of a patch, [channels · height · width]

`Patches` is that linear in the convolution's place. Its codes, grid, statistics, artifact and
kernel are those of any linear, its input are quantized pixels; nothing asks for a quantized output,
as an integer convolution would.

The pipeline goes through a chain of blocks, and the edges are two more of them: `Stem` takes pixels
and gives the tokens that enter the first block, `Head` takes the tokens behind the last block and
gives the logits. A trial forward must show that nothing else enters them."""

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.blocks import Block, first_output, group_by_input, hooked, stop_at


class Patches(nn.Module):
    """A linear on the patches of an image, with the shapes of the convolution that it stands
    for."""

    weight: Tensor

    def __init__(self, size: tuple[int, int], linear: nn.Linear) -> None:
        """size: height and width of a patch; linear: from [channels · height · width]."""
        super().__init__()
        self.size, self.linear = size, linear
        # transformers asks a patch embedding for the type of its weight.
        self.register_buffer(
            "weight", torch.empty(0, device=linear.weight.device), persistent=False
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [batch, channels, rows · height, columns · width] to [batch, out, rows,
        columns]."""
        (batch, channels, image_height, image_width), (height, width) = pixels.shape, self.size
        apart = pixels.reshape(
            batch, channels, image_height // height, height, image_width // width, width
        )
        patches = apart.permute(0, 2, 4, 1, 3, 5).flatten(
            3
        )  # [batch, rows, columns, channels · height · width]
        return cast(Tensor, self.linear(patches)).permute(0, 3, 1, 2)


def put_patches(model: nn.Module, path: str) -> Patches:
    """Put the linear in the place of the convolution at a path, whose stride is its kernel."""
    convolution = cast(nn.Conv2d, model.get_submodule(path))
    weight = convolution.weight.detach().flatten(1)
    linear = nn.Linear(
        weight.shape[1],
        len(weight),
        bias=convolution.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    linear.weight.data = weight
    if convolution.bias is not None:
        linear.bias.data = convolution.bias.detach()
    patches = Patches(cast(tuple[int, int], convolution.kernel_size), linear)
    model.set_submodule(path, patches)
    return patches


@dataclass(frozen=True)
class Edge(Block):
    """What stands before or behind the blocks. module: the whole model; blocks: its blocks, which
    copies share."""

    blocks: tuple[nn.Module, ...]

    def copied(self) -> "Edge":
        """The same edge with parameters of its own."""
        return replace(
            self, module=copy.deepcopy(self.module, {id(block): block for block in self.blocks})
        )


class Stem(Edge):
    """The model up to its first block: pixels in, tokens out."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens that enter the first block. tokens: the pixels."""
        with stop_at(self.blocks[0]) as reached:
            self.module(tokens)
        return reached[0]


@dataclass(frozen=True)
class Head(Edge):
    """The model behind its last block: tokens in, logits out. example: pixels [1, channels, height,
    width], by which to get there."""

    example: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits. tokens: as they leave the last block."""

        def leave(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        with hooked([self.blocks[-1].register_forward_hook(leave)]):
            return cast(Tensor, self.module(self.example))


@torch.no_grad()
def with_edges(model: nn.Module, blocks: list[Block], images: Tensor) -> list[Block]:
    """The chain of stem, blocks and head, where there is one; the patch embedding becomes a linear.
    images: two or more, for the trial.

    Raises MarrqError when the patch embedding is no linear on patches, and when the logits do not
    follow from the last block's tokens."""
    apart = [block.path for block in blocks[1:] if not block.follows]
    if apart:
        raise _refusal(f"block {apart[0]!r} does not follow from the one before")
    before, behind, tokens, logits = _trial(model, blocks, images)
    modules = tuple(block.module for block in blocks)
    path = _patch_embedding(model, before)
    put_patches(model, path)
    blocks = [replace(blocks[0], follows=True), *blocks[1:]]
    stem = Stem("", model, ((f"{path}.linear",),), False, (), {}, modules)
    if not behind:
        return [stem, *blocks]
    names = [name for name, _ in behind]
    wrong = [
        name
        for name in names
        if not isinstance(model.get_submodule(name), nn.Linear) or names.count(name) > 1
    ]
    if wrong:
        raise _refusal(f"{wrong[0]!r} behind its last block is no linear that runs once")
    head = Head("", model, group_by_input(behind), True, (), {}, modules, images[:1])
    if not torch.allclose(head(tokens), logits, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise _refusal("its logits do not follow from the tokens behind its last block alone")
    return [stem, *blocks, head]


Calls = list[tuple[str, Tensor]]
"""Paths of linears and convolutions with their inputs, in order of execution."""


def _trial(
    model: nn.Module, blocks: list[Block], images: Tensor
) -> tuple[Calls, Calls, Tensor, Tensor]:
    """What is called before the first block and behind the last in one forward, the tokens behind
    the last, and the logits."""
    inside = {module for block in blocks for module in block.module.modules()}
    calls: Calls = []
    entered: list[int] = []
    left: list[tuple[int, Tensor]] = []

    def enter(path: str) -> Any:
        return lambda _, arguments: calls.append((path, arguments[0]))

    outside = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in inside
    }
    handles = [module.register_forward_pre_hook(enter(path)) for path, module in outside.items()]
    handles.append(
        blocks[0].module.register_forward_pre_hook(lambda *_: entered.append(len(calls)))
    )
    handles.append(
        blocks[-1].module.register_forward_hook(
            lambda *call: left.append((len(calls), first_output(call[-1])))
        )
    )
    with hooked(handles):
        logits = model(images)
    [(end, tokens)] = left
    return calls[: entered[0]], calls[end:], tokens, logits


def _patch_embedding(model: nn.Module, before: Calls) -> str:
    """The path of the convolution that makes tokens of patches. Raises MarrqError where it is not
    all there is before the blocks."""
    if len(before) != 1:
        raise _refusal(
            f"{len(before)} layers before its first block have weights, not one patch embedding"
        )
    [(path, pixels)] = before
    layer = model.get_submodule(path)
    if (
        not isinstance(layer, nn.Conv2d)
        or layer.stride != layer.kernel_size
        or layer.padding not in ((0, 0), "valid")
        or layer.dilation != (1, 1)
        or layer.groups != 1
        or any(
            length % size for length, size in zip(pixels.shape[2:], layer.kernel_size, strict=True)
        )
    ):
        raise _refusal(
            f"its patch embedding {path!r} is no convolution with a stride of its kernel: {layer}"
        )
    return path


def _refusal(reason: str) -> MarrqError:
    return MarrqError(
        f"patch embedding and head cannot be quantized, {reason}: choose a scheme without -e8"
    )
