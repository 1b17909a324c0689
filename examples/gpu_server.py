"""What a GPU makes of marrq's files, and how long quantizing takes there, as JSON: graphs of a
ViT-B/16 with random weights under ONNX Runtime, and `marrq quantize` of a ViT-L/16 and a DINOv2-S.

    python examples/gpu_server.py -o gpu.json            on a machine with CUDA, about 8 minutes
    python examples/gpu_server.py --tiny -o tiny.json    the same steps for tiny models on the CPU

graphs      fp16 as torch's exporter writes it, the fp16 baseline, and folded files of W4, W3 and
            W2. Sizes; nodes that ran on the CPU and are no arithmetic on shapes; the time of one
            forward at each batch size, with and without CUDA graphs, and its ratio to the fp16
            baseline in the same rounds; whether the outputs are finite.
quantize    seconds of the whole command, start included, W4A8 by marr, noise for images

The weights are random, so accuracy is not measured: `marrq bench artifact --data IMAGES --device
gpu` does that. The report is written anew after each file and each command, so a run that is ended
leaves what it has. A step that fails is recorded in it, and the next one is run. Numbers of one
card say nothing of another, so the report names the card.
"""

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from exporters.float16 import to_float16
from exporters.onnx_file import write, write_baseline
from exporters.opsets import IR_VERSIONS, OPSET
from exporters.trace import trace, trace_quantized
from marrq.errors import MarrqError
from marrq.files import write_json
from marrq.models.images import find_images
from marrq.models.load import VisionModel, load_model
from marrq.outputs import check_place
from marrq.workflows.in_memory import quantize
from runtime.audit.graph import Graph, size_bytes
from runtime.audit.placement import misplaced
from runtime.environment import installed_packages
from runtime.gpu import FOR_CUDA, describe_gpu
from runtime.measure.latency import Plan, measure_latency
from runtime.session import (
    ONNXRUNTIME_VERSION,
    PROVIDERS,
    Model,
    SessionSettings,
    available_providers,
    executed_nodes,
)

SCHEMES = ("W4A16", "W3A16", "W2A16")
BASELINE = "fp16"
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """A model by timm's name and arguments, and how it is measured or quantized."""

    name: str
    arguments: dict[str, Any]
    images: int


@dataclass(frozen=True)
class Setup:
    """What is run where. graphs: whose files are timed. quantized: what the command quantizes."""

    device: str
    provider: str
    torch_device: str
    graphs: Size
    quantized: dict[str, Size]
    plan: Plan


LARGE = Setup(
    device="gpu",
    provider="cuda",
    torch_device="cuda",
    graphs=Size("vit_base_patch16_224", {}, 8),
    quantized={
        "ViT-L/16": Size("vit_large_patch16_224", {}, 512),
        "DINOv2-S": Size("vit_small_patch14_dinov2", {"img_size": 224}, 256),
    },
    plan=Plan((1, 8, 32), rounds=3, seconds=0.3),
)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY = Setup(
    device="cpu",
    provider="cpu",
    torch_device="cpu",
    graphs=Size("vit_tiny_patch16_224", SMALL, 2),
    quantized={"tiny": Size("vit_tiny_patch16_224", SMALL, 4)},
    plan=Plan((1, 2), rounds=1, seconds=0.0),
)


