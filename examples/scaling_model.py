"""How long `marrq quantize` takes for a ViT on N GPUs, on paper: counts of operations and bytes,
and rates that the reader can change.

    python examples/scaling_model.py [--model ViT-L] [--images 512] [--here]

Let a block have width d and hidden width h = 4 d, a process T tokens, an image t tokens. Then a
block takes, with the default method (marr):

    forward        24 d² T + 4 t d T
    passes         7.5 forwards
    statistics     56 d² T
    factors        536 d³ in float64
    rows           1104 d³ in float32, 624 d³ in float64
    column loop    168 d operations one after the other
    communication  448 d² bytes, summed over all processes

passes         ranges, sampling, statistics on both paths, and the tokens that leave the block
statistics     H, D, S of qkv and fc1; H and G of proj and fc2, which write to the residual stream
factors        six factorizations for each group of linears, in every process
rows           sweeps for grids, α and codes, and their losses; the processes share the rows
column loop    7 d columns, 12 sweeps of two operations each, in every process
communication  the statistics of both halves of the images

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

    float32, float64: operations per second. small: seconds of an operation on few numbers.
    network: bytes per second between processes.
    """

    float32: float
    float64: float
    small: float
    network: float


GPU = Rates(float32=40e12, float64=30e12, small=6e-6, network=40e9)
"""What an H100 may be expected to do, with operations launched from Python, float32 without tensor
cores and 400 Gbit/s between machines. Not measured."""


def seconds(
    width: int, blocks: int, tokens: int, images: int, processes: int, rates: Rates
) -> dict[str, float]:
    """Seconds of each part, for the whole model. tokens: of an image."""
    share, square, cube = tokens * images / processes, width**2, width**3
    forward = (24 * square + 4 * tokens * width) * share
    parts = {
        "passes": 7.5 * forward / rates.float32,
        "statistics": 56 * square * share / rates.float32,
        "factors": 536 * cube / rates.float64,
        "rows": (1104 * cube / rates.float32 + 624 * cube / rates.float64) / processes,
        "column loop": 168 * width * rates.small,
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
    return Rates(found[0], found[1], best_of(2000, lambda: torch.mul(row, row)), GPU.network)


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
    arguments = parser.parse_args()
    rates = rates_here() if arguments.here else GPU
    rows = [
        {
            "model": name,
            "processes": count,
            **seconds(*MODELS[name], arguments.images, count, rates),
        }
        for name in arguments.model or MODELS
        for count in arguments.processes or (1, 8, 64)
    ]
    print(
        json.dumps({"images": arguments.images, "rates": asdict(rates), "seconds": rows}, indent=2)
    )


if __name__ == "__main__":
    main()
