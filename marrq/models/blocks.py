"""Find the blocks of a vision transformer, and in each block its linears grouped by the input they
share.

No model family is known by name. Blocks are the innermost repeated modules that contain linears
and run (`blocks.3`, `encoder.layer.3`, MobileViT's `transformer.1`, Swin's `downsample`). Trial
forwards, of an image and of the same image with noise, show the rest:

    A block's input is the previous block's output, or not (MobileViT convolves in between). If not,
    it is recomputed by running the model up to that block.
    A linear's input is the same for both images (Swin v2's relative positions). Such a linear is a
    constant in the end and stays in floating point.
    A block's further arguments (Swin's resolution, rotary tables) are the same for both images, and
    for several images at once.

A model is refused if a block reads or gives more than one stream of tokens (TNT's pixels and
patches), or if a linear is used other than by calling it once.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from marrq.errors import MarrqError
from marrq.schemes import Scheme

CONTAINER = r"\w*(block|layer|stage|transformer|transformer_encoder|network)s?\d*"
ONLY_VITS = "only vision transformers can be quantized"
BLOCK_NAME = re.compile(rf"(.*\.)?({CONTAINER}(\.\d+)+|downsample)")
TRIAL_SEED = 0

BlockKind = Literal["first", "block", "last"]
"""first: the layers before the first block; block: a repeated block; last: the layers after the
last block (marrq/models/first_last.py has the first and the last)."""


@dataclass(frozen=True)
class Block:
    """One block: tokens in, tokens out.

    path: the block's module path in the model.
    module: computes the block; the pipeline replaces its linears in place.
    groups: paths of the linears within the block, in order of execution, one tuple for the linears
        that share an input.
    follows: whether the block's input is the previous block's output.
    arguments, keywords: what the model passes to the block besides the tokens.
    """

    kind: ClassVar[BlockKind] = "block"

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
        """The path in the model of the linear at a path within the block."""
        return f"{self.path}.{linear}" if self.path else linear

    def scheme_of(self, scheme: Scheme) -> Scheme:
        """The bits and grids of this block's linears, if the model is quantized by `scheme`."""
        return scheme

    def owns(self, tensor: str) -> bool:
        """Whether the tensor of this name in `module` belongs to the block."""
        return True

    def copied(self) -> "Block":
        """The same block with parameters of its own."""
        return replace(self, module=copy.deepcopy(self.module))

    def in_float64(self) -> "Block":
        """A copy in float64, with float64 arguments."""

        def double(value: Any) -> Any:
            # Masks and index tables among the arguments keep their type.
            is_float = isinstance(value, Tensor) and value.is_floating_point()
            return value.double() if is_float else value

        return replace(
            self,
            # `double` works in place, hence on a copy.
            module=copy.deepcopy(self.module).double(),
            arguments=tuple(map(double, self.arguments)),
            keywords={name: double(value) for name, value in self.keywords.items()},
        )

    def input_of(self, linear: str, tokens: Tensor) -> Tensor:
        """The input of a linear (a path within the block) for the block's input `tokens`. Nothing
        after the linear is computed."""
        # The forward ends at the linear: for q and k of a block this saves most of the block.
        with stop_at(self.module.get_submodule(linear)) as reached:
            self(tokens)
        return reached[0]

    def input_from(self, model: nn.Module, images: Tensor) -> Tensor:
        """The tokens that enter the block if the model, or a copy of it, gets `images`. Nothing
        after the block's input is computed."""
        # By path and not by module: the model may be a copy, with modules of its own.
        with stop_at(model.get_submodule(self.path)) as reached:
            model(images)
        return reached[0]


@torch.no_grad()
def find_blocks(model: nn.Module, images: Tensor) -> list[Block]:
    """The blocks in order of execution.

    images: [at least 1, channels, height, width]; the first image serves for both trial forwards.
    Raises MarrqError if the model has no blocks, if a block depends on more than its tokens, or if
        a linear is used other than by calling it once.
    """
    # By name alone. Whether a candidate is a block that can be quantized is decided by what the
    # trial forwards show.
    candidates = _candidates(model)
    noise = torch.randn(images[:1].shape, generator=torch.Generator().manual_seed(TRIAL_SEED))
    # Two images that differ everywhere: whatever is equal for both does not depend on the image.
    other = images[:1] + noise.to(images)
    first, second = (_record(model, candidates, image) for image in (images[:1], other))
    # What is equal for one image and for two does not depend on their number.
    both = _record(model, candidates, torch.cat([images[:1], other]))
    paths = _innermost(first)
    if not paths:
        raise MarrqError(f"the model has no repeated blocks with linear layers: {ONLY_VITS}")
    # Calls are in the order of execution, and so are the blocks.
    blocks: list[Block] = []
    previous_output: Tensor | None = None
    for path in paths:
        calls = first[path]
        if len(calls) != 1:
            raise MarrqError(
                f"block {path!r} runs {len(calls)} times in one forward: only blocks that run once "
                "can be quantized"
            )
        [call], [other_call], [call_of_both] = calls, second[path], both[path]
        tokens = other_call.tokens(path)
        block = Block(
            path,
            candidates[path],
            # Groups come from the calls, not from the names of modules: q, k and v are one group if
            # they are given the same tensor.
            _groups(path, candidates[path], call, other_call),
            # Tested on the second image. The first block has no previous output and never follows.
            previous_output is not None and _same(previous_output, tokens),
            call.arguments[1:],
            call.keywords,
        )
        # The block has the further arguments of the first image and the tokens of another call. If
        # its outputs are those of that call, the arguments do not depend on the images.
        if not (_runs_alone(block, other_call) and _runs_alone(block, call_of_both)):
            raise MarrqError(
                f"block {path!r} gives other tokens alone than in the model: what else it reads "
                "depends on the images"
            )
        blocks.append(block)
        previous_output = first_output(other_call.output)
    # Linears on positions alone, as in CoAtNet's relative ones, multiply no tokens.
    if not any(block.groups for block in blocks):
        raise MarrqError(f"no linear of the model's blocks reads the image: {ONLY_VITS}")
    return blocks


