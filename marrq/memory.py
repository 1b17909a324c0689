"""How much memory quantizing a model takes, before it begins, and the batch size with which it fits.

    resident now                              libraries, the model, what loading it took
    4 × the largest block                     its untouched copy, and a trial in float64
    21 n² + 10 m n in float64                 sums of both halves and of all, six factors, and what making one takes; n inputs, m outputs;
    15 n² + 13 m n                            where the linear writes to the stream, and the method aims at that; the largest counts
    24 n · 4096 bytes                         rows swept at once in the search of grids (methods/gptq.py)
    2 × batch × the peak of one forward       both paths; measured on one image
    4 × images × tokens                       both streams, and those behind the block; nothing where they are in files

The terms are upper bounds that need not come together. Where blocks do not follow each other, a copy of the model comes to it.
"""

import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marrq.blocks import Block, find_blocks, first_input
from marrq.errors import MarrqError
from marrq.methods import STREAM_METHODS
from marrq.methods.gptq import STACKED_ROWS
from marrq.stream import find_writer

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """`6GB`, `512MiB` to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text)
    if not match:
        raise MarrqError(f"a size is a number with {', '.join(UNITS)}, for example 6GB: got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


@dataclass(frozen=True)
class Need:
    """Bytes that quantizing takes: fixed, for each image of a batch, and for the streams."""

    fixed: int
    per_image: int
    streams: int

    def of(self, batch: int) -> int:
        """In all, with batches of that size."""
        return self.fixed + batch * self.per_image + self.streams


@torch.no_grad()
def need(model: nn.Module, image: Tensor, images: int, method: str, in_files: bool) -> Need:
    """What a model takes. image: [1, channels, height, width], for a trial; images: calibration images; method: its full name; in_files:
    whether tokens are kept there."""
    blocks = find_blocks(model, image)
    sums = _sums(model, image, blocks, method in STREAM_METHODS)
    largest = max(sum(tensor.nbytes for tensor in block.module.parameters()) for block in blocks)
    rows = 24 * STACKED_ROWS * max(inputs for inputs, _ in sums)
    copied = 0 if all(block.follows for block in blocks[1:]) else sum(tensor.nbytes for tensor in model.parameters())
    tokens = max(first_input(model, block, image).nbytes for block in blocks)
    with _Live() as live:
        model(image)
    fixed = resident() + 4 * largest + 8 * max(sums.values()) + rows + copied
    return Need(fixed, 2 * live.peak, 0 if in_files else 4 * images * tokens)


def _sums(model: nn.Module, image: Tensor, blocks: list[Block], at_stream: bool) -> dict[tuple[int, int], int]:
    """Numbers in float64 that a linear takes, by inputs and outputs; linears of one shape are taken to do the same."""
    found: dict[tuple[int, int], int] = {}
    for block in blocks:
        for group in block.groups:
            shapes = {(block.linear(name).in_features, block.linear(name).out_features) for name in group}
            for inputs, outputs in shapes - found.keys():
                writes = at_stream and len(group) == 1 and find_writer(block, group[0], first_input(model, block, image)) is not None
                squares, products = (15, 13) if writes else (21, 10)
                found[inputs, outputs] = squares * inputs**2 + products * inputs * outputs
    return found


def resident() -> int:
    """Bytes of this process that are in memory now. Raises MarrqError where the system does not tell it; Linux does."""
    status = Path("/proc/self/status")
    match = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if match is None:
        raise MarrqError("this system does not tell how much memory a process takes: leave --max-memory out")
    return int(match[1]) * 1024


def fitting_batch(found: Need, limit: int, largest: int) -> int:
    """The largest batch size, of those that `largest` gives when it is halved, that fits. Raises MarrqError with what is needed where none
    does."""
    batch = largest
    while batch and found.of(batch) > limit:
        batch //= 2
    if not batch:
        parts = f"{_gb(found.fixed)} for the model and its sums, {_gb(found.per_image)} for an image, {_gb(found.streams)} for tokens"
        ways = "raise --max-memory" + (", lower --samples or pass --work-dir" if found.streams else "")
        raise MarrqError(f"{_gb(limit)} of memory are too few: {_gb(found.of(1))} are needed with one image at a time ({parts}): {ways}")
    return batch


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and live at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._holders:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._holders[place] = self._holders.get(place, 0) + 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self._now -= size
