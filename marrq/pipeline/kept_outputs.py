"""Outputs of a block's parts, kept while the block is quantized.

Whoever reads the input of a linear runs the block up to that linear. Most of such a run repeats an
earlier one: once attention is quantized, or on the full-precision path, its output for a batch does
not change any more. So the output of each such part, a direct child of the block's module, is kept
the first time, and given the next time in place of a run of the part. Inside a part that still
changes, the outputs of its quantized linears are kept in the same way.

A finished linear then runs once or twice a batch, however many read what follows it. The price is
memory, which is limited (`KEPT_BYTES`): what finds no room is computed again. The codes do not
depend on it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from marrq.models.blocks import Block
from marrq.quantizers.linear import QuantLinear

KEPT_BYTES = {"cpu": 2**29, "cuda": 2**32}
"""Most that is kept on one path of a block: 512 MB of a host's memory, 4 GB of a GPU's. DINOv2-S
with 256 images of 65 tokens keeps 200 MB at most, a ViT-L with 512 images of 197 tokens 3.3 GB."""

GPU_SHARE = 8
"""On a GPU with little memory a path keeps at most an eighth of it: the model, the statistics and
the activations have to fit beside both paths."""


class KeptOutputs:
    """The outputs of the parts of one block, by batch.

    block: on one path.
    changes: whether the block's linears are being quantized. A part then counts from the moment
        when its last linear is quantized.
    """

    def __init__(self, block: Block, changes: bool) -> None:
        self._block, self._changes = block, changes
        self._room, self._bytes = room_on(next(block.module.parameters()).device), 0
        # By batch and by path of the module: the output, and the versions of its tensors when it
        # was kept.
        self._outputs: defaultdict[int, dict[str, tuple[Any, list[int]]]] = defaultdict(dict)

    @contextmanager
    def used(self, batch: int, reading: str | None) -> Iterator[None]:
        """Inside, the block runs on that batch and its finished parts give what they have kept.

        batch: its index.
        reading: path of the linear whose run somebody watches: the part with this linear is run.
            None for the last run on this batch: what was kept for it is forgotten.
        """
        parts = self._finished()
        for part in parts:
            module = self._block.module.get_submodule(part)
            watched = reading is not None and f"{reading}.".startswith(f"{part}.")
            # An attribute of the object hides the method of its class.
            module.forward = self._forward(part, batch, watched, reading is None)
        try:
            yield
        finally:
            for part in parts:
                del self._block.module.get_submodule(part).forward

    def forget(self, module: str) -> None:
        """Drop what the part with this module has kept: the module has changed."""
        part = module.partition(".")[0]
        for batch in self._outputs:
            self._take(part, batch)
            self._take_inside(part, batch)

    def _finished(self) -> list[str]:
        """Paths of the largest modules whose output cannot change any more: parts with all their
        linears, or else single linears."""
        parts: dict[str, list[str]] = {}
        for name in (name for group in self._block.groups for name in group):
            parts.setdefault(name.partition(".")[0], []).append(name)
        finished: list[str] = []
        for part, names in parts.items():
            # On the full-precision path nothing changes.
            quantized = [name for name in names if not self._changes or self._is_quantized(name)]
            finished += [part] if quantized == names else quantized
        return finished

    def _is_quantized(self, linear: str) -> bool:
        return isinstance(self._block.module.get_submodule(linear), QuantLinear)

    def _forward(self, part: str, batch: int, watched: bool, last: bool) -> Callable[..., Any]:
        """What stands in for the part's forward."""
        run = self._block.module.get_submodule(part).forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            kept = self._take(part, batch)
            # The block may have worked in place on what it was given; then the part runs again.
            if kept is not None and not watched and _versions(kept[0]) == kept[1]:
                output = kept[0]
            else:
                output = run(*arguments, **keywords)
            # Nobody will ask any more for the outputs inside a part that has one of its own.
            self._take_inside(part, batch)
            if not last:
                self._keep(part, batch, output)
            return output

        return forward

    def _keep(self, part: str, batch: int, output: Any) -> None:
        size = sum(tensor.nbytes for tensor in _tensors(output))
        if self._bytes + size <= self._room:
            self._outputs[batch][part] = output, _versions(output)
            self._bytes += size

    def _take(self, part: str, batch: int) -> tuple[Any, list[int]] | None:
        kept = self._outputs[batch].pop(part, None)
        if kept is not None:
            self._bytes -= sum(tensor.nbytes for tensor in _tensors(kept[0]))
        return kept

    def _take_inside(self, part: str, batch: int) -> None:
        for inner in [path for path in self._outputs[batch] if path.startswith(f"{part}.")]:
            self._take(inner, batch)


def room_on(device: torch.device) -> int:
    """How many bytes one path of a block may keep on a device."""
    room = KEPT_BYTES["cpu" if device.type == "cpu" else "cuda"]
    # Tensors without values (FakeTensorMode) name a GPU that may not be there.
    if device.type != "cuda" or not torch.cuda.is_available():
        return room
    return min(room, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, at any depth: each one counts for the memory."""
    if isinstance(output, Tensor):
        return [output]
    # Models of transformers give dictionaries too.
    parts = output.values() if isinstance(output, dict) else output
    parts = parts if isinstance(output, dict | tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _versions(output: Any) -> list[int]:
    """How often each tensor of an output was changed in place."""
    return [tensor._version for tensor in _tensors(output)]
