"""Time and memory of quantization, as JSON.

    python examples/benchmark_quantize.py sweep                          the column sweep against its matrix products alone, 1536 × 1536
    python examples/benchmark_quantize.py methods MODEL --data IMAGES    each method's time against gptq's, in interleaved rounds
    python examples/benchmark_quantize.py memory --samples 1024          peak memory: a DeiT-B of random weights, noise as images; and the
                                                                         time, with --device cuda of a GPU (the memory is the host's)

Threads are torch's: set OMP_NUM_THREADS to choose.
"""

import json
import statistics
import time
from typing import Annotated

import torch
import typer

from marrq.workflows.devices import peak_memory
from marrq.methods.factor import factorize
from marrq.methods.gptq import BLOCK_SIZE, sweep
from marrq.methods.spec import parse_method
from marrq.models.images import find_images
from marrq.models.load import load_model
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.quantizers.affine import search_weight_grid
from marrq.schemes import WeightSpec, parse_scheme

CPU = torch.device("cpu")
app = typer.Typer(add_completion=False)


@app.command(name="sweep")
def sweep_time(size: int = 1536, rounds: int = 5) -> None:
    """The sweep with no residual, and the products in it: the rank-1 updates within a block and the
    one behind it."""
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
    for _ in range(rounds + 1):
        for name, run in (("sweep", lambda: sweep(weight, grid, factor)), ("products", products)):
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [
        one / other
        for one, other in zip(seconds["sweep"][1:], seconds["products"][1:], strict=True)
    ]
    show(
        {
            "size": size,
            "threads": torch.get_num_threads(),
            "seconds": medians,
            "ratio": statistics.median(ratios),
        }
    )


@app.command()
def methods(
    model: str,
    data: Annotated[str, typer.Option()],
    method: Annotated[list[str], typer.Option()] = [
        "marr-gptaq",
        "marr-rescomp",
        "marr-exact",
        "marr-stream",
    ],
    scheme: str = "W4A8",
    samples: int = 256,
    rounds: int = 1,
) -> None:
    """Seconds of the whole quantization by each method, and the median over rounds of the ratio to
    gptq in the same round."""
    original = load_model(model)
    images = (
        find_images(data, "train", original.labels)
        .draw(samples, 0)
        .pixels(original.preprocessing)[:]
    )
    seconds: dict[str, list[float]] = {name: [] for name in ("gptq", *method)}
    for _ in range(rounds):
        for name in seconds:
            loaded = load_model(model)
            begin = time.perf_counter()
            quantize(
                loaded,
                images,
                QuantizationSettings(
                    parse_scheme(scheme),
                    parse_method(name),
                    CalibrationRecord(data, samples, 0, ""),
                ),
                RunOptions(CPU),
            )
            seconds[name].append(time.perf_counter() - begin)
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


@app.command()
def memory(
    model: str = "deit_base_patch16_224",
    samples: int = 1024,
    depth: int = 12,
    method: str = "marr",
    device: str = "cpu",
) -> None:
    """Peak resident memory over the whole run. Fewer blocks take less time and, but for their
    weights, as much."""
    import timm

    from marrq.models.load import ModelSource, VisionModel
    from marrq.models.preprocessing import Preprocessing

    module = timm.create_model(model, num_classes=10, depth=depth).eval()
    preprocessing = Preprocessing(
        (3, 224, 224), "bicubic", 0.9, "center", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )
    loaded = VisionModel(
        module, ModelSource(model, "timm", {}, ""), preprocessing, tuple("0123456789")
    )
    images = _Noise(samples)
    begin = time.perf_counter()
    with peak_memory() as peak:
        quantize(
            loaded,
            images,
            QuantizationSettings(
                parse_scheme("W4A8"),
                parse_method(method),
                CalibrationRecord("noise", samples, 0, ""),
            ),
            RunOptions(torch.device(device)),
        )
    tokens = samples * 197 * module.embed_dim * 4
    sizes = {"peak_mb": peak(), "stream_mb": tokens / 1e6}
    show(
        {
            "model": model,
            "depth": depth,
            "samples": samples,
            "method": method,
            **sizes,
            "seconds": time.perf_counter() - begin,
        }
    )


class _Noise:
    """Images that are made when they are asked for, as those of a folder are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.count)
        return torch.randn(
            stop - start, 3, 224, 224, generator=torch.Generator().manual_seed(start)
        )


def show(result: dict[str, object]) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    app()
