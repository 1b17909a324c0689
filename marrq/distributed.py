"""Several processes that quantize one model together, on torch.distributed (gloo between CPUs, nccl
between GPUs), started by torchrun.

Each process holds the whole model, and tokens of some batches. Sums over tokens are added up (they
add exactly, marrq/methods/statistics.py); the rows of a weight are shared out, swept, and gathered
(a row knows nothing of the others); whatever is decided once is decided by the same numbers
everywhere, or by the first process. So N processes find the codes that one finds.

Rows are shared out in multiples of 32: matrix products come out the same to the last bit when they
are cut there, as their kernels work on tiles of that size. Nothing here knows what is summed or
swept."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from marrq.errors import MarrqError

Value = TypeVar("Value")

ROW_TILE = 32


@dataclass(frozen=True)
class Processes:
    """The processes, and which of them this is. A processes of one does nothing but what it is
    told."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Consecutive items for this process."""
        return items[
            len(items) * self.rank // self.size : len(items) * (self.rank + 1) // self.size
        ]

    def rows(self, count: int) -> slice:
        """The rows of a weight for this process: all of them, where there are too few to share
        out."""
        if count < ROW_TILE * self.size:
            return slice(0, count)
        tiles = self.share(range(0, count, ROW_TILE))
        return slice(tiles[0], min(tiles[-1] + ROW_TILE, count))

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """All rows, from those of each process."""
        return part if len(part) == count else self.gather(part)

    def total(self, rows: Tensor, count: int) -> float:
        """The sum of numbers that each process has for its rows; in one order, so that it is the
        same number everywhere."""
        return float(self.gather_rows(rows, count).sum())

    def gather(self, part: Tensor) -> Tensor:
        """Tensors of all processes, process_group along the first dimension, which may differ."""
        if self.size == 1:
            return part
        lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(self.size)]
        with _collective():
            dist.all_gather(lengths, torch.tensor([len(part)], device=part.device))
        longest = max(int(length) for length in lengths)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with _collective():
            dist.all_gather(gathered, padded)
        return torch.cat(
            [tensor[: int(length)] for tensor, length in zip(gathered, lengths, strict=True)]
        )

    def all_reduce(self, *tensors: Tensor) -> None:
        """Each tensor becomes the sum over the processes, in place."""
        if self.size > 1:
            with _collective():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def broadcast(self, value: Tensor) -> Tensor:
        """The tensor of the first process; the others give one of that type whose first dimension
        may differ."""
        if self.size == 1:
            return value
        length = torch.tensor(value.shape[:1], device=value.device)
        with _collective():
            dist.broadcast(length, 0)
            sent = (
                value.contiguous()
                if self.is_first
                else value.new_empty(int(length), *value.shape[1:])
            )
            dist.broadcast(sent, 0)
        return sent

    def broadcast_object(self, value: Value) -> Value:
        """What the first process says; what the others give does not matter."""
        if self.size == 1:
            return value
        said = [value]
        with _collective():
            dist.broadcast_object_list(said, 0)
        return said[0]

    def all_agree(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        if self.size == 1:
            return holds
        fails = torch.tensor([not holds], dtype=torch.int64)
        with _collective():
            dist.all_reduce(fails)
        return not int(fails)

    def check_agreement(self, digest: str, subject: str) -> None:
        """Raise MarrqError where the processes have come to different results, which machines of
        different kinds may."""
        if not self.all_agree(digest == self.broadcast_object(digest)):
            raise MarrqError(
                f"processes came to different results in {subject}: run them on machines of one "
                "kind"
            )


ONE_PROCESS = Processes()


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of a process that is gone, or of the network
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"process {dist.get_rank()} lost the others ({reason}): look for the one that failed "
            "first"
        ) from error


def world_size() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process on its machine, where the device is a GPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.type == "cuda" and world_size() > 1
        else device
    )


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started, for the time of the block; a process alone is a
    processes of one."""
    if world_size() == 1:
        yield ONE_PROCESS
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """Everything inside on one thread of the CPU; what runs on a GPU is not touched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
