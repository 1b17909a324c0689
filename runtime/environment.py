"""The machine that a measurement was taken on, the packages that ran, and the session's settings.

A number without them cannot be compared with another: the processor's instruction sets decide which
kernels ONNX Runtime takes.
"""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BenchError
from runtime.records import Record

if TYPE_CHECKING:
    from runtime.session import SessionSettings

# fmt: off
# As Linux names them in /proc/cpuinfo.
X86_FLAGS = (
    "avx", "avx2", "f16c", "fma", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw",
    "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)
ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm")
# fmt: on

# Instruction sets that decide which kernels ONNX Runtime takes.
FLAGS = (*X86_FLAGS, *ARM_FLAGS)

# Those that add products of 8-bit integers into 32 bits.
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")

# Packages that install the same module: of two, the later overwrites files of the other.
ONNXRUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")

PACKAGES = (*ONNXRUNTIME_PACKAGES, "numpy", "onnx")

# The way out of a mixed or damaged ONNX Runtime. marrq is installed from a clone.
REINSTALL = (
    f"pip uninstall {' '.join(ONNXRUNTIME_PACKAGES)}, then pip install '.[cpu]' or '.[gpu]' in the "
    "clone"
)


@dataclass(frozen=True)
class Machine(Record):
    """A machine."""

    processor: str
    # Those of FLAGS that the processor has; empty if the system does not tell.
    processor_flags: tuple[str, ...]
    # Of the machine, also if this process may not use all of them.
    cores: int | None
    system: str
    python: str


@dataclass(frozen=True)
class Environment(Machine):
    """A machine, and what runs on it."""

    # Version of the module that is imported.
    onnxruntime: str
    # Installed versions, by package.
    packages: dict[str, str]
    # Of the session, as the user asked for it.
    provider: str
    providers_available: tuple[str, ...]
    # Of one operator; None is ONNX Runtime's choice.
    threads: int | None
    # Session options, the same for all models.
    allow_spinning: bool
    graph_optimization: str


def describe_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        processor=_cpuinfo("model name") or platform.processor() or platform.machine(),
        processor_flags=tuple(_processor_flags()),
        cores=os.cpu_count(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
    )


def int8_dot_products(flags: Iterable[str]) -> tuple[str, ...]:
    """Those of DOT_PRODUCTS among a processor's flags."""
    return tuple(flag for flag in flags if flag in DOT_PRODUCTS)


def describe(settings: "SessionSettings") -> Environment:
    """The machine, the packages and the session. Raises BenchError if two packages of ONNX Runtime
    are installed."""
    # Imported here: a machine without ONNX Runtime can still be described.
    from runtime.session import ALLOW_SPINNING, ONNXRUNTIME_VERSION, available_providers

    # The keys stand in this order in the report.
    return Environment(
        **vars(describe_machine()),
        onnxruntime=ONNXRUNTIME_VERSION,
        packages=installed_packages(),
        provider=settings.provider,
        providers_available=tuple(available_providers()),
        threads=settings.threads,
        allow_spinning=ALLOW_SPINNING,
        graph_optimization="all",
    )


def installed_packages() -> dict[str, str]:
    """Versions of those of PACKAGES that are installed. Raises BenchError if two packages of ONNX
    Runtime are."""
    found = installed_versions(PACKAGES)
    conflict = onnxruntime_conflict(found)
    if conflict is not None:
        raise BenchError(conflict)
    return found


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    # A package that is not installed is left out, which is no error.
    return {name: installed for name in packages if (installed := _version(name)) is not None}


def onnxruntime_conflict(found: dict[str, str]) -> str | None:
    """A sentence if two packages of ONNX Runtime are among the installed ones, with the way out."""
    rivals = [f"{name} {found[name]}" for name in ONNXRUNTIME_PACKAGES if name in found]
    if len(rivals) < 2:
        return None
    return f"{' and '.join(rivals)} are both installed and overwrite each other: {REINSTALL}"


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    # A container or `taskset` may allow fewer cores than the machine has; only Linux tells.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_flags() -> list[str]:
    """Those of FLAGS that the processor has; none if the system does not tell."""
    # Linux says "flags" on x86 and "Features" on Arm.
    had = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in FLAGS if flag in had]


def _cpuinfo(key: str) -> str | None:
    """What /proc/cpuinfo says of the first core; None without such a file or key."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
