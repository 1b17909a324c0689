"""Find the linears of a block that write to the residual stream, and read the stream behind them.

A writer's output is added to the stream, at most multiplied by a constant γ per channel on the way
(LayerScale): s = r + γ ∘ (W x + b). proj and fc2 of a pre-norm ViT are writers. Nothing here knows
a family by name; a trial forward shows it. A change v of the linear's output, another at every
token, must change the stream by γ ∘ v, token by token in the same order (the linear may see them in
another shape; but in windows their order is another). Of the points of the block for which this
holds (the inputs of its modules, and its output) the last is the stream with everything added: any
later one lies behind something that is not linear."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marrq.models.blocks import Block, hooked
from marrq.models.first_last import Edge

TRIAL_SEED = 0


@dataclass(frozen=True)
class ResidualWriter:
    """A linear that writes to the stream.

    linear: its path within the block; reader: path of the module whose input is the stream after
    it, or None for the block's output; gain: γ, [m]."""

    linear: str
    reader: str | None
    gain: Tensor


def read_stream(
    block: Block, writer: ResidualWriter, tokens: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The input of the writer after `change`, with which it then works, and the stream behind it;
    for one batch of the block's tokens."""
    inputs: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(change(arguments[0]))
        return (inputs[0],)

    with hooked([block.linear(writer.linear).register_forward_pre_hook(enter)]):
        stream = block(tokens) if writer.reader is None else block.input_of(writer.reader, tokens)
    return inputs[0], stream


@torch.no_grad()
def find_residual_writer(block: Block, linear: str, tokens: Tensor) -> ResidualWriter | None:
    """How the linear writes to the stream, or None when it does not, as the edges' linears: the one
    makes the stream, the others end it.

    tokens: some that enter the block; one image is enough.
    """
    if isinstance(block, Edge):
        return None
    block, tokens = block.in_float64(), tokens[:1].double()
    generator = torch.Generator().manual_seed(TRIAL_SEED)
    changes = torch.randn(2, *tokens.shape, dtype=torch.float64, generator=generator).to(
        tokens.device
    )
    still = _points(block, linear, tokens, None)
    moved = [_points(block, linear, tokens, change) for change in changes]
    writer = None
    for reader, before in still.items():
        gain = ((moved[0][reader] - before) / changes[0]).view(-1, tokens.shape[-1])[0]
        follows = (
            torch.allclose(after[reader] - before, gain * change)
            for after, change in zip(moved, changes, strict=True)
        )
        if gain.any() and all(follows):
            writer = ResidualWriter(linear, reader, gain.float())
    return writer


def _points(
    block: Block, linear: str, tokens: Tensor, change: Tensor | None
) -> dict[str | None, Tensor]:
    """Whatever has the shape of the tokens behind a linear, in order of execution, with a change
    added to the linear's output."""
    points: dict[str | None, Tensor] = {}
    reached = False

    def leave(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal reached
        reached = True
        if (
            change is None
            or change.shape[-1] != output.shape[-1]
            or change.numel() != output.numel()
        ):
            return output
        return output + change.view(output.shape)

    def enter(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if (
                reached
                and arguments
                and isinstance(arguments[0], Tensor)
                and arguments[0].shape == tokens.shape
            ):
                points.setdefault(path, arguments[0])

        return hook

    handles = [
        module.register_forward_pre_hook(enter(path))
        for path, module in block.module.named_modules()
        if path
    ]
    with hooked([*handles, block.linear(linear).register_forward_hook(leave)]):
        output = block(tokens)
    return {**points, None: output} if output.shape == tokens.shape else points
