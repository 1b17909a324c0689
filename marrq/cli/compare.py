"""`marrq compare`: methods × schemes × seeds on one model, as a table, JSON (schema
marrq.compare/2) and a plot."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from marrq.workflows.compare_on_ray import runs_on_ray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from marrq.methods.spec import MethodSpec
    from marrq.models.load import VisionModel
    from marrq.pipeline.quantize import FullPrecisionInputs
    from marrq.quantized_model import QuantizedModel
    from marrq.schemes import ActivationStrategy, Scheme


def compare(
    model: ModelArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="JSON file; runs that it holds already are not done again."
        ),
    ],
    data: DataOption = None,
    scheme: Annotated[
        list[str],
        typer.Option(help="As for quantize, :per-token for dynamic activations; may be repeated."),
    ] = ["W4A8"],
    method: Annotated[
        list[str],
        typer.Option(
            help="NAME[,KEY=VALUE…], e.g. marr-gptaq,alpha=grid; may be repeated; all if left out."
        ),
    ] = [],
    seeds: Annotated[int, typer.Option(help="Draws of the calibration images.", min=1)] = 3,
    samples: SamplesOption = 256,
    device: DeviceOption = "auto",
    plot: PlotOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Do the runs on Ray, one to a CPU or GPU: local, or the address of a cluster that has marrq, model and images."
        ),
    ] = None,
) -> None:
    """Compare methods over calibration seeds: marrq compare demo --scheme W4A4:per-token --method
    gptq --method marr -o compare.json"""
    from marrq.methods.spec import METHODS, parse_method, text_of
    from marrq.schemes import parse_scheme
    from runtime.report.comparison import markdown, table

    methods = [parse_method(text) for text in method or METHODS]
    parted = [text.partition(":") for text in scheme]
    numbers = [
        parse_scheme(name, cast("ActivationStrategy", strategy or "per-tensor"))
        for name, _, strategy in parted
    ]
    if plot is not None:
        from runtime.report.plots import check_plot, plot_comparison

        check_plot(plot)
    # A cluster may have GPUs where this process has none.
    kind = device if ray is not None and device in ("cpu", "cuda") else choose_device(device).type
    task = Task(model, data_for(model, data), samples, kind)
    runner = Runner(task)
    comparison = _Comparison(
        runner, output, list(itertools.product(range(seeds), numbers, methods))
    )
    missing, count = comparison.missing(), len(comparison.combinations)
    with progress_bars(runs=count) as [bar]:

        def told() -> Iterator[Combination]:
            for done, (seed, quantized_to, spec) in enumerate(missing, count - len(missing)):
                bar.show(done, count, f"{quantized_to.description} {text_of(spec)}, seed {seed}")
                yield seed, quantized_to, spec

        bar.advance(count - len(missing))
        for run in map(runner.run, told()) if ray is None else runs_on_ray(ray, task, missing):
            comparison.add(run)
            bar.advance()
        bar.show(count, count, "")
    report = comparison.selected(
        {(one.description, text_of(spec)) for one in numbers for spec in methods}, seeds
    )
    stdout.print(table(report))
    stdout.print(markdown(report), highlight=False, soft_wrap=True, markup=False)
    if plot is not None:
        plot_comparison(report, plot)


Combination = tuple[int, "Scheme", "MethodSpec"]
"""Seed, scheme and method of a run."""


@dataclass(frozen=True)
class Task:
    """What all runs have in common. device: cpu or cuda."""

    model: str
    data: str
    samples: int
    device: str


class Runner:
    """Does runs one after the other, in this process. They share model, images, float logits, and
    the full-precision tokens of a seed, rotation and kind of edges."""

    def __init__(self, task: Task) -> None:
        import torch

        from marrq.models.images import find_images
        from marrq.models.load import load_model

        self.task, self.device = task, torch.device(task.device)
        self.original = load_model(task.model)
        self.train = find_images(task.data, "train", self.original.labels)
        self.held_out = find_images(task.data, "val", self.original.labels)
        self.tokens: dict[tuple[int, int | None, bool, bool], FullPrecisionInputs] = {}

    def run(self, combination: Combination) -> dict[str, Any]:
        """Quantize and measure: what the report has of a run, and as `float` the accuracy of the
        model in full precision."""
        seed, scheme, spec = combination
        reference = self.reference
        start = time.perf_counter()
        with peak_memory() as peak:
            model = self._quantized(scheme, spec, seed)
        seconds = time.perf_counter() - start
        measured = {
            **_key(combination),
            **self._measured(model, reference),
            "seconds": seconds,
            "peak_memory_mb": peak(),
        }
        return {**measured, "float": self.accuracy}

    @cached_property
    def targets(self) -> "NDArray[np.int64]":
        """Classes of the held-out images."""
        import numpy as np

        return np.array(self.held_out.targets)

    @cached_property
    def reference(self) -> "NDArray[np.float32]":
        """Logits of the float model."""
        return self._logits(self.original)

    @cached_property
    def accuracy(self) -> dict[str, Any]:
        """Of the float model, as the report has it."""
        from runtime.measure.accuracy import measure_accuracy

        accuracy = measure_accuracy(self.reference, self.targets)
        return {"top1": accuracy.top1, "images": accuracy.images}

    def _quantized(self, scheme: "Scheme", spec: "MethodSpec", seed: int) -> "QuantizedModel":
        from marrq.models.load import load_model
        from marrq.pipeline.quantize import FullPrecisionInputs, RunOptions, quantize
        from marrq.quantized_model import CalibrationRecord, QuantizationSettings

        images = self.train.draw(self.task.samples, seed)
        drawn = (seed, spec.rotation, scheme.edges, spec.balances(scheme))
        if drawn not in self.tokens:
            self.tokens = {
                drawn: FullPrecisionInputs()
            }  # those of another seed are not needed again
        calibration = CalibrationRecord(images.name, self.task.samples, seed, images.sha256)
        pixels = images.pixels(self.original.preprocessing)
        return quantize(
            load_model(self.task.model),
            pixels,
            QuantizationSettings(scheme, spec, calibration),
            RunOptions(self.device, shared=self.tokens[drawn]),
        )

    def _measured(
        self, model: "QuantizedModel", reference: "NDArray[np.float32]"
    ) -> dict[str, Any]:
        from marrq.quantizers.linear import bits_per_weight
        from runtime.measure.accuracy import measure_accuracy

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
        from marrq.workflows.evaluate import predict

        logits: NDArray[np.float32] = predict(
            model.module, self.held_out, self.original.preprocessing, self.device
        ).numpy()
        return logits


def _key(combination: Combination) -> dict[str, Any]:
    """What tells a run from the others of a report."""
    from marrq.methods.spec import text_of

    seed, scheme, spec = combination
    return {"scheme": scheme.description, "method": text_of(spec), "seed": seed}


class _Comparison:
    """The report in its file, and which runs it is to have."""

    def __init__(self, runner: Runner, file: Path, combinations: list[Combination]) -> None:
        from runtime.environment import describe_machine
        from runtime.report.comparison import SCHEMA

        self.file, self.combinations = file, combinations
        self.added: list[dict[str, Any]] = []
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "model": runner.task.model,
            "weights": runner.original.source.weights_sha256,
            "data": runner.held_out.description(),
            "samples": runner.task.samples,
        }
        self.report = {
            **about,
            "environment": {**describe_machine(), "torch": version("torch")},
            "runs": [],
        }
        if file.exists():
            self.report = _resumed(file, about)

    def missing(self) -> list[Combination]:
        """What the file does not hold yet."""
        return [
            one
            for one in self.combinations
            if not any(_key(one).items() <= run.items() for run in self.report["runs"])
        ]

    def add(self, run: dict[str, Any]) -> None:
        """Take a run into the file, behind those that it had; new ones stand in the order of the
        combinations, whichever was done first."""
        self.report["float"] = run.pop("float")
        self.added.append(run)
        self.added.sort(
            key=lambda run: next(
                place
                for place, one in enumerate(self.combinations)
                if _key(one).items() <= run.items()
            )
        )
        write_json(self.file, {**self.report, "runs": self.report["runs"] + self.added})

    def selected(self, wanted: set[tuple[str, str]], seeds: int) -> dict[str, Any]:
        """The report with the runs that were asked for, whatever else the file holds."""
        runs = [
            run
            for run in self.report["runs"] + self.added
            if (run["scheme"], run["method"]) in wanted and run["seed"] < seeds
        ]
        return {**self.report, "runs": runs}


def _resumed(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The report in a file, if it is of the same model, images and samples."""
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        differing = [key for key, value in about.items() if report[key] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise MarrqError(
            f"{str(file)!r} is no comparison: choose another file to write to"
        ) from error
    if differing:
        raise MarrqError(
            f"{str(file)!r} compares with another {differing[0]}: choose another file to write to"
        )
    return report
