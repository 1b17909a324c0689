"""Time and memory of quantization, as JSON.

    python examples/benchmark_quantize.py sweep
    python examples/benchmark_quantize.py methods MODEL --data IMAGES
    python examples/benchmark_quantize.py memory --samples 1024 [--device cuda]

sweep      the column sweep against its matrix products alone, 1536 × 1536
methods    each method's time against gptq's, in interleaved rounds
memory     peak memory of the host and time, for a DeiT-B with random weights and noise as images

Threads are torch's: set OMP_NUM_THREADS to choose their number.
"""

import json
import statistics
import time
from typing import Annotated

import timm
import torch
import typer

from marrq.methods.factor import factorize
from marrq.methods.gptq import BLOCK_SIZE, sweep
from marrq.methods.spec import parse_method
from marrq.models.images import find_images
from marrq.models.load import ModelSource, VisionModel, load_model
from marrq.models.preprocessing import Preprocessing
from marrq.pipeline.quantize import Images, RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.quantizers.affine import search_weight_grid
from marrq.schemes import WeightSpec, parse_scheme
from marrq.workflows.devices import peak_memory

METHODS = ["marr-gptaq", "marr-rescomp", "marr-exact", "marr-stream"]
IMAGE_SIZE, TOKENS = 224, 197
FLOAT_BYTES = 4

app = typer.Typer(add_completion=False)


@app.command(name="sweep")
def time_sweep(size: int = 1536, rounds: int = 5) -> None:
    """The sweep without a residual, and the products in it: the rank-1 updates inside a block of
    columns and the product behind it."""
    inputs = torch.randn(2 * size, size)
    factor = factorize((inputs.T @ inputs).double(), 0.01, act_order=True)
    weight, upper = torch.randn(size, size), factor.upper.float()
    grid = search_weight_grid(weight, WeightSpec(4))

    def products() -> None:
        w, term = weight.clone(), torch.zeros(BLOCK_SIZE, size)
        for start in range(0, size, BLOCK_SIZE):
            end = start + BLOCK_SIZE
            for j in range(start, end):
                w[j + 1 : end].addmm_(upper[j : j + 1, j + 1 : end].T, term[:1])
            w[end:].addmm_(upper[start:end, end:].T, term)

    seconds: dict[str, list[float]] = {"sweep": [], "products": []}
    # The first round warms up and is left out.
    for _ in range(rounds + 1):
        for name, run in (("sweep", lambda: sweep(weight, grid, factor)), ("products", products)):
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    measured = {name: times[1:] for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(measured["sweep"], measured["products"], strict=True)]
    show(
        {
            "size": size,
            "threads": torch.get_num_threads(),
            "seconds": {name: statistics.median(times) for name, times in measured.items()},
            "ratio": statistics.median(ratios),
        }
    )


@app.command(name="methods")
def time_methods(
    model: str,
    data: Annotated[str, typer.Option()],
    method: Annotated[list[str], typer.Option()] = METHODS,
    scheme: str = "W4A8",
    samples: int = 256,
    rounds: int = 1,
) -> None:
    """Seconds of the whole quantization by each method, and the median over rounds of the ratio to
    gptq in the same round."""
    original = load_model(model)
    drawn = find_images(data, "train", original.labels).draw(samples, 0)
    # All images are read before the clock starts.
    pixels = drawn.pixels(original.preprocessing)[:]
    seconds: dict[str, list[float]] = {name: [] for name in ("gptq", *method)}
    for _ in range(rounds):
        for name, times in seconds.items():
            times.append(seconds_to_quantize(load_model(model), pixels, scheme, name, "cpu"))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times, seconds["gptq"], strict=True))
        for name, times in seconds.items()
    }
    show(
        {
            "threads": torch.get_num_threads(),
            "scheme": scheme,
            "samples": samples,
            "seconds": seconds,
            "ratio": ratios,
        }
    )


@app.command(name="memory")
def measure_memory(
    model: str = "deit_base_patch16_224",
    samples: int = 1024,
    depth: int = 12,
    method: str = "marr",
    device: str = "cpu",
) -> None:
    """Peak resident memory over the whole run. With fewer blocks it takes less time and, weights
    apart, as much memory."""
    module = timm.create_model(model, num_classes=10, depth=depth).eval()
    size, half = (3, IMAGE_SIZE, IMAGE_SIZE), (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(size, "bicubic", size[1:], "center", half, half)
    source = ModelSource(model, "timm", {}, "")
    loaded = VisionModel(module, source, preprocessing, tuple("0123456789"))
    with peak_memory() as peak:
        seconds = seconds_to_quantize(loaded, Noise(samples), "W4A8", method, device)
    tokens_bytes = samples * TOKENS * module.embed_dim * FLOAT_BYTES
    show(
        {
            "model": model,
            "depth": depth,
            "samples": samples,
            "method": method,
            "peak_mb": peak(),
            "stream_mb": tokens_bytes / 1e6,
            "seconds": seconds,
        }
    )


def seconds_to_quantize(
    model: VisionModel, images: Images, scheme: str, method: str, device: str
) -> float:
    """Quantize the model in place."""
    calibration = CalibrationRecord("benchmark", len(images), 0, "")
    settings = QuantizationSettings(parse_scheme(scheme), parse_method(method), calibration)
    begin = time.perf_counter()
    quantize(model, images, settings, RunOptions(torch.device(device)))
    return time.perf_counter() - begin


class Noise:
    """Images that are made when they are asked for, as images of a folder are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.count)
        generator = torch.Generator().manual_seed(start)
        return torch.randn(stop - start, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def show(result: dict[str, object]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    app()