@dataclass
class _Call:
    """One call of a candidate in a trial forward.

    arguments, keywords: what the call was given.
    linears: the linears that the call ran, with their inputs, in order of execution.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    linears: list[tuple[nn.Module, Tensor]]
    output: Any

    def tokens(self, path: str) -> Tensor:
        """The first argument. Raises MarrqError if it is no tensor. path: of the block."""
        if not self.arguments or not isinstance(self.arguments[0], Tensor):
            raise MarrqError(
                f"block {path!r} does not take its tokens as first argument: it cannot be quantized"
            )
        return self.arguments[0]


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with the name of a block and with linears inside."""
    return {
        path: module
        for path, module in model.named_modules()
        if BLOCK_NAME.fullmatch(path)
        and any(isinstance(child, nn.Linear) for child in module.modules() if child is not module)
    }


def _innermost(trace: dict[str, list[_Call]]) -> list[str]:
    """Of candidates that contain each other the inner ones, in order of execution.

    Swin's `layers.0` contains `layers.0.blocks.0`. A list of modules is never called, so that
    Twins' `blocks.0` is no candidate and `blocks.0.1` is one.
    """
    return [path for path in trace if not any(other.startswith(path + ".") for other in trace)]


@torch.no_grad()
def _runs_alone(block: Block, call: _Call) -> bool:
    """Whether the block, with its own further arguments, gives all outputs of a call."""
    try:
        output = block.module(call.tokens(block.path), *block.arguments, **block.keywords)
    # A table of another number of images does not fit the tokens.
    except RuntimeError:
        return False
    return _all_same(output, call.output)


def _all_same(a: Any, b: Any) -> bool:
    """Whether two outputs hold the same tensors, at any depth."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and _same(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_all_same(x, y) for x, y in zip(a, b, strict=True))
    return True


def _record(
    model: nn.Module, candidates: dict[str, nn.Module], images: Tensor
) -> dict[str, list[_Call]]:
    """The calls of each candidate in one forward, in order of execution."""
    trace: dict[str, list[_Call]] = {}
    linears: list[tuple[nn.Module, Tensor]] = []

    def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        linears.append((module, arguments[0]))

    def leave(path: str) -> Any:
        def hook(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any
        ) -> None:
            # Linears were called before their block returns: those of this block are picked out.
            inside = set(module.modules())
            own = [(linear, x) for linear, x in linears if linear in inside]
            call = _Call(arguments, dict(keywords), own, output)
            trace.setdefault(path, []).append(call)

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
    """The block's linears, grouped by the identity of their input. Linears whose input is the same
    for both images are left out."""
    # Both forwards call the same linears in the same order, so that calls can be compared in pairs.
    constant = {
        linear
        for (linear, x), (_, y) in zip(call.linears, other.linears, strict=True)
        if torch.equal(x, y)
    }
    names = {
        child: name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and child not in constant
    }
    called = [(linear, x) for linear, x in call.linears if linear in names]
    for child, name in names.items():
        # No call: its weight is used directly. Two calls: it has two inputs, and one statistics
        # would mix them.
        count = sum(linear is child for linear, _ in called)
        if count != 1:
            raise MarrqError(
                f"linear {path}.{name} is called {count} times in one forward: it cannot be "
                "quantized"
            )
    return group_by_input([(names[linear], x) for linear, x in called])


def group_by_input(calls: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    """Names of linears with their inputs, to one tuple of names for each distinct tensor."""
    groups: dict[int, list[str]] = {}
    for name, x in calls:
        # By identity: `calls` keeps the tensors alive, so that no id is used twice.
        groups.setdefault(id(x), []).append(name)
    return tuple(tuple(members) for members in groups.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    # The tolerance covers products whose kernels round differently in another batch; NaN equals
    # NaN, so that a model with broken weights is refused by its weights and not by its shape.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def first_output(output: Any) -> Tensor:
    """The tokens of a block's output. Blocks of transformers may return tuples."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        # A hook that stayed would run in every later forward, and in every copy of the model.
        for handle in handles:
            handle.remove()


@contextmanager
def stop_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Catch the first argument of the module's first call, and end the forward there."""
    reached: list[Tensor] = []

    # A class for each use: stop_at may stand within another stop_at, which must not catch it.
    class _Reached(Exception):
        pass

    # An exception is the only way to end a forward of a foreign module.
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        reached.append(arguments[0])
        raise _Reached

    with hooked([module.register_forward_pre_hook(hook)]), suppress(_Reached):
        yield reached
