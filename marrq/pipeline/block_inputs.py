"""The tokens that enter a block: which images form a batch, which process computes which batches,
and where tokens are kept.

The calibration images are cut into batches. No batch crosses the middle of the set: the first half
of the images fills the first half of the statistics, the rest fills the second half
(marrq/methods/problem.py). The cut depends on the number of images and the batch size alone, so
that N processes work on the same batches as one process.

Tokens are kept in memory, or in files. A batch in a file is mapped into memory while it is used.
"""

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
from marrq.pipeline.copies import to_host


@dataclass(frozen=True)
class Batch:
    """Some consecutive calibration images.

    index: its position among all batches. count: the number of all batches.
    half: the half of the calibration set that it belongs to, 0 or 1.
    rows: its images.
    """

    index: int
    count: int
    half: int
    rows: slice

    def __len__(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def is_among(self, most: int) -> bool:
        """Whether it is one of the batches that stand for all: at most `most`, evenly spaced."""
        # By the index among all batches, so that the choice does not depend on the processes.
        return self.index % math.ceil(self.count / most) == 0


def cut(images: int, size: int) -> list[Batch]:
    """The batches of a set of `images` images, at most `size` images each."""
    # The first half is the larger one if the number of images is odd.
    middle = (images + 1) // 2
    # The last batch of a half may be smaller than the others.
    cuts = [
        (half, slice(start, min(start + size, end)))
        for half, (begin, end) in enumerate([(0, middle), (middle, images)])
        for start in range(begin, end, size)
    ]
    return [Batch(index, len(cuts), half, rows) for index, (half, rows) in enumerate(cuts)]


def share_of(batches: list[Batch], processes: Processes) -> list[Batch]:
    """The batches of this process. Raises MarrqError if there are fewer batches than processes."""
    # A process without batches would have no tokens from which to take shapes and units.
    if processes.size > len(batches):
        raise MarrqError(
            f"{processes.size} processes for {len(batches)} batches of calibration images: raise "
            "--samples, or start fewer processes"
        )
    return list(processes.share(batches))


class TokenBatches(Protocol):
    """The tokens of this process's batches, on the CPU: a list of tensors, or an object that reads
    them from a file."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


Store = Callable[[Iterable[Tensor]], TokenBatches]
"""Takes the tokens of batches as they are computed, and keeps them on the CPU."""


def in_memory(tokens: Iterable[Tensor]) -> TokenBatches:
    """A store in memory."""
    return to_host(tokens)


def in_files(folder: Path) -> Store:
    """A store in files of a folder. The files have no names there, so that nothing is left behind,
    however the process ends."""

    def store(tokens: Iterable[Tensor]) -> TokenBatches:
        places = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that the bytes are in the file when it is mapped.
            # Linux removes the name at once (O_TMPFILE, or unlink after open).
            # It stays open as long as the tokens are used, and no `with` can say how long.
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            for values in (batch.cpu().contiguous().numpy() for batch in tokens):
                # The position before the batch is written is where it begins.
                places.append((file.tell(), values.dtype, values.shape))
                _write_all(file, values)
        except OSError as error:
            raise MarrqError(
                f"cannot keep tokens in {str(folder)!r}: {error.strerror}; make room, or choose "
                "another --work-dir"
            ) from error
        mapped = _MappedBatches(file, places)
        # Without a name the file is gone as soon as it is closed.
        weakref.finalize(mapped, file.close)
        return mapped

    return store


def _write_all(file: Any, values: np.ndarray[Any, Any]) -> None:
    """Write all bytes. One call of an unbuffered file's `write` may write fewer."""
    # As bytes, so that the count that `write` returns can be used as an index.
    left = values.reshape(-1).view(np.uint8)
    while len(left):
        left = left[file.write(left.data) :]


class _MappedBatches:
    """Batches in a file. places: offset, type and shape of each batch."""

    def __init__(self, file: Any, places: list[tuple[int, np.dtype[Any], tuple[int, ...]]]) -> None:
        self._file, self._places = file, places

    def __getitem__(self, index: int) -> Tensor:
        """A batch, mapped as long as the tensor lives. What is written to the tensor stays in
        memory and does not change the file."""
        offset, kind, shape = self._places[index]
        # A file cannot be mapped over 0 bytes.
        if not math.prod(shape):
            return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, kind)).dtype)
        # Copy on write (mode c): the block may work in place on its input without changing the
        # file. Pages come from the disk when they are read, and the system may drop them again.
        return torch.from_numpy(np.memmap(self._file, kind, mode="c", offset=offset, shape=shape))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self._places)))


@dataclass(frozen=True)
class BlockInputs:
    """The tokens that enter a block on both paths.

    batches: the batches of all processes.
    own: the batches of this process.
    original: the tokens of `own` on the full-precision path.
    quantized: the tokens of `own` on the quantized path.
    first_original, first_quantized: the tokens of the very first batch, the same in every process.
    """

    batches: list[Batch]
    own: list[Batch]
    original: TokenBatches
    quantized: TokenBatches
    first_original: Tensor
    first_quantized: Tensor

    @classmethod
    def of(
        cls,
        batches: list[Batch],
        original: TokenBatches,
        quantized: TokenBatches,
        processes: Processes,
    ) -> "BlockInputs":
        """The inputs from the tokens of this process. All processes call this together."""
        # Process 0 has the very first batch. Everyone needs it: trial forwards and units must be
        # the same everywhere.
        own = share_of(batches, processes)
        first_original = processes.broadcast(original[0])
        first_quantized = processes.broadcast(quantized[0])
        return cls(batches, own, original, quantized, first_original, first_quantized)

    def sampled(self, most: int) -> Iterator[tuple[Batch, int]]:
        """The batches of this process that are among `most` of all, with their places in `own`."""
        for place, batch in enumerate(self.own):
            if batch.is_among(most):
                yield batch, place
