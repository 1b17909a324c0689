"""Find the linears of a block that write to the residual stream, and read the stream after them.

A writer's output is added to the stream, at most multiplied by a constant γ per channel on the way
(LayerScale):

    s = r + γ ∘ (W x + b)        r: the stream before, x: the writer's input

proj and fc2 of a pre-norm ViT are writers. No model family is known by name; a trial forward shows
the writers. If the linear's output changes by v, different at every token, the stream must change
by γ ∘ v, token by token in the same order. The linear may see the tokens in another shape, but not
in another order, as in windows. This is tested at every point of the block that has the shape of
the tokens: the inputs of its modules, and its output. The last point where it holds is the stream
with everything added, since a later point lies after something that is not linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marrq.models.blocks import Block, hooked

TRIAL_SEED = 0


@dataclass(frozen=True)
class ResidualWriter:
    """A linear that writes to the residual stream.

    linear: its path within the block.
    reader: path of the module whose input is the stream after the linear; None for the block's
        output.
    gain: γ, [m].
    """

    linear: str
    reader: str | None
    gain: Tensor


def read_stream(
    block: Block, writer: ResidualWriter, tokens: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The writer's input after `change`, and the residual stream after the writer, for one batch of
    the block's input.

    change: applied to the writer's input, which the writer then works with.
    """
    inputs: list[Tensor] = []

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(change(arguments[0]))
        return (inputs[0],)

    with hooked([block.linear(writer.linear).register_forward_pre_hook(enter)]):
        # The rest of the block runs only up to the module that reads the stream.
        stream = block(tokens) if writer.reader is None else block.input_of(writer.reader, tokens)
    return inputs[0], stream


@torch.no_grad()
def find_residual_writer(block: Block, linear: str, tokens: Tensor) -> ResidualWriter | None:
    """How the linear writes to the residual stream, or None if it does not. First and last layers
    do not: the patch embedding makes the stream, the head ends it.

    tokens: a batch of the block's input; one image is enough.
    """
    if block.kind != "block":
        return None
    # float64, so that a change through the block is linear up to 1e-12 or is not linear at all.
    block, tokens = block.in_float64(), tokens[:1].double()
    # A generator of its own: the search must not move the global one.
    generator = torch.Generator().manual_seed(TRIAL_SEED)
    changes = torch.randn(2, *tokens.shape, dtype=torch.float64, generator=generator)
    changes = changes.to(tokens.device)  # v, two draws of it
    # The block's function is not linear, but from a writer to the stream everything is.
    still = _points(block, linear, tokens, None)
    # Three forwards in all: without a change, and with each of the two.
    moved = [_points(block, linear, tokens, change) for change in changes]
    writer = None
    for reader, before in still.items():
        # γ from the first token of the first draw; all tokens of both draws must confirm it.
        gain = ((moved[0][reader] - before) / changes[0]).reshape(-1, tokens.shape[-1])[0]
        follows = (
            torch.allclose(after[reader] - before, gain * change)
            for after, change in zip(moved, changes, strict=True)
        )
        # A gain of zero everywhere is LayerScale that shuts the branch: then any point would do.
        if gain.any() and all(follows):
            # Points come in order of execution, so that the last one remains.
            writer = ResidualWriter(linear, reader, gain.float())
    return writer


def _points(
    block: Block, linear: str, tokens: Tensor, change: Tensor | None
) -> dict[str | None, Tensor]:
    """Every tensor after the linear that has the shape of the tokens, in order of execution: by the
    path of the module that reads it, and by None the block's output.

    change: added to the linear's output.
    """
    points: dict[str | None, Tensor] = {}
    reached = False

    def leave(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        # Only points after the linear count. Every module before it has run when it returns.
        nonlocal reached
        reached = True
        # A linear of another width writes no tokens: its output stays, and no point will follow it.
        if change is None or not _fits(change, output):
            return output
        return output + change.view(output.shape)

    def enter(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            # A module may be called without positional arguments, or with something that is no
            # tensor.
            x = arguments[0] if arguments else None
            if reached and isinstance(x, Tensor) and x.shape == tokens.shape:
                # The first call of a module that runs more than once.
                points.setdefault(path, x)

        return hook

    handles = [
        # The inputs of all modules inside: a norm or a branch that reads the stream is one of them.
        module.register_forward_pre_hook(enter(path))
        for path, module in block.module.named_modules()
        if path
    ]
    with hooked([*handles, block.linear(linear).register_forward_hook(leave)]):
        output = block(tokens)
    return {**points, None: output} if output.shape == tokens.shape else points


def _fits(change: Tensor, output: Tensor) -> bool:
    """Whether a change of the tokens can be viewed in the shape of the output."""
    return change.shape[-1] == output.shape[-1] and change.numel() == output.numel()
