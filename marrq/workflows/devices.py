"""The device that a workflow computes on, and the memory that a part of a workflow takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from marrq.errors import MarrqError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> "torch.device":
    """The device of that name: `auto` is CUDA if torch finds a GPU, else the CPU.

    Each process of torchrun gets the GPU of its local rank. Raises MarrqError for an unknown name,
    and for `cuda` if torch finds no GPU.
    """
    # The name is checked before torch is imported: a typo is told at once.
    if name not in DEVICES:
        raise MarrqError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}")
    import torch

    from marrq.distributed import local_device

    if name == "cuda" and not torch.cuda.is_available():
        raise MarrqError(
            "device 'cuda' is not available here: pass --device cpu, or install a torch that finds "
            "the GPU"
        )
    # Never another device than the one asked for: only `auto` leaves the choice to this line.
    found = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
    return local_device(torch.device(found))


@contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Measure the peak memory of the process from the start of the block on.

    Yields a function that returns the largest resident memory so far in MB, or None if the system
    does not report it (Linux does).
    """
    from runtime.measure.memory import resident_peak_mb

    # Writing 5 sets the peak to what is resident now (proc(5), clear_refs).
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    yield resident_peak_mb
