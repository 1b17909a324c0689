"""The first and last layers of a vision transformer: the patch embedding before its first block,
and the linears of the head after its last block.

A convolution whose stride is its kernel size reads every pixel once. It is a linear on patches,

    y = W p + b,        p: the pixels of a patch, [channels · height · width]

`Patches` is that linear in the convolution's place. Its codes, grid, statistics, tensors and kernel
are those of any linear, and its input is quantized pixels. An integer convolution would ask for a
quantized output too; the linear does not.

The pipeline runs a chain of blocks, and first and last layers are two more links: `FirstLayers`
takes pixels and gives the tokens that enter the first block, `LastLayers` takes the output of the
last block and gives the outputs: the logits, or several. A trial forward must show that nothing
else enters them.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.models.blocks import Block, BlockKind, first_output, group_by_input, hooked, stop_at
from marrq.models.named_outputs import as_tuple
from marrq.schemes import Scheme


class Patches(nn.Module):
    """A linear on the patches of an image, with input and output shaped as those of the
    convolution that it replaces."""

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
        """[batch, channels, rows · height, columns · width] to [batch, out, rows, columns]."""
        # The image is cut into tiles, and each tile becomes one row of the linear's input.
        (batch, channels, image_height, image_width), (height, width) = pixels.shape, self.size
        rows, columns = image_height // height, image_width // width
        # Axes: image, channel, row of patches, row in the patch, column of patches, column in the
        # patch.
        apart = pixels.reshape(batch, channels, rows, height, columns, width)
        # [batch, rows, columns, channels · height · width], in the order of the flattened kernel
        patches = apart.permute(0, 2, 4, 1, 3, 5).flatten(3)
        # Back to the layout of a convolution, channels first.
        return cast(Tensor, self.linear(patches)).permute(0, 3, 1, 2)


def put_patches(model: nn.Module, path: str) -> Patches:
    """Replace the convolution at a path, whose stride is its kernel size, by `Patches`."""
    convolution = cast(nn.Conv2d, model.get_submodule(path))
    weight = convolution.weight.detach().flatten(1)  # [out, channels · height · width]
    linear = nn.Linear(
        weight.shape[1],
        len(weight),
        bias=convolution.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    # The very same numbers: a convolution whose stride is its kernel multiplies the same pairs.
    linear.weight.data = weight
    if convolution.bias is not None:
        linear.bias.data = convolution.bias.detach()
    patches = Patches(cast(tuple[int, int], convolution.kernel_size), linear)
    model.set_submodule(path, patches)
    return patches


@dataclass(frozen=True)
class OuterLayers(Block):
    """The layers before or after the blocks.

    module: the whole model.
    blocks: the modules of the model's blocks, which copies of the outer layers share.
    """

    blocks: tuple[nn.Module, ...]

    def scheme_of(self, scheme: Scheme) -> Scheme:
        """8 bits, whatever the blocks have."""
        return scheme.of_outer_layers

    def owns(self, tensor: str) -> bool:
        """Whether the tensor of the model lies outside the blocks."""
        # The dot keeps `blocks.1` from owning the tensors of `blocks.10`.
        inside = tuple(
            path + "." for path, part in self.module.named_modules() if part in self.blocks
        )
        return not tensor.startswith(inside)

    def copied(self) -> "OuterLayers":
        """The same layers with parameters of their own."""
        # deepcopy takes an object that is in its memo as copied already: the blocks stay shared.
        shared = {id(block): block for block in self.blocks}
        return replace(self, module=copy.deepcopy(self.module, shared))


class FirstLayers(OuterLayers):
    """The model up to its first block: pixels in, tokens out."""

    kind: ClassVar[BlockKind] = "first"

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens that enter the first block. tokens: the pixels."""
        # The input of the first block is the output of everything before it.
        with stop_at(self.blocks[0]) as reached:
            self.module(tokens)
        return reached[0]

    def input_from(self, model: nn.Module, images: Tensor) -> Tensor:
        """The pixels themselves."""
        return images


