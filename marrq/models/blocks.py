"""Find the blocks of a vision transformer, and in each block its linears grouped by the input they
share.

Nothing here knows a family by name. Blocks are the innermost repeated modules (`blocks.3`,
`encoder.layer.3`, MobileViT's `transformer.1`, Swin's `downsample`) that contain linears. Two trial
forwards, of an image without and with noise, show the rest:

    a block's input is the output of the one before, or not: then its tokens come from the model (MobileViT convolves in between)
    a linear's input does not depend on the images: it stays in floating point (Swin v2's relative positions), a constant in the end
    what a block is called with besides its input (Swin's resolution, rotary tables) is the same for other images

A model for which the last does not hold, or which uses a linear other than by calling it once, is
refused."""

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

BLOCK_NAME = re.compile(r"(.*\.)?((blocks|layers?|transformer)\.\d+|downsample)")
TRIAL_SEED = 0


@dataclass(frozen=True)
class Block:
    """One block: tokens in, tokens out.

    path: where it stands in the model; groups: paths of its linears within the block, in order of
    execution, one tuple for linears that share an input; follows: whether its tokens are the output
    of the block before it; arguments, keywords: what the model calls it with besides the tokens.
    """

    path: str
    module: nn.Module
    groups: tuple[tuple[str, ...], ...]
    follows: bool
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

    def in_float64(self) -> "Block":
        """A copy in float64, with the tensors that it is called with."""

        def double(value: Any) -> Any:
            return (
                value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            )

        keywords = {name: double(value) for name, value in self.keywords.items()}
        module = copy.deepcopy(self.module).double()
        return replace(
            self, module=module, arguments=tuple(map(double, self.arguments)), keywords=keywords
        )

    def input_of(self, linear: str, tokens: Tensor) -> Tensor:
        """What the linear (a path within the block) receives when the block gets `tokens`; nothing
        after it is computed."""
        with stop_at(self.module.get_submodule(linear)) as reached:
            self(tokens)
        return reached[0]


@torch.no_grad()
def find_blocks(model: nn.Module, images: Tensor) -> list[Block]:
    """The blocks in order of execution. images: [at least 1, channels, height, width], for a trial;
    the other trial is on it with noise. Raises MarrqError when the model has none, when one depends
    on more than its tokens, or when a linear is used other than by calling it."""
    candidates = _candidates(model)
    if not candidates:
        raise MarrqError(
            "the model has no repeated blocks with linear layers: only vision transformers can be "
            "quantized"
        )
    noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(TRIAL_SEED)).to(
        images
    )
    first, second = (
        _record(model, candidates, image) for image in (images[:1], images[:1] + noise)
    )
    blocks: list[Block] = []
    before: Tensor | None = None
    for path, calls in first.items():
        if len(calls) != 1:
            raise MarrqError(
                f"block {path!r} runs {len(calls)} times in one forward: only blocks that run once "
                "can be quantized"
            )
        [call], [other] = calls, second[path]
        groups = _groups(path, candidates[path], call, other)
        block = Block(
            path,
            candidates[path],
            groups,
            before is not None and _same(before, other.tokens),
            *call.rest,
        )
        if not _same(block(other.tokens), other.output):
            raise MarrqError(
                f"block {path!r} gives other tokens alone than in the model: what else it reads "
                "depends on the images"
            )
        blocks.append(block)
        before = other.output
    return blocks


def first_input(model: nn.Module, block: Block, images: Tensor) -> Tensor:
    """The tokens that enter the block when the model, or a copy of it, gets `images`; nothing after
    it is computed."""
    with stop_at(model.get_submodule(block.path)) as reached:
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
        if BLOCK_NAME.fullmatch(path)
        and any(isinstance(child, nn.Linear) for child in module.modules())
    }
    return {
        path: module
        for path, module in named.items()
        if not any(other.startswith(path + ".") for other in named)
    }


def _record(
    model: nn.Module, candidates: dict[str, nn.Module], images: Tensor
) -> dict[str, list[_Call]]:
    """Calls of each candidate block in one forward, in order of execution."""
    trace: dict[str, list[_Call]] = {}
    linears: list[tuple[nn.Module, Tensor]] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        linears.append((module, arguments[0]))

    def leave(path: str) -> Any:
        def hook(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            if not arguments:
                raise MarrqError(
                    f"block {path!r} does not take its tokens as first argument: it cannot be "
                    "quantized"
                )
            inside = set(module.modules())
            mine = [(linear, x) for linear, x in linears if linear in inside]
            trace.setdefault(path, []).append(
                _Call(arguments[0], (arguments[1:], dict(keywords)), mine, first_output(output))
            )

        return hook

    handles = [
        module.register_forward_hook(leave(path), with_kwargs=True)
        for path, module in candidates.items()
    ]
    handles += [
        module.register_forward_pre_hook(enter)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with hooked(handles):
        model(images)
    return trace


def _groups(path: str, module: nn.Module, call: _Call, other: _Call) -> tuple[tuple[str, ...], ...]:
    """The block's linears, grouped by identity of their input, without those whose input is the
    same in a call with other images."""
    fixed = {
        linear
        for (linear, x), (_, y) in zip(call.linears, other.linears, strict=True)
        if torch.equal(x, y)
    }
    names = {
        child: name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and child not in fixed
    }
    called = [(linear, x) for linear, x in call.linears if linear in names]
    for child, name in names.items():
        count = sum(linear is child for linear, _ in called)
        if count != 1:
            raise MarrqError(
                f"linear {path}.{name} is called {count} times in one forward: it cannot be "
                "quantized"
            )
    return group_by_input([(names[linear], x) for linear, x in called])


def group_by_input(calls: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names of linears that were called, one tuple for those that were given the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, x in calls:
        groups.setdefault(id(x), []).append(name)
    return tuple(tuple(members) for members in groups.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal but for rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


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
