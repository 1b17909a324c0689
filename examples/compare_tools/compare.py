"""Compare marrq with ONNX Runtime's own quantizers, and with OpenVINO and NNCF: size, latency, and
distance to float32.

    pip install -r examples/compare_tools/requirements.txt
    python examples/compare_tools/compare.py deit_small_patch16_224 --json deit_small.json
    python examples/compare_tools/compare.py local-dir:MODEL --data IMAGES --json model.json

With --data the model has its own weights; calibration images come from train/, and logits are
compared on images of val/. Without it MODEL is a timm architecture with random weights, and the
images are noise: times and sizes are those of a trained model, but agreement is a sanity check and
says nothing about accuracy.

All files are measured in one run and in the same rounds. In a round each file is opened, timed at
every batch size and closed before the next: one session lives at a time, with the same number of
threads under either runtime. A ratio is the median over rounds of the ratio to fp32 inside the
round. A tool that fails, or is not installed, has a row that says why. The table and the JSON
(schema marrq.compare_tools/1) hold the same; tools.py has each tool's settings.
"""

import contextlib
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import timm
import torch
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from timm.data.config import resolve_model_data_config
from tools import REQUIREMENTS, TOOLS, Source

from exporters.opsets import OPSET
from exporters.trace import trace
from marrq.cli.common import JsonOption, ThreadsOption, say, stdout, write_report
from marrq.models.images import find_images
from marrq.models.load import ModelSource, VisionModel, load_model
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import CalibrationRecord
from runtime.environment import describe
from runtime.measure.latency import Latency, Plan, TimedModel, measure_latency
from runtime.session import Model, SessionSettings

SCHEMA = "marrq.compare_tools/1"
IMAGES_AT_ONCE = 8

Batches = list[NDArray[np.float32]]
"""Images [batch, channels, height, width]."""


@dataclass(frozen=True)
class Made:
    """A file that a tool made, and its logits [images, classes]."""

    file: Path
    logits: NDArray[np.float32]


def main(
    model: str,
    data: str | None = None,
    tool: Annotated[list[str], typer.Option(help="May be repeated; fp32 is always there.")] = list(
        TOOLS
    ),
    scheme: Annotated[str, typer.Option(help="Scheme of the tool integer.")] = "W4A8",
    method: Annotated[
        str, typer.Option(help="Method of the tool integer, as `marrq compare` takes it.")
    ] = "gptq",
    samples: Annotated[int, typer.Option(help="Calibration images.", min=2)] = 32,
    images: Annotated[int, typer.Option(help="Images on which logits are compared.", min=1)] = 200,
    batch: Annotated[list[int], typer.Option(min=1)] = [1, 8],
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    seconds: Annotated[
        float, typer.Option(help="Time on each file, batch size and round.", min=0.0)
    ] = 1.0,
    openvino_precision: Annotated[
        str, typer.Option(help="What OpenVINO computes in if not quantized: f32, bf16.")
    ] = "f32",
    json_file: JsonOption = None,
) -> None:
    names = tuple(dict.fromkeys(("fp32", *tool)))
    unknown = set(names) - set(TOOLS)
    if unknown:
        raise typer.BadParameter(f"unknown tool {min(unknown)!r}: choose one of {', '.join(TOOLS)}")
    settings = SessionSettings(threads=threads)

    def open_model(file: Path, settings: SessionSettings) -> TimedModel:
        if file.suffix != ".xml":
            return Model(file, settings)
        from openvino_model import OpenVINOModel

        return OpenVINOModel(file, settings, openvino_precision)

    with tempfile.TemporaryDirectory() as scratch:
        source, pixels = prepared(
            model, data, Path(scratch) / "trace.onnx", scheme, method, samples, images
        )
        results, failures = make(
            names, source, Path(scratch), pixels, lambda file: open_model(file, settings)
        )
        say("timing")
        files = [result.file for result in results.values()]
        speeds = measure_latency(
            files, settings, Plan(tuple(batch), rounds, seconds), open_model=open_model
        )
        latencies = [speed.latency for speed in speeds]
        rows = [
            {"name": name, **row(result, latency, results["fp32"], latencies[0])}
            for (name, result), latency in zip(results.items(), latencies, strict=True)
        ]
    conditions = {"rounds": rounds, "seconds": seconds, "openvino_precision": openvino_precision}
    report = {
        "schema": SCHEMA,
        "environment": {**describe(settings).to_json(), "packages": versions(), **conditions},
        "model": model,
        "weights": "random" if data is None else "as loaded",
        "data": {"path": data or "noise", "images": images, "samples": samples},
        "integer": {"scheme": scheme, "method": method},
        "rows": rows + [{"name": name, "failure": reason} for name, reason in failures.items()],
    }
    stdout.print(table(report))
    write_report(json_file, report)


