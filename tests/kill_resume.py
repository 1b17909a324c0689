"""Kill `marrq quantize` with SIGKILL at random moments, go on with --resume, and compare what comes
out, byte by byte.

    python tests/kill_resume.py --kills 100 --seed 0

Half of the kills come at any time, the others within milliseconds after a file or folder that is
being written was seen: a checkpoint, or the artifact. After each, the output must be absent or the
whole artifact. Prints JSON."""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch  # noqa: F401  # loaded before the forks, which then begin at once

from marrq.artifact.folder import load
from marrq.cli import main

COMMAND = ["quantize", "demo", "--samples", "64", "--resume", "-o"]


def begun(output: Path) -> int:
    """A process that does the command."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(main([*COMMAND, str(output)]))
    return child


def ended(child: int) -> int | None:
    """Its exit status, or None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def being_written(output: Path) -> set[str]:
    """Names under which something unfinished lies beside the output."""
    try:
        return {
            path.name
            for path in output.parent.rglob(".*")
            if path.name != f".{output.name}.checkpoint"
        }
    except FileNotFoundError:  # a folder was removed meanwhile
        return set()


def killed(child: int, output: Path, chance: random.Random, seconds: float) -> str | None:
    """Kill it at a random moment; what it was doing, or None where it was done before. seconds:
    what the whole takes."""
    limit, writing = time.monotonic() + chance.uniform(0, seconds), chance.random() < 0.5
    before = being_written(output)
    while time.monotonic() < limit or writing:
        status = ended(child)
        if status is not None:
            assert status == 0, status
            return None
        new = being_written(output) - before
        if writing and new and time.monotonic() > limit - seconds / 2:
            time.sleep(chance.uniform(0, 0.005))
            break
    doing = sorted(being_written(output) - before)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return doing[0].partition("-")[0] if doing else "computing"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def run(kills: int, seed: int, folder: Path) -> dict[str, object]:
    start = time.monotonic()
    assert os.waitpid(begun(folder / "whole" / "artifact"), 0)[1] == 0
    seconds, expected = time.monotonic() - start, contents(folder / "whole" / "artifact")
    chance, output = random.Random(seed), folder / "killed" / "artifact"
    output.parent.mkdir()
    moments: Counter[str] = Counter()
    completed = 0
    while moments.total() < kills:
        doing = killed(begun(output), output, chance, seconds)
        moments.update([] if doing is None else [doing])
        if output.exists():
            load(output)
            assert contents(output) == expected, "another artifact"
        if doing is None:
            completed += 1
            assert [path.name for path in output.parent.iterdir()] == ["artifact"], (
                "something was left behind"
            )
            for file in output.iterdir():
                file.unlink()
            output.rmdir()
    return {
        "kills": kills,
        "moments": moments,
        "completed": completed,
        "seconds_whole": seconds,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(run(arguments.kills, arguments.seed, Path(temporary)), indent=2))
