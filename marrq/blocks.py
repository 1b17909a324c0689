"""Find the chain of blocks of a vision transformer, and in each block its linears grouped by the input they share.

Nothing here knows a family by name. Blocks are the innermost repeated modules (`blocks.3`, `encoder.layer.3`, Swin's `downsample`) that
contain linears. A trial forward must then show that they form a chain: each block's input is the output of the one before. What a block
is called with besides its input (Swin's resolution, rotary tables) is recorded, and a second trial with other images must show that it
does not depend on the images. A model for which this fails is refused.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from marrq.errors import MarrqError

BLOCK_NAME = re.compile(r"(.*\.)?((blocks|layers?)\.\d+|downsample)")


@dataclass(frozen=True)
class Block:
    """One block: tokens in, tokens out.

    path: where it stands in the model; groups: paths of its linears within the block, in order of execution, one tuple for linears
    that share an input; arguments, keywords: what the model calls it with besides the tokens.
    """

    path: str
    module: nn.Module
    groups: tuple[tuple[str, ...], ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, tokens: Tensor) -> Tensor:
        """The block's output tokens."""
        return first_output(self.module(tokens, *self.arguments, **self.keywords))

    def linear(self, name: str) -> nn.Linear:
        """The linear at a path within the block."""
        return cast(nn.Linear, self.module.get_submodule(name))

    def path_of(self, linear: str) -> str:
        """Where a linear stands in the model; linear: its path within the block."""
        return f"{self.path}.{linear}" if self.path else linear

    def copied(self) -> "Block":
        """The same block with parameters of its own."""
        return replace(self, module=copy.deepcopy(self.module))

    def input_of(self, linear: str, tokens: Tensor) -> Tensor:
        """What the linear (a path within the block) receives when the block gets `tokens`; nothing after it is computed."""
        with stop_at(self.module.get_submodule(linear)) as reached:
            self(tokens)
        return reached[0]


@torch.no_grad()
def find_blocks(model: nn.Module, images: Tensor) -> list[Block]:
    """The blocks in order of execution. images: [at least 2, channels, height, width], for the trial. Raises MarrqError when the model
    has none, when they are no chain, or when a linear is used other than by calling it."""
    candidates = _candidates(model)
    if not candidates:
        raise MarrqError("the model has no repeated blocks with linear layers: only vision transformers can be quantized")
    trace = _record(model, candidates, images[:1])
    blocks = []
    for path, calls in trace.items():
        if len(calls) != 1:
            raise MarrqError(f"block {path!r} runs {len(calls)} times in one forward: only blocks that run once can be quantized")
        blocks.append(Block(path, candidates[path], _groups(path, candidates[path], calls[0]), *calls[0].rest))
    _check_chain(model, blocks, images[1:2])
    return blocks


def first_input(model: nn.Module, block: Block, images: Tensor) -> Tensor:
    """The tokens that enter the block when the model gets `images`; nothing after it is computed."""
    with stop_at(block.module) as reached:
        model(images)
    return reached[0]


@dataclass
class _Call:
    """One call of a block in a trial forward."""

    tokens: Tensor
    rest: tuple[tuple[Any, ...], dict[str, Any]]
    linears: list[tuple[nn.Module, Tensor]]
    output: Tensor


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    named = {
        path: module
        for path, module in model.named_modules()
        if BLOCK_NAME.fullmatch(path) and any(isinstance(child, nn.Linear) for child in module.modules())
    }
    return {path: module for path, module in named.items() if not any(other.startswith(path + ".") for other in named)}


def _record(model: nn.Module, candidates: dict[str, nn.Module], images: Tensor) -> dict[str, list[_Call]]:
    """Calls of each candidate block in one forward, in order of execution."""
    trace: dict[str, list[_Call]] = {}
    linears: list[tuple[nn.Module, Tensor]] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        linears.append((module, arguments[0]))

    def leave(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not arguments:
                raise MarrqError(f"block {path!r} does not take its tokens as first argument: it cannot be quantized")
            inside = set(module.modules())
            mine = [(linear, x) for linear, x in linears if linear in inside]
            trace.setdefault(path, []).append(_Call(arguments[0], (arguments[1:], dict(keywords)), mine, first_output(output)))

        return hook

    handles = [module.register_forward_hook(leave(path), with_kwargs=True) for path, module in candidates.items()]
    handles += [module.register_forward_pre_hook(enter) for module in model.modules() if isinstance(module, nn.Linear)]
    with hooked(handles):
        model(images)
    return trace


def _groups(path: str, module: nn.Module, call: _Call) -> tuple[tuple[str, ...], ...]:
    """The block's linears, grouped by identity of their input."""
    names: dict[nn.Module, str] = {child: name for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    called = [linear for linear, _ in call.linears]
    for child, name in names.items():
        if called.count(child) != 1:
            raise MarrqError(f"linear {path}.{name} is called {called.count(child)} times in one forward: it cannot be quantized")
    return group_by_input([(names[linear], x) for linear, x in call.linears])


def group_by_input(calls: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names of linears that were called, one tuple for those that were given the same tensor."""
    groups: list[tuple[Tensor, list[str]]] = []
    for name, x in calls:
        shared = next((members for seen, members in groups if seen is x), None)
        if shared is None:
            groups.append((x, [name]))
        else:
            shared.append(name)
    return tuple(tuple(members) for _, members in groups)


def _check_chain(model: nn.Module, blocks: list[Block], images: Tensor) -> None:
    """Each block, called alone on the output of the one before, gives what it gives inside the model."""
    trace = _record(model, {block.path: block.module for block in blocks}, images)
    tokens = trace[blocks[0].path][0].tokens
    for block in blocks:
        tokens = block(tokens)
        if not torch.allclose(tokens, trace[block.path][0].output, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise MarrqError(f"block {block.path!r} does not follow from the one before it alone: the model is no chain of blocks")


def first_output(output: Any) -> Tensor:
    """Tokens of a block's output; transformers' blocks may return tuples."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Removes the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Catch the first argument of the module's first call, and end the forward there."""
    reached: list[Tensor] = []

    class _Reached(Exception):  # one for each call, which may stand within another
        pass

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        reached.append(arguments[0])
        raise _Reached

    with hooked([module.register_forward_pre_hook(hook)]), suppress(_Reached):
        yield reached
