"""Several processes that quantize one model together, started by torchrun, on torch.distributed:
gloo between CPUs, nccl between GPUs.

Every process holds the whole model. They share the work so:

    calibration batches    Each process has some batches and sums their statistics. The sums of all
                           processes are added by all_reduce, and they add exactly
                           (marrq/methods/statistics.py).
    rows of a weight       Each process sweeps some rows, since no row depends on another. The codes
                           are put together by all_gather.
    decisions              Each process decides by the same numbers, or takes what the first process
                           says, by broadcast.

So N processes find the same codes as one process, to the last bit. Rows are shared in multiples of
ROW_TILE: kernels of matrix products work on tiles of that many rows, and a product that is cut
between two tiles keeps every bit.
"""

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
    """The processes that work together, seen from one of them. A process that works alone
    communicates with nobody: its collectives return what they are given.

    Every process must call the collectives (all_gather, all_reduce, broadcast, broadcast_object,
    all_agree, and what is made of them) in the same order.

    rank: the number of this process, 0 … size - 1.
    size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """The items of this process: consecutive, and about as many for each process."""
        # Integer division spreads the remainder: shares differ by one item at most.
        start = len(items) * self.rank // self.size
        return items[start : len(items) * (self.rank + 1) // self.size]

    def rows(self, count: int) -> slice:
        """The rows of this process of a weight with `count` rows. If there are fewer rows than one
        tile for each process, every process has all rows."""
        # Then to share would leave a process without rows. All do the same work and no
        # communication is needed.
        if count < ROW_TILE * self.size:
            return slice(0, count)
        tiles = self.share(range(0, count, ROW_TILE))  # the first row of each tile
        return slice(tiles[0], min(tiles[-1] + ROW_TILE, count))

    def gather_rows(self, part: Tensor, count: int) -> Tensor:
        """All `count` rows of a tensor, from the rows that each process has by `rows(count)`."""
        # Either all rows are here already, or each process has its own.
        return part if len(part) == count else self.all_gather(part)

    def sum_rows(self, part: Tensor, count: int) -> float:
        """The sum of one number for each of `count` rows, from the numbers of each process's rows.
        It is added in the order of the rows, so that every process gets the same bits."""
        # Sums of partial sums would depend on the number of processes. The numbers are gathered and
        # added in one order instead.
        return float(self.gather_rows(part, count).sum())

    def all_gather(self, part: Tensor) -> Tensor:
        """The tensors of all processes, concatenated along the first dimension in the order of the
        ranks. Their first dimensions may differ."""
        if self.size == 1:
            return part
        lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(self.size)]
        with _collective():
            dist.all_gather(lengths, torch.tensor([len(part)], device=part.device))
        # dist.all_gather wants tensors of one shape: pad to the longest, and cut off again.
        longest = max(int(length) for length in lengths)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        # Every process receives all tensors; memory for all of them is needed in each.
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with _collective():
            dist.all_gather(gathered, padded)
        return torch.cat(
            [tensor[: int(length)] for tensor, length in zip(gathered, lengths, strict=True)]
        )

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor, in place, by its sum over the processes."""
        if self.size > 1:
            with _collective():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def broadcast(self, value: Tensor) -> Tensor:
        """The first process's tensor. The tensors of the other processes are not used; they must
        have its type and its shape, up to the first dimension."""
        if self.size == 1:
            return value
        # First the length, so that the others can allocate what they will receive.
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
        """The first process's value, pickled on the way. The values of the others are not used."""
        if self.size == 1:
            return value
        values = [value]
        with _collective():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def all_agree(self, holds: bool) -> bool:
        """Whether `holds` is true in every process."""
        if self.size == 1:
            return holds
        # A sum of failures over the processes: 0 means that all agree.
        fails = torch.tensor([not holds], dtype=torch.int64)
        with _collective():
            dist.all_reduce(fails)
        return not int(fails)

    def check_agreement(self, digest: str, subject: str) -> None:
        """Raise MarrqError if the processes have come to different results, as machines of
        different kinds may.

        digest: a hash of this process's result.
        subject: what the result is, for the message.
        """
        # Compared in every process, so that every process raises and none waits for another.
        if not self.all_agree(digest == self.broadcast_object(digest)):
            raise MarrqError(
                f"processes came to different results in {subject}: run them on machines of one "
                "kind"
            )


ONE_PROCESS = Processes()


@contextmanager
def _collective() -> Iterator[None]:
    """Turn the error of a collective into one sentence. torch raises RuntimeError if a process is
    gone or the network fails."""
    try:
        yield
    except RuntimeError as error:
        # torch puts a stack trace of C++ behind the first line.
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"process {dist.get_rank()} lost the others ({reason}): look for the one that failed "
            "first"
        ) from error


UNSET = "unset WORLD_SIZE to run one process"


def world_size() -> int:
    """How many processes torchrun has started; 1 without torchrun. Raises MarrqError if that is no
    number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) == 0:
        raise MarrqError(f"WORLD_SIZE is the number of processes: got {text!r}; {UNSET}")
    return int(text)


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process if several processes work on GPUs, else the device that is given."""
    if device.type != "cuda" or world_size() == 1:
        return device
    # torchrun numbers the processes of a machine from 0, as CUDA numbers its GPUs.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started, connected until the end of the `with` block. Without
    torchrun this is ONE_PROCESS."""
    if world_size() == 1:
        yield ONE_PROCESS
        return
    try:
        if device.type == "cuda":
            # nccl takes the current GPU of the process: without this all processes take the first.
            torch.cuda.set_device(device)
        # Objects and flags travel as CPU tensors, so gloo is needed beside nccl.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    # A variable that torchrun sets is missing or wrong, there are too few GPUs, or nobody answers.
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MarrqError(
            f"this process cannot join the {world_size()} that WORLD_SIZE names ({reason}): start "
            f"all with torchrun, or {UNSET}"
        ) from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the CPU work inside on one thread. The factorizations of LAPACK give other bits on
    another number of threads; work on a GPU is not affected."""
    # The setting is global in torch, so it is put back whatever happens inside.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
