"""Memory that a model takes when it runs.

    peak memory = peak of a process that opens the file and runs it
                - peak of a process that imports ONNX Runtime alone

Both are fresh processes, as a server's would be: in a process that has run other models, what they
left behind would count too. The peak is the largest resident memory (VmHWM of Linux): with the
pages of the file that are mapped, and with the arena that ONNX Runtime keeps. `ru_maxrss` will not
do: a child inherits it from its parent.

    peak memory of the GPU = memory in use while the session is open and has run
                           - memory in use before the session was opened

The arena never shrinks, so what is in use after the runs is the peak. CUDA's own context is part of
it, a few hundred MB. The driver counts all processes together, so another one that starts or ends
meanwhile falsifies the number.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.errors import BenchError
from runtime.gpu import memory_used_mb
from runtime.records import Json
from runtime.session import DEVICES, Model, SessionSettings

# The arena grows in the first run, and again in the second, when ONNX Runtime has seen which sizes
# are needed.
RUNS = 3


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory in MB (10⁶ bytes), of the host and of the GPU; None if the system, or the GPU's
    driver, does not tell, and of the GPU on the CPU provider."""

    host: float | None
    gpu: float | None


def resident_peak_mb() -> float | None:
    """The largest resident memory of this process so far, in MB (10⁶ bytes); None if the system
    does not tell."""
    # Linux alone has the file.
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 / 1e6 if match else None


def measure_peak_memory(
    paths: list[Path], batch: int, settings: SessionSettings
) -> list[PeakMemory]:
    """Peak memory of each model at a batch size. Raises BenchError if a process that measures
    fails."""
    # What Python, NumPy and ONNX Runtime take without any model.
    alone = _peak_of_process({"path": None, "batch": batch, "settings": asdict(settings)}).host
    peaks = [
        _peak_of_process(
            {"path": str(path.resolve()), "batch": batch, "settings": asdict(settings)}
        )
        for path in paths
    ]
    return [
        PeakMemory(
            None if peak.host is None or alone is None else peak.host - alone,
            peak.gpu,
        )
        for peak in peaks
    ]


def _peak_of_process(task: dict[str, object]) -> PeakMemory:
    """The peaks of a fresh process that does a task."""
    # It starts in the folder of this package: another package `runtime` might be found elsewhere.
    command = [sys.executable, "-m", "runtime.measure.memory", json.dumps(task)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        # The last line of a traceback has the error itself.
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(
            f"the process that measures memory of {task['path']!r} ended with {done.returncode}: "
            f"{reason}"
        )
    return PeakMemory(**json.loads(done.stdout))


def _main(task: str) -> None:
    """In the fresh process: do the task, and print the peaks as JSON."""
    given = json.loads(task)
    # No path: what importing ONNX Runtime takes, which is subtracted from the others.
    taken = None if given["path"] is None else _run(given)
    print(json.dumps(asdict(PeakMemory(resident_peak_mb(), taken))))


def _run(task: Json) -> float | None:
    """Open the file and run it. What that takes of the GPU's memory."""
    settings = SessionSettings(**task["settings"])
    on_gpu = settings.provider in DEVICES
    before = memory_used_mb() if on_gpu else None
    model = Model(Path(task["path"]), settings)
    # The values do not matter, the shape does.
    pixels = model.random_input(task["batch"])
    for _ in range(RUNS):
        model.run(pixels)
    # Asked while the session is open.
    after = memory_used_mb() if on_gpu else None
    return None if before is None or after is None else after - before


if __name__ == "__main__":
    _main(sys.argv[1])
