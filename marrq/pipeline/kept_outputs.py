"""Outputs of a block's parts, kept while the block is quantized.

Whoever reads the input of a linear runs the block up to that linear. Most of such a run repeats an
earlier one: once attention is quantized, or on the full-precision path, its output for a batch does
not change any more. So the output of each such part, a direct child of the block's module, is kept
the first time, and given the next time in place of a run of the part.

A block of a ViT then runs about 3 times in place of 7. The price is memory for the output of
attention on both paths, and of the MLP on the full-precision path, as large as the tokens that enter
the block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from marrq.models.blocks import Block


class KeptOutputs:
    """The outputs of the parts of one block, by batch.

    block: on one path.
    changes: whether the block's linears are being quantized. A part then counts from the moment
        when its last linear is quantized.
    """

    def __init__(self, block: Block, changes: bool) -> None:
        self._block, self._changes = block, changes
        # By part and batch: the output, and the versions of its tensors when it was kept.
        self._outputs: dict[tuple[str, int], tuple[Any, list[int]]] = {}

    @contextmanager
    def used(self, batch: int, reading: str | None) -> Iterator[None]:
        """Inside, the block runs on that batch and its finished parts give what they have kept.

        batch: its index.
        reading: path of the linear whose run somebody watches: the part with this linear is run.
            None for the last run on this batch: what was kept for it is forgotten.
        """
        parts = [part for part in self._parts() if self._is_finished(part)]
        for part in parts:
            module = self._block.module.get_submodule(part)
            watched = reading is not None and reading.startswith(f"{part}.")
            # An attribute of the object hides the method of its class.
            module.forward = self._forward(module, (part, batch), watched, reading is None)
        try:
            yield
        finally:
            for part in parts:
                del self._block.module.get_submodule(part).forward

    def forget(self, module: str) -> None:
        """Drop what the part with this module has kept: the module has changed."""
        part = module.partition(".")[0]
        self._outputs = {key: value for key, value in self._outputs.items() if key[0] != part}

    def _parts(self) -> dict[str, list[str]]:
        """The direct children of the block that hold linears, with their linears."""
        parts: dict[str, list[str]] = {}
        for name in (name for group in self._block.groups for name in group):
            part, dot, _ = name.partition(".")
            # A linear that is a child itself is cheap to run; its hooks are others' business.
            if dot:
                parts.setdefault(part, []).append(name)
        return parts

    def _is_finished(self, part: str) -> bool:
        """Whether no linear of the part can change any more."""
        return not self._changes or not any(
            isinstance(self._block.module.get_submodule(name), nn.Linear)
            for name in self._parts()[part]
        )

    def _forward(
        self, module: nn.Module, key: tuple[str, int], watched: bool, last: bool
    ) -> Callable[..., Any]:
        """What stands in for the part's forward."""
        run = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            kept = self._outputs.pop(key, None)
            # The block may have worked in place on what it was given; then the part runs again.
            if kept is not None and not watched and _versions(kept[0]) == kept[1]:
                output = kept[0]
            else:
                output = run(*arguments, **keywords)
            if not last:
                self._outputs[key] = output, _versions(output)
            return output

        return forward


def _versions(output: Any) -> list[int]:
    """How often each tensor of an output was changed in place."""
    tensors = output if isinstance(output, tuple | list) else [output]
    return [tensor._version for tensor in tensors if isinstance(tensor, Tensor)]
