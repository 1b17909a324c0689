"""The GPU, as its driver describes it: `nvidia-smi --query-gpu`, which comes with every driver of
NVIDIA.

This package imports no library of CUDA, and ONNX Runtime tells neither the name of a GPU nor its
clocks. If nvidia-smi is not there or does not answer, nothing is known and nothing is guessed.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.records import Record

# The way from the ONNX Runtime of the CPU, which the one for GPUs must not be installed beside.
FOR_CUDA = (
    "on a machine with CUDA uninstall onnxruntime, then pip install '.[gpu]' in the clone of marrq"
)

COMMAND = "nvidia-smi"
SECONDS = 20  # a driver that has gone to sleep takes a few

# What is asked, in the order of the fields of Gpu.
QUERIES = (
    "name",
    "driver_version",
    "memory.total",
    "pstate",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
)
# Why the clock is held down. Newer drivers call throttling an event, and one that does not know a
# name refuses the whole question, so each is asked alone.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# How nvidia-smi says that a driver does not tell.
NOT_TOLD = (
    "",
    "N/A",
    "Not Supported",
    "Unknown Error",
    "Requested functionality has been deprecated",
)
# The lowest bit of the reasons: nothing runs. It lowers the clock, and is no fault.
IDLE = 1


@dataclass(frozen=True)
class Gpu(Record):
    """The GPU that CUDA counts as its first. None: the driver does not tell."""

    name: str
    driver: str
    memory_mb: float | None
    # P0 is the fastest state.
    performance_state: str | None
    # Clocks at the moment of asking, and the highest that the card allows.
    sm_mhz: float | None
    max_sm_mhz: float | None
    memory_mhz: float | None
    # Whether the driver holds the clock down at that moment: for power, for heat, or as told.
    throttled: bool | None


def describe_gpu() -> Gpu | None:
    """The GPU as it is now; None if nvidia-smi does not tell."""
    answer = _ask(QUERIES)
    if answer is None:
        return None
    name, driver, memory, state, clock, highest, memory_clock = answer
    reasons = next((found[0] for query in REASONS if (found := _ask((query,)))), None)
    return Gpu(
        name=name or "unknown",
        driver=driver or "unknown",
        # nvidia-smi counts in MiB, this package in 10⁶ bytes.
        memory_mb=_megabytes(memory),
        performance_state=state,
        sm_mhz=_number(clock),
        max_sm_mhz=_number(highest),
        memory_mhz=_number(memory_clock),
        throttled=_is_throttled(reasons),
    )


def memory_used_mb() -> float | None:
    """Memory of the GPU that is in use, by all processes together, in MB (10⁶ bytes); None if
    nvidia-smi does not tell."""
    answer = _ask(("memory.used",))
    return None if answer is None else _megabytes(answer[0])


def _ask(queries: Sequence[str]) -> list[str | None] | None:
    """The answers, None for what the driver does not tell; None without nvidia-smi or a GPU."""
    command = [
        COMMAND,
        f"--id={_first_visible()}",
        f"--query-gpu={','.join(queries)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    # A driver that does not run answers with a sentence instead of a row.
    if done.returncode != 0 or len(cells) != len(queries):
        return None
    return [None if cell.strip("[]") in NOT_TOLD else cell for cell in cells]


def _first_visible() -> str:
    """Index or UUID of the GPU that CUDA counts as its first."""
    # CUDA numbers only those that it may see; nvidia-smi always numbers all. Of cards of different
    # kinds CUDA's first is the fastest, and nvidia-smi's the first on the bus, unless
    # CUDA_DEVICE_ORDER is PCI_BUS_ID.
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _megabytes(mebibytes: str | None) -> float | None:
    number = _number(mebibytes)
    return None if number is None else number * 2**20 / 1e6


def _is_throttled(reasons: str | None) -> bool | None:
    """reasons: a mask of bits in hexadecimal."""
    try:
        return None if reasons is None else bool(int(reasons, 16) & ~IDLE)
    except ValueError:
        return None
