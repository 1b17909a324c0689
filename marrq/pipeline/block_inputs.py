"""The calibration tokens: which images make a batch, which process has it, and where the tokens of
a batch are kept.

Images are cut into batches, never across the middle of the set: the first half fills the first half
of the statistics, the rest the second. The cut depends on the number of images and the size of a
batch alone, so that N processes see the batches that one sees. Tokens are kept in memory, or in
memory-mapped files, of which a batch is mapped while it is used."""

import math
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from marrq.distributed import Processes
from marrq.errors import MarrqError


@dataclass(frozen=True)
class Batch:
    """Some consecutive images. index: its place among all batches; half: of the calibration set."""

    index: int
    half: int
    rows: slice

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)


def cut(images: int, size: int) -> list[Batch]:
    """The batches of that many images."""
    middle = (images + 1) // 2
    halves = ((0, 0, middle), (1, middle, images))
    parts = [
        (half, slice(start, min(start + size, end)))
        for half, begin, end in halves
        for start in range(begin, end, size)
    ]
    return [Batch(index, half, rows) for index, (half, rows) in enumerate(parts)]


def share_of(batches: list[Batch], processes: Processes) -> list[Batch]:
    """The batches of this process. Raises MarrqError where one would have none."""
    if processes.size > len(batches):
        raise MarrqError(
            f"{processes.size} processes for {len(batches)} batches of calibration images: raise "
            "--samples, or start fewer"
        )
    return list(processes.share(batches))


class Tokens(Protocol):
    """The tokens of batches, on the CPU: a list of tensors, or what gives them one by one."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


Store = Callable[[Iterable[Tensor]], Tokens]
"""Takes the tokens of batches as they are computed, and keeps them on the CPU."""


def in_memory(tokens: Iterable[Tensor]) -> Tokens:
    """Where a GPU computes, in memory that it can copy from without the CPU."""
    return [
        batch.cpu().pin_memory() if batch.is_cuda and torch.cuda.is_available() else batch.cpu()
        for batch in tokens
    ]


def in_files(folder: Path) -> Store:
    """In a file within the folder. It has no name there: whatever ends the process, nothing is left
    behind."""

    def keep(tokens: Iterable[Tensor]) -> Tokens:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the tokens are used
            places = []
            for values in (batch.cpu().contiguous().numpy() for batch in tokens):
                places.append((file.tell(), values.dtype, values.shape))
                _write(file, values)
        except OSError as error:
            raise MarrqError(
                f"cannot keep tokens in {str(folder)!r}: {error.strerror}; make room, or choose "
                "another --work-dir"
            ) from error
        kept = _Mapped(file, places)
        weakref.finalize(kept, file.close)
        return kept

    return keep


def _write(file: Any, values: np.ndarray[Any, Any]) -> None:
    """All bytes: an unbuffered file may take fewer at once."""
    left = values.reshape(-1).view(np.uint8)
    while len(left):
        left = left[file.write(left.data) :]


class _Mapped:
    """Batches in a file. places: offset, type and shape of each."""

    def __init__(self, file: Any, places: list[tuple[int, np.dtype[Any], tuple[int, ...]]]) -> None:
        self._file, self._places = file, places

    def __getitem__(self, index: int) -> Tensor:
        """A batch, mapped as long as its tensor lives; copied where it is written to."""
        offset, kind, shape = self._places[index]
        if not math.prod(shape):
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype)
        return torch.from_numpy(np.memmap(self._file, kind, mode="c", offset=offset, shape=shape))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self._places)))


@dataclass(frozen=True)
class BlockInputs:
    """The tokens that enter a block on both paths, by batch, on the CPU. cut: all batches; batches:
    those of this process; first_original, first_quantized: of the first batch of all, in every
    process."""

    cut: list[Batch]
    batches: list[Batch]
    original: Tokens
    quantized: Tokens
    first_original: Tensor
    first_quantized: Tensor

    @classmethod
    def of(
        cls, batches: list[Batch], original: Tokens, quantized: Tokens, processes: Processes
    ) -> "BlockInputs":
        """The streams, with the first batch told to all. batches: all; original, quantized: the
        tokens of this process's."""
        mine = share_of(batches, processes)
        return cls(
            batches,
            mine,
            original,
            quantized,
            processes.broadcast(original[0]),
            processes.broadcast(quantized[0]),
        )

    def every(self, step: int, tokens: Tokens) -> Iterator[tuple[Batch, Tensor]]:
        """Every step-th batch of all, as far as this process has it, with its tokens of one of the
        paths."""
        return (
            (batch, tokens[place])
            for place, batch in enumerate(self.batches)
            if batch.index % step == 0
        )
