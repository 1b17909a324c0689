"""Top-1 of every method at several schemes, over several calibration seeds, in torch.

    python examples/compare_methods.py MODEL --data IMAGES -o methods.json --scheme W4A4:per-token --scheme W4A8 --seeds 3

Each finished run is kept in the JSON file, and a run that is there already is not done again. Prints the table as Markdown: the mean top-1
over the seeds and, behind ±, half the spread between the best and the worst seed.
"""

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from marrq.data import find_images
from marrq.evaluate import predict
from marrq.methods import METHODS
from marrq.methods.problem import MethodSpec
from marrq.models import load_model
from marrq.pipeline import CalibrationSet, quantize
from marrq.schemes import parse_scheme
from runtime.accuracy import measure_accuracy

CPU = torch.device("cpu")


def main(
    model: str,
    data: Annotated[str, typer.Option()],
    output: Annotated[Path, typer.Option("-o", "--output")],
    scheme: Annotated[list[str], typer.Option(help="W4A8 or W4A4:per-token; may be repeated.")],
    seeds: int = 3,
    samples: int = 256,
) -> None:
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    original = load_model(model)
    held_out = find_images(data, "val", original.labels)
    targets = np.array(held_out.targets)
    reference = predict(original.module, held_out, original.preprocessing, CPU).numpy()
    results["float"] = {"top1": measure_accuracy(reference, targets).top1, "images": len(held_out)}
    for numbers, method, seed in itertools.product(scheme, METHODS, range(seeds)):
        key = f"{numbers} {method} {seed}"
        if key in results:
            continue
        images = find_images(data, "train", original.labels).draw(samples, seed)
        start = time.perf_counter()
        quantized = quantize(
            load_model(model),
            images.pixels(original.preprocessing),
            CalibrationSet(data, samples, seed, images.sha256),
            parse_scheme(*numbers.split(":")),
            MethodSpec(method),
            CPU,
        )
        seconds = time.perf_counter() - start
        accuracy = measure_accuracy(predict(quantized.module, held_out, original.preprocessing, CPU).numpy(), targets, reference)
        alphas = [report.alpha for report in quantized.reports]
        results[key] = {"top1": accuracy.top1, "agreement": accuracy.agreement, "seconds": seconds, "alphas": alphas}
        output.write_text(json.dumps(results, indent=1) + "\n")
        typer.echo(f"{key}: top-1 {100 * accuracy.top1:.2f} %, {seconds:.0f} s", err=True)
    typer.echo(table(results, scheme, seeds))


def table(results: dict[str, Any], schemes: list[str], seeds: int) -> str:
    """A row a method, a column a scheme."""
    rows = [["top-1 %", *schemes], ["---"] * (len(schemes) + 1)]
    for method in METHODS:
        cells = [[100 * results[f"{numbers} {method} {seed}"]["top1"] for seed in range(seeds)] for numbers in schemes]
        rows.append([method, *(f"{statistics.mean(cell):.1f} ± {(max(cell) - min(cell)) / 2:.1f}" for cell in cells)])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{lines}\n\nfloat {100 * results['float']['top1']:.1f} %, {results['float']['images']} images, {seeds} seeds"


if __name__ == "__main__":
    typer.run(main)
