"""How long `marrq quantize` takes for a ViT on N GPUs, on paper: counts of operations and bytes,
and rates that the reader can change.

    python examples/scaling_model.py [--model ViT-L] [--images 512] [--here | --before]

Let a block have width d and hidden width h = 4 d, a process T tokens in B batches of 16 images, an
image t tokens. Then a block takes, with the default method (marr):

    forward        24 d² T + 4 t d T
    passes         4 forwards
    statistics     56 d² T
    factors        536 d³ in float64
    rows           1104 d³ in float32, 624 d³ in float64
    column loop    13 sweeps of 7 d columns, one after the other
    launches       4000 + 500 B small operations
    copies         66 d T bytes between host and GPU
    communication  448 d² bytes, summed over all processes

passes         statistics on both paths; what is finished of a block runs once and is kept
statistics     H, D, S of qkv and fc1; H and G of proj and fc2, which write to the residual stream
factors        six factorizations for each group of linears, in every process
rows           sweeps for grids, α and codes, and their losses; the processes share the rows
column loop    in every process, by the kernel on a GPU, in torch on a CPU
launches       from Python, in every process; tests/marrq/test_devices.py bounds them
copies         tokens that enter the block, each time they are read; most of it while the GPU works
communication  the statistics of both halves of the images

The rates of the GPU are an H100's. Measured are columns (a sweep of 4096 × 1024 in 1.6 ms, of
1024 × 4096 in 5.4 ms) and factors (of 1024 inputs in 1.4 ms, of 4096 in 7.8 ms); the others are
assumed. Loading a model and compiling the kernel take some 12 seconds more.

Check: before searches were stacked and outputs kept, a block of ViT-L took 2.9 seconds there, with
512 images; the whole command took about 75. `--before` counts what was done then: 7.5 forwards,
4,200 candidates of searches at 20 launches each, and 8 d T bytes that were pinned batch by batch,
in 0.77 seconds a block. It gives 2.5 seconds a block. The figures without `--before` are
predictions; no GPU has confirmed them.

`--here` takes the rates of products and of a small operation from this machine, so that the model
can be compared with a run on it. The model leaves out all that is no product: norms, softmax, GELU,
rounding.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

MODELS = {"DINOv2-S, 112 px": (384, 12, 65), "ViT-L": (1024, 24, 197), "ViT-g": (1408, 40, 257)}
"""Width, blocks, tokens of an image."""


@dataclass(frozen=True)
class Rates:
    """What a machine can do.

    float32, float64: operations per second of products. factors: of factorizations in float64.
    small: seconds of an operation on few numbers. column: seconds of a column of a sweep.
    copies: bytes per second between host and device. network: bytes per second between processes.
    """

    float32: float
    float64: float
    factors: float
    small: float
    column: float
    copies: float
    network: float


GPU = Rates(40e12, 30e12, factors=8e12, small=6e-6, column=1.5e-6, copies=25e9, network=40e9)
"""An H100, with operations launched from Python, float32 without tensor cores and 400 Gbit/s
between machines."""
PINNING = 1.1e9
"""Bytes per second that were copied from the GPU and pinned, batch by batch; measured."""


@dataclass(frozen=True)
class Work:
    """What a block takes. passes: forwards; launches: of searches and solves; pinned: bytes for
    each channel of a token that are pinned anew."""

    passes: float = 4
    launches: float = 4000
    pinned: float = 0


BEFORE = Work(passes=7.5, launches=88000, pinned=8)
BATCH = 16
"""Images of a batch."""
BATCH_LAUNCHES = 500


def seconds(
    model: tuple[int, int, int], images: int, processes: int, rates: Rates, work: Work
) -> dict[str, float]:
    """Seconds of each part, for the whole model. model: width, blocks, tokens of an image."""
    width, blocks, tokens = model
    share, square, cube = tokens * images / processes, width**2, width**3
    forward = (24 * square + 4 * tokens * width) * share
    launches = work.launches + BATCH_LAUNCHES * images / processes / BATCH
    parts = {
        "passes": work.passes * forward / rates.float32,
        "statistics": 56 * square * share / rates.float32,
        "factors": 536 * cube / rates.factors,
        "rows": (1104 * cube / rates.float32 + 624 * cube / rates.float64) / processes,
        "column loop": 13 * 7 * width * rates.column,
        "launches": launches * rates.small,
        "copies": width * share * (66 / rates.copies + work.pinned / PINNING),
        "communication": 2 * (processes - 1) / processes * 448 * square / rates.network,
    }
    parts = {name: blocks * value for name, value in parts.items()}
    return {**parts, "all": sum(parts.values())}


def rates_here() -> Rates:
    """The rates of this machine's CPU, by timing; the network's is assumed."""
    found = []
    for kind in (torch.float32, torch.float64):
        a = torch.randn(1024, 1024, dtype=kind)
        # A product of two n × n matrices takes 2 n³ operations.
        found.append(2 * 1024**3 / best_of(5, lambda a=a: a @ a))
    row = torch.randn(384)
    small = best_of(2000, lambda: torch.mul(row, row))
    # On a CPU a column of the loop is eight operations, and no token is copied.
    return Rates(*found, found[1], small, 8 * small, float("inf"), GPU.network)


def best_of(count: int, run: Callable[[], object]) -> float:
    """The least seconds of so many runs."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=MODELS, action="append", help="may be repeated; all if left out"
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument(
        "--processes", type=int, action="append", help="may be repeated; 1, 8 and 64 if left out"
    )
    parser.add_argument(
        "--here", action="store_true", help="rates of this machine in place of a GPU's"
    )
    parser.add_argument(
        "--before", action="store_true", help="the work of a block before searches were stacked"
    )
    arguments = parser.parse_args()
    work = BEFORE if arguments.before else Work()
    rates = rates_here() if arguments.here else GPU
    rows = [
        {
            "model": name,
            "processes": count,
            **seconds(MODELS[name], arguments.images, count, rates, work),
        }
        for name in arguments.model or MODELS
        for count in arguments.processes or (1, 8, 64)
    ]
    print(
        json.dumps(
            {
                "images": arguments.images,
                "rates": asdict(rates),
                "work": asdict(work),
                "seconds": rows,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