@dataclass(frozen=True)
class LastLayers(OuterLayers):
    """The model after its last block: tokens in, the model's outputs out.

    example: pixels [1, channels, height, width]; the model runs on them up to its last block, whose
        output is then replaced by the tokens.
    """

    kind: ClassVar[BlockKind] = "last"

    example: Tensor

    def __call__(self, tokens: Tensor) -> Tensor:
        """The model's first output. tokens: the output of the last block."""
        return self.outputs_of(tokens)[0]

    def outputs_of(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """All outputs of the model. tokens: the output of the last block."""

        # The hook replaces the last block's output. What comes before is computed on the example
        # and thrown away: one image through the blocks for each batch of tokens.
        def leave(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        with hooked([self.blocks[-1].register_forward_hook(leave)]):
            return as_tuple(self.module(self.example))


@torch.no_grad()
def with_outer_layers(model: nn.Module, blocks: list[Block], images: Tensor) -> list[Block]:
    """The chain of first layers, blocks and last layers. A model without a head has no last layers.
    The model's patch embedding is replaced by `Patches`.

    images: two or more, for the trial forward.
    Raises MarrqError if the patch embedding is no linear on patches, or if the outputs do not
        follow from the last block's output alone.
    """
    # Between the first and the last layers there must be a chain: each block's input is the
    # previous block's output.
    apart = [block.path for block in blocks[1:] if not block.follows]
    if apart:
        raise _refusal(f"block {apart[0]!r} does not follow from the one before")
    trial = _trial(model, blocks, images)
    path = _patch_embedding(model, trial.before)
    # In the model itself, so that the linear exists before it is quantized, and the full-precision
    # copy has it too.
    put_patches(model, path)
    # From here on the input of the first block is the first layers' output.
    blocks = [replace(blocks[0], follows=True), *blocks[1:]]
    modules = tuple(block.module for block in blocks)
    first = FirstLayers("", model, ((f"{path}.linear",),), False, (), {}, modules)
    # A feature extractor ends with its last block, or with layers that have no weights.
    if not trial.after:
        return [first, *blocks]
    _check_head(model, [name for name, _ in trial.after])
    # A distilled model has two heads on two tokens: two groups.
    groups = group_by_input(trial.after)
    last = LastLayers("", model, groups, True, (), {}, modules, images[:1])
    # The last layers saw the first image alone, the outputs are of all images: if the two agree,
    # nothing but the tokens of the last block enters the head.
    for found, output in zip(last.outputs_of(trial.tokens), trial.outputs, strict=True):
        if not (
            found.shape == output.shape
            and torch.allclose(found, output, rtol=1e-4, atol=1e-5, equal_nan=True)
        ):
            raise _refusal("its outputs do not follow from the tokens behind its last block alone")
    return [first, *blocks, last]


Calls = list[tuple[str, Tensor]]
"""Paths of linears and convolutions with their inputs, in order of execution."""


@dataclass(frozen=True)
class _Trial:
    """What one forward showed.

    before, after: the layers that were called before the first block and after the last block.
    tokens: the last block's output.
    outputs: of the model.
    """

    before: Calls
    after: Calls
    tokens: Tensor
    outputs: tuple[Tensor, ...]


def _trial(model: nn.Module, blocks: list[Block], images: Tensor) -> _Trial:
    """Run the model once and record the layers outside its blocks."""
    # Only layers with weights matter here: norms and activations stay as they are.
    inside = {module for block in blocks for module in block.module.modules()}
    calls: Calls = []
    start: list[int] = []  # how many calls came before the first block
    end: list[tuple[int, Tensor]] = []  # how many came before the last block's end, and its output

    def enter(path: str) -> Any:
        return lambda _, arguments: calls.append((path, arguments[0]))

    handles = [
        module.register_forward_pre_hook(enter(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in inside
    ]
    handles += [
        blocks[0].module.register_forward_pre_hook(lambda *_: start.append(len(calls))),
        blocks[-1].module.register_forward_hook(
            lambda *call: end.append((len(calls), first_output(call[-1])))
        ),
    ]
    with hooked(handles):
        outputs = as_tuple(model(images))
    [(count, tokens)] = end
    return _Trial(calls[: start[0]], calls[count:], tokens, outputs)


def _patch_embedding(model: nn.Module, before: Calls) -> str:
    """The path of the convolution that makes tokens of patches. Raises MarrqError if it is not the
    only layer before the blocks, or no linear on patches."""
    # A stem of several convolutions is no linear on patches, and its other layers would need codes
    # of another kind.
    if len(before) != 1:
        raise _refusal(
            f"{len(before)} layers before its first block have weights, not one patch embedding"
        )
    [(path, pixels)] = before
    layer = model.get_submodule(path)
    if not (isinstance(layer, nn.Conv2d) and _reads_each_pixel_once(layer, pixels)):
        raise _refusal(
            f"its patch embedding {path!r} is no convolution with a stride of its kernel: {layer}"
        )
    return path


def _reads_each_pixel_once(layer: nn.Conv2d, pixels: Tensor) -> bool:
    """Whether the convolution is one linear on patches that tile the image."""
    # A convolution ignores pixels that do not fill a patch, `Patches` cannot.
    remainders = [
        length % size for length, size in zip(pixels.shape[2:], layer.kernel_size, strict=True)
    ]
    return (
        layer.stride == layer.kernel_size
        and layer.padding in ((0, 0), "valid")
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and not any(remainders)
    )


def _check_head(model: nn.Module, names: list[str]) -> None:
    """Raise MarrqError if a layer after the last block is no linear, or runs more than once."""
    for name in names:
        if not isinstance(model.get_submodule(name), nn.Linear) or names.count(name) > 1:
            raise _refusal(f"{name!r} behind its last block is no linear that runs once")


def _refusal(reason: str) -> MarrqError:
    return MarrqError(
        f"patch embedding and head cannot be quantized, {reason}: choose a scheme without -e8"
    )