class Report:
    """What was measured so far, written anew with each part of it, and told on stderr."""

    def __init__(self, file: Path, head: dict[str, Any]) -> None:
        self.file, self.parts, self.start = file, head, time.perf_counter()

    def put(self, step: str, found: object) -> None:
        """Set a step's result, or what there is of it."""
        self.parts[step] = found
        write_json(self.file, self.parts)

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"{time.perf_counter() - self.start:6.1f} s  {text}", file=sys.stderr, flush=True)


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="The report, as JSON.")],
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny models on the CPU, to try the script.")
    ] = False,
) -> None:
    """Measure what a GPU makes of marrq's files. Needs a GPU with CUDA, and about 8 minutes.

    Size, placement on the GPU and time of fp16 and of folded W4, W3 and W2 files of a ViT-B/16, and
    the time of marrq quantize for a ViT-L/16 and a DINOv2-S. Weights are random: no accuracy.
    """
    setup = TINY if tiny else LARGE
    try:
        check(setup, output)
    except MarrqError as error:
        # One sentence, as marrq itself ends.
        print(f"gpu_server.py: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    head: dict[str, Any] = {
        "gpu": None,
        "packages": {**installed_packages(), "torch": torch.__version__},
        "onnxruntime": ONNXRUNTIME_VERSION,
        "provider": setup.provider,
    }
    report = Report(output, head)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = noise(folder / "images", max(size.images for size in setup.quantized.values()))
        steps: dict[str, Callable[[], object]] = {
            "graphs": lambda: graphs(setup, images, folder, report),
            "quantize": lambda: quantizations(setup, images, folder, report),
        }
        for step, run in steps.items():
            start = time.perf_counter()
            try:
                found = run()
            except Exception:  # what was measured before must not be lost with a later step
                found = {**report.parts.get(step, {}), "error": traceback.format_exc()}
                report.say(f"{step} failed, the report says how")
            gpu = describe_gpu()
            report.parts["gpu"] = None if gpu is None else asdict(gpu)
            report.parts[f"{step}_seconds"] = round(time.perf_counter() - start, 1)
            report.put(step, found)
    report.say(f"wrote {output}")
    print(json.dumps(report.parts, indent=2))


def check(setup: Setup, output: Path) -> None:
    """Raise MarrqError if the report has no place, or if this machine cannot run the setup."""
    check_place(output)
    if output.exists():
        raise MarrqError(f"output {str(output)!r} exists: choose another place")
    if setup.provider == "cpu":
        return
    lacks = []
    if PROVIDERS[setup.provider] not in available_providers():
        lacks.append(f"the ONNX Runtime here has no CUDA provider ({FOR_CUDA})")
    if not torch.cuda.is_available():
        lacks.append("torch finds no CUDA device")
    if lacks:
        raise MarrqError(f"{', and '.join(lacks)}; --tiny tries the script on the CPU")


