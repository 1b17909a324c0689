"""`marrq compare`: methods × schemes × seeds on one model, as a table, JSON (schema marrq.compare/2) and a plot."""

import itertools
import json
import time
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from marrq.cli.common import (
    DataOption,
    DeviceOption,
    ModelArgument,
    PlotOption,
    SamplesOption,
    choose_device,
    data_for,
    peak_memory,
    progress_bars,
    stdout,
    write_json,
)
from marrq.errors import MarrqError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from marrq.methods.problem import MethodSpec
    from marrq.models import VisionModel
    from marrq.pipeline import FullPrecisionTokens, QuantizedModel
    from marrq.schemes import ActivationStrategy, Scheme


def compare(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file; runs that it holds already are not done again.")],
    data: DataOption = None,
    scheme: Annotated[
        list[str], typer.Option(help="As for quantize, :per-token or :per-tensor-dynamic for dynamic activations; may be repeated.")
    ] = ["W4A8"],  # noqa: B006
    method: Annotated[
        list[str], typer.Option(help="NAME[,KEY=VALUE…], e.g. marr-gptaq,alpha=grid; may be repeated; all if left out.")
    ] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Draws of the calibration images.", min=1)] = 3,
    samples: SamplesOption = 256,
    device: DeviceOption = "auto",
    plot: PlotOption = None,
) -> None:
    """Compare methods over calibration seeds: marrq compare demo --scheme W4A4:per-token --method gptq --method marr -o compare.json"""
    from marrq.methods import METHODS
    from marrq.methods.settings import parse_method, text_of
    from marrq.schemes import parse_scheme
    from runtime.comparison import markdown, table

    methods = [parse_method(text) for text in method or METHODS]
    parted = [text.partition(":") for text in scheme]
    numbers = [parse_scheme(name, cast("ActivationStrategy", strategy or "per-tensor")) for name, _, strategy in parted]
    if plot is not None:
        from runtime.plots import check_plot, plot_comparison

        check_plot(plot)
    comparison = _Comparison(model, data_for(model, data), samples, choose_device(device), output)
    combinations = list(itertools.product(range(seeds), numbers, methods))
    with progress_bars(runs=len(combinations)) as [bar]:
        for done, (seed, quantized_to, spec) in enumerate(combinations):
            bar.show(done, len(combinations), f"{quantized_to.description} {text_of(spec)}, seed {seed}")
            comparison.run(quantized_to, spec, seed)
        bar.show(len(combinations), len(combinations), "")
    report = comparison.selected({(one.description, text_of(spec)) for one in numbers for spec in methods}, seeds)
    stdout.print(table(report))
    stdout.print(markdown(report), highlight=False, soft_wrap=True, markup=False)
    if plot is not None:
        plot_comparison(report, plot)


class _Comparison:
    """The report in its file, and what the runs share: model, images, float logits, the full-precision tokens of a seed, rotation and
    kind of edges."""

    def __init__(self, model: str, data: str, samples: int, device: "torch.device", file: Path) -> None:
        from marrq.data import find_images
        from marrq.models import load_model
        from runtime.comparison import SCHEMA
        from runtime.environment import describe_machine

        self.name, self.samples, self.device, self.file = model, samples, device, file
        self.original = load_model(model)
        self.train = find_images(data, "train", self.original.labels)
        self.held_out = find_images(data, "val", self.original.labels)
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "model": model,
            "weights": self.original.source.weights_sha256,
            "data": self.held_out.description(),
            "samples": samples,
        }
        self.report = {**about, "environment": {**describe_machine(), "torch": version("torch")}, "runs": []}
        if file.exists():
            self.report = _resumed(file, about)
        self.tokens: dict[tuple[int, int | None, bool, bool], FullPrecisionTokens] = {}

    @cached_property
    def targets(self) -> "NDArray[np.int64]":
        import numpy as np

        return np.array(self.held_out.targets)

    @cached_property
    def reference(self) -> "NDArray[np.float32]":
        """Logits of the float model; needed by the first run that is not there yet."""
        from runtime.accuracy import measure_accuracy

        logits = self._logits(self.original)
        accuracy = measure_accuracy(logits, self.targets)
        self.report["float"] = {"top1": accuracy.top1, "images": accuracy.images}
        return logits

    def run(self, scheme: "Scheme", spec: "MethodSpec", seed: int) -> None:
        """Quantize and measure, unless the file has it already."""
        from marrq.methods.settings import text_of

        key = {"scheme": scheme.description, "method": text_of(spec), "seed": seed}
        if any(key.items() <= run.items() for run in self.report["runs"]):
            return
        reference = self.reference
        start = time.perf_counter()
        with peak_memory() as peak:
            model = self._quantized(scheme, spec, seed)
        seconds = time.perf_counter() - start
        self.report["runs"].append({**key, **self._measured(model, reference), "seconds": seconds, "peak_memory_mb": peak()})
        write_json(self.file, self.report)

    def _quantized(self, scheme: "Scheme", spec: "MethodSpec", seed: int) -> "QuantizedModel":
        from marrq.models import load_model
        from marrq.pipeline import CalibrationSet, FullPrecisionTokens, quantize

        images = self.train.draw(self.samples, seed)
        drawn = (seed, spec.rotation, scheme.edges, spec.balances(scheme))
        if drawn not in self.tokens:
            self.tokens = {drawn: FullPrecisionTokens()}  # those of another seed are not needed again
        calibration = CalibrationSet(images.name, self.samples, seed, images.sha256)
        pixels = images.pixels(self.original.preprocessing)
        return quantize(load_model(self.name), pixels, calibration, scheme, spec, self.device, shared=self.tokens[drawn])

    def _measured(self, model: "QuantizedModel", reference: "NDArray[np.float32]") -> dict[str, Any]:
        from marrq.modules import bits_per_weight
        from runtime.accuracy import measure_accuracy

        reports = model.reports
        return {
            **asdict(measure_accuracy(self._logits(model), self.targets, reference)),
            "error": sum(report.error for report in reports),
            "relative_error": sum(report.relative_error for report in reports) / len(reports),
            "bits_per_weight": bits_per_weight(model.module),
            "alphas": {report.path: report.alpha for report in reports},
            "fallbacks": {report.path: report.fallback for report in reports if report.fallback},
        }

    def _logits(self, model: "VisionModel | QuantizedModel") -> "NDArray[np.float32]":
        from marrq.evaluate import predict

        logits: NDArray[np.float32] = predict(model.module, self.held_out, self.original.preprocessing, self.device).numpy()
        return logits

    def selected(self, wanted: set[tuple[str, str]], seeds: int) -> dict[str, Any]:
        """The report with the runs that were asked for, whatever else the file holds."""
        runs = [run for run in self.report["runs"] if (run["scheme"], run["method"]) in wanted and run["seed"] < seeds]
        return {**self.report, "runs": runs}


def _resumed(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The report in a file, if it is of the same model, images and samples."""
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        differing = [key for key, value in about.items() if report[key] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise MarrqError(f"{str(file)!r} is no comparison: choose another file to write to") from error
    if differing:
        raise MarrqError(f"{str(file)!r} compares with another {differing[0]}: choose another file to write to")
    return report
