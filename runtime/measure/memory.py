"""Memory that a model takes when it runs.

    peak memory = peak of a process that opens the file and runs it
                - peak of a process that imports ONNX Runtime alone

Both are fresh processes, as a server's would be: in a process that has run other models, what they
left behind would count too. The peak is the largest resident memory (VmHWM of Linux): with the
pages of the file that are mapped, and with the arena that ONNX Runtime keeps. It is memory of the
host, under CUDA and TensorRT too. `ru_maxrss` will not do: a child inherits it from its parent.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from runtime.errors import BenchError
from runtime.session import Model, SessionSettings

# The arena grows in the first run, and again in the second, when ONNX Runtime has seen which sizes
# are needed.
RUNS = 3


def resident_peak_mb() -> float | None:
    """The largest resident memory of this process so far, in MB (10⁶ bytes); None if the system
    does not tell."""
    # Linux alone has the file.
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 / 1e6 if match else None


def measure_peak_memory(
    paths: list[Path], batch: int, settings: SessionSettings
) -> list[float | None]:
    """Peak memory of each model at a batch size, in MB; None if the system does not tell. Raises
    BenchError if a process that measures fails."""
    # What Python, NumPy and ONNX Runtime take without any model.
    alone = _peak_of_process({"path": None, "batch": batch, "settings": asdict(settings)})
    peaks = [
        _peak_of_process(
            {"path": str(path.resolve()), "batch": batch, "settings": asdict(settings)}
        )
        for path in paths
    ]
    return [None if peak is None or alone is None else peak - alone for peak in peaks]


def _peak_of_process(task: dict[str, object]) -> float | None:
    """The peak of a fresh process that does a task, in MB."""
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
    peak: float | None = json.loads(done.stdout)
    return peak


def _main(task: str) -> None:
    """In the fresh process: do the task, and print the peak as JSON."""
    given = json.loads(task)
    # No path: what importing ONNX Runtime takes, which is subtracted from the others.
    if given["path"] is not None:
        model = Model(Path(given["path"]), SessionSettings(**given["settings"]))
        # The values do not matter, the shape does.
        pixels = model.random_input(given["batch"])
        for _ in range(RUNS):
            model.run(pixels)
    print(json.dumps(resident_peak_mb()))


if __name__ == "__main__":
    _main(sys.argv[1])
