"""The machine a measurement was taken on, what ran there, and with which settings."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import BenchError

if TYPE_CHECKING:
    from runtime.session import SessionSettings

FLAGS = (
    *(
        "avx",
        "avx2",
        "f16c",
        "fma",
        "avx_vnni",
        "avx_vnni_int8",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *(
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimdhp",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
        "svei8mm",
    ),
)
"""Instruction sets that decide which kernels ONNX Runtime takes, as Linux names them; x86 first,
then Arm."""

ONNXRUNTIME_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
"""Packages that install the same module: of two, the later overwrites files of the other."""

PACKAGES = (*ONNXRUNTIME_PACKAGES, "numpy", "onnx")

REINSTALL = (
    f"pip uninstall {' '.join(ONNXRUNTIME_PACKAGES)}, then pip install 'marrq[cpu]' or 'marrq[gpu]'"
)
"""The way out of a mixed or damaged ONNX Runtime."""


def describe_machine() -> dict[str, Any]:
    """Processor, its flags, cores and system, as JSON."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "processor_flags": _processor_flags(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def describe(settings: "SessionSettings") -> dict[str, Any]:
    """The machine, the versions of packages and the session settings, as JSON. threads: None is
    ONNX Runtime's choice. Raises BenchError when two packages of ONNX Runtime are installed."""
    from runtime.session import (
        ALLOW_SPINNING,
        ONNXRUNTIME_VERSION,
        available_providers,
    )  # a machine without it can still be described

    packages = installed_packages()
    return {
        **describe_machine(),
        "onnxruntime": ONNXRUNTIME_VERSION,
        "packages": packages,
        "provider": settings.provider,
        "providers_available": available_providers(),
        "threads": settings.threads,
        "allow_spinning": ALLOW_SPINNING,
        "graph_optimization": "all",
    }


def installed_packages() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed. Raises BenchError for two
    packages of ONNX Runtime."""
    found = installed_versions(PACKAGES)
    conflict = onnxruntime_conflict(found)
    if conflict is not None:
        raise BenchError(conflict)
    return found


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    return {name: installed for name in packages if (installed := _version(name)) is not None}


def onnxruntime_conflict(found: dict[str, str]) -> str | None:
    """What is wrong with two packages of ONNX Runtime among the installed ones, and the way out;
    None where there are not two."""
    rivals = [f"{name} {found[name]}" for name in ONNXRUNTIME_PACKAGES if name in found]
    return (
        f"{' and '.join(rivals)} are both installed and overwrite each other: {REINSTALL}"
        if len(rivals) > 1
        else None
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_flags() -> list[str]:
    """Those of FLAGS that the processor has; none where the system does not tell."""
    had = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in FLAGS if flag in had]


def _cpuinfo(key: str) -> str | None:
    """What /proc/cpuinfo says of the first core, where there is one; it tells more than
    `platform`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