def prepared(
    model: str, data: str | None, file: Path, scheme: str, method: str, samples: int, images: int
) -> tuple[Source, Batches]:
    """What the tools are given, and batches of the images to compare logits on.

    file: the float32 graph is written here, as torch's exporter gives it, with no operator that a
    tool may not know. samples: number of calibration images. images: number of images to compare
    on.
    """
    loaded = load_model(model) if data is not None else with_random_weights(model)
    say("tracing the float model")
    graph = trace(loaded.module, loaded.preprocessing.input_size, OPSET, loaded.outputs)
    ir.save(graph, file)
    if data is None:
        shape = (samples + images, *loaded.preprocessing.input_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        calibration = CalibrationRecord("noise", samples, 0, "")
        source = Source(loaded, file, noise[:samples], calibration, scheme, method)
        return source, [part.numpy() for part in noise[samples:].split(IMAGES_AT_ONCE)]
    drawn = find_images(data, "train", loaded.labels).draw(samples, 0)
    held_out = find_images(data, "val", loaded.labels).draw(images, 0)
    calibration = CalibrationRecord(data, samples, 0, drawn.sha256)
    pixels = drawn.pixels(loaded.preprocessing)
    source = Source(loaded, file, pixels, calibration, scheme, method)
    batches = held_out.batches(loaded.preprocessing, IMAGES_AT_ONCE)
    return source, [part.numpy() for part in batches]


@torch.no_grad()
def with_random_weights(architecture: str) -> VisionModel:
    """A timm architecture with random weights."""
    torch.manual_seed(0)
    module = timm.create_model(architecture).eval()
    # Linears that keep the variance of their inputs: with timm's small weights all attention would
    # be uniform.
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    preprocessing = Preprocessing.from_timm(resolve_model_data_config(module))
    labels = tuple(str(index) for index in range(module.num_classes))
    return VisionModel(module, ModelSource(architecture, "timm", {}, ""), preprocessing, labels)


def make(
    names: Sequence[str],
    source: Source,
    folder: Path,
    pixels: Batches,
    open_file: Callable[[Path], TimedModel],
) -> tuple[dict[str, Made], dict[str, str]]:
    """What each tool made, and for each tool that failed the reason.

    A failure of fp32 is raised: without it there is nothing to compare with.
    """
    results: dict[str, Made] = {}
    failures: dict[str, str] = {}
    for name in names:
        say(f"making {name}")
        try:
            # Some tools print progress bars.
            with contextlib.redirect_stdout(sys.stderr):
                file = TOOLS[name](source, folder)
            model = open_file(file)
            results[name] = Made(
                file, np.concatenate([np.array(model.run(part)) for part in pixels])
            )
        except ImportError as error:
            failures[name] = f"cannot import {error.name}: pip install -r {REQUIREMENTS}"
        # Whatever a tool raises is its result.
        except Exception as error:
            if name == "fp32":
                raise
            failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return results, failures


def row(
    result: Made, latencies: list[Latency], reference: Made, baseline: list[Latency]
) -> dict[str, Any]:
    """Size, distance to float32 and times of one file."""
    a, b = result.logits, reference.logits
    # Of the logits of each image, [images].
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    timed = []
    for latency, float32 in zip(latencies, baseline, strict=True):
        fields = latency.to_json()
        del fields["rounds_ms"]
        timed.append({**fields, "ratio_fp32": latency.ratio_to(float32)})
    # OpenVINO keeps the weights in a file beside the graph.
    files = [result.file, result.file.with_suffix(".bin")]
    return {
        "size_bytes": sum(part.stat().st_size for part in files if part.exists()),
        "agreement": float((a.argmax(1) == b.argmax(1)).mean()),
        "least_cosine": float(cosine.min()),
        "median_cosine": float(np.median(cosine)),
        "latency": timed,
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that make and run the files; None for a package that is not
    installed."""
    found: dict[str, str | None] = {}
    for package in ("onnxruntime", "openvino", "nncf", "torch", "timm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    data, environment = report["data"], report["environment"]
    threads = f"{environment['threads'] or 'all'} threads"
    caption = f"{data['images']} images of {data['path']}, {threads}, {environment['processor']}"
    if report["weights"] == "random":
        caption += "\nrandom weights and noise: agreement is a sanity check, not an accuracy"
    result = Table(title=report["model"], caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    result.add_column("\nmade by")
    timed = [f"batch {latency['batch']}\nms (× fp32)" for latency in report["rows"][0]["latency"]]
    for heading in ("\nMB", *timed, "agree\n%", "median\ncosine"):
        result.add_column(heading, justify="right")
    for entry in report["rows"]:
        if "failure" in entry:
            result.add_row(entry["name"], "–", *("–" for _ in timed), "–", "–")
            continue
        times = [
            f"{latency['p50_ms']:.2f} ({latency['ratio_fp32']:.2f})" for latency in entry["latency"]
        ]
        size, agreement = f"{entry['size_bytes'] / 1e6:.2f}", f"{100 * entry['agreement']:.1f}"
        result.add_row(entry["name"], size, *times, agreement, f"{entry['median_cosine']:.4f}")
    failures = [
        f"{entry['name']}: {entry['failure']}" for entry in report["rows"] if "failure" in entry
    ]
    result.caption = escape("\n".join([caption, *failures]))
    return result


if __name__ == "__main__":
    typer.run(main)