def noise(folder: Path, count: int) -> Path:
    """A folder of images. Blocks of colour, so that their tokens differ."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"{number % CLASSES}" / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        small.resize((256, 256)).save(place)
    return folder


def checkpoint(size: Size, folder: Path) -> str:
    """A model with random weights as a folder of timm's; returns its name for marrq."""
    folder.mkdir()
    torch.manual_seed(0)
    module = timm.create_model(size.name, num_classes=CLASSES, **size.arguments)
    save_file(module.state_dict(), str(folder / "model.safetensors"))
    side = size.arguments.get("img_size", 224)
    config = {
        "architecture": size.name,
        "num_classes": CLASSES,
        "model_args": size.arguments,
        "label_names": [str(label) for label in range(CLASSES)],
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def graphs(setup: Setup, images: Path, folder: Path, report: Report) -> dict[str, Any]:
    """Size, placement and time of each file."""
    report.say(f"load {setup.graphs.name} and write its files")
    model = load_model(checkpoint(setup.graphs, folder / "graphs"))
    files: dict[str, Path] = {}
    for name, file in written(setup, model, images, folder):
        report.say(f"wrote {name}")
        files[name] = file
    settings = SessionSettings(setup.provider)
    rows: dict[str, Any] = {}
    for name, file in files.items():
        report.say(f"run {name}")
        rows[name] = {
            "mb": size_bytes(file) / 1e6,
            "of_fp16": size_bytes(file) / size_bytes(files[BASELINE]),
            **ran(file, settings, folder),
        }
        report.put("graphs", rows)
    # The trace as it is need not be recordable, and is there for its plain time alone.
    plans = {"plain": (setup.plan, list(files))}
    if setup.provider == "cuda":
        plans["cuda_graph"] = (replace(setup.plan, cuda_graph=True), list(files)[1:])
    for kind, (plan, names) in plans.items():
        report.say(f"time all files: {kind}, {plan.rounds} rounds at batches {plan.batches}")
        try:
            times = timed([files[name] for name in names], names.index(BASELINE), settings, plan)
        except Exception:  # what was measured plainly must not be lost
            times = [{"error": traceback.format_exc()} for _ in names]
        for name, row in zip(names, times, strict=True):
            rows[name][kind] = row
        report.put("graphs", rows)
    return rows


def timed(
    files: list[Path], baseline: int, settings: SessionSettings, plan: Plan
) -> list[dict[str, Any]]:
    """Load time, time of one forward, and its ratio to that of the file in the baseline's place."""
    speeds = measure_latency(files, settings, plan)
    return [
        {
            "load_ms": speed.load_ms,
            "ms": {latency.batch: latency.p50_ms for latency in speed.latency},
            "to_fp16": {
                latency.batch: latency.ratio_to(other)
                for latency, other in zip(speed.latency, speeds[baseline].latency, strict=True)
            },
        }
        for speed in speeds
    ]


def written(
    setup: Setup, model: VisionModel, images: Path, folder: Path
) -> Iterator[tuple[str, Path]]:
    """The files, by what they are."""
    yield "fp16, torch's trace", untouched(model, folder / "trace.onnx")
    write_baseline(model, BASELINE, folder / "fp16.onnx", device=setup.device)
    yield BASELINE, folder / "fp16.onnx"
    traced, drawn = None, find_images(str(images), "train", model.labels)
    for scheme in SCHEMES:
        quantized = quantize(
            model, drawn, scheme, "rtn", samples=setup.graphs.images, seed=0, device="cpu"
        )
        # The trace holds no codes, so one serves all schemes.
        first = traced if traced is not None else trace_quantized(quantized, "random weights")
        traced = replace(first, model=quantized)
        file = folder / f"{scheme}.onnx"
        write(traced, "folded", file, device=setup.device)
        yield f"folded {scheme}", file


def untouched(model: VisionModel, file: Path) -> Path:
    """The float16 graph as torch's exporter writes it, without marrq's passes."""
    graph = trace(model.module, model.preprocessing.input_size, OPSET, model.outputs)
    to_float16(graph)
    graph.ir_version = IR_VERSIONS[OPSET]
    ir.save(graph, file)
    return file


def ran(file: Path, settings: SessionSettings, folder: Path) -> dict[str, Any]:
    """Operators and providers of the nodes that ran, those on a wrong provider, and whether the
    outputs are finite."""
    nodes = executed_nodes(file, settings, folder)
    optimized = folder / "optimized.onnx"
    model = Model(file, settings, optimized_to=optimized)
    wrong = misplaced(Graph.load(optimized), nodes, PROVIDERS[settings.provider])
    operators, providers = (
        {name: names.count(name) for name in dict.fromkeys(names)}
        for names in ([node.operator for node in nodes], [node.provider for node in nodes])
    )
    return {
        "operators": operators,
        "providers": providers,
        "misplaced": [asdict(node) for node in wrong],
        "finite": bool(np.isfinite(model.run(model.random_input(2))).all()),
    }


def quantizations(setup: Setup, images: Path, folder: Path, report: Report) -> dict[str, Any]:
    """Seconds of the whole command for each model."""
    found: dict[str, Any] = {}
    for number, (name, size) in enumerate(setup.quantized.items()):
        report.say(f"quantize {name} with {size.images} images")
        model = checkpoint(size, folder / f"float-{number}")
        options = ["--data", images, "--samples", size.images, "--scheme", "W4A8"]
        command = ["quantize", model, *options, "--device", setup.torch_device]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "marrq", *map(str, command), "-o", folder / f"low-{number}"],
            capture_output=True,
            text=True,
            check=False,
        )
        found[name] = {
            "images": size.images,
            "seconds": time.perf_counter() - start,
            "exit_code": done.returncode,
            "last_line": (done.stderr.strip().splitlines() or [""])[-1],
        }
        report.put("quantize", found)
    return found


if __name__ == "__main__":
    typer.run(main)
