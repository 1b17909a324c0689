"""The machine a measurement was taken on."""

import os
import platform
from pathlib import Path
from typing import Any

from runtime.session import ONNXRUNTIME_VERSION, SessionSettings


def describe_machine() -> dict[str, Any]:
    """Processor, cores and system, as JSON."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }


def describe(settings: SessionSettings) -> dict[str, Any]:
    """The machine, the version of ONNX Runtime and the session settings, as JSON."""
    return {
        **describe_machine(),
        "onnxruntime": ONNXRUNTIME_VERSION,
        "provider": settings.provider,
        "threads": settings.threads,
        "graph_optimization": "all",
    }


def _processor() -> str:
    """The processor's name; /proc tells more than `platform` on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
