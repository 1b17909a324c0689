"""Take all transformers of timm, and all image classifiers and encoders of transformers, from a
checkpoint folder to an ONNX file that gives the simulation's outputs. Models are tiny, weights are
random, images are noise.

    python tests/walk_families.py timm --json timm.json
    python tests/walk_families.py transformers --json transformers.json
    python tests/walk_families.py timm --json timm.json --only levit_128

A kind of model works, or is refused with a reason before anything is quantized. Everything else is
a failure: a traceback, a refusal after quantization, other outputs. The file is written after each
kind, and a kind that stands there is not tried again unless it is named. One process, some seconds
a kind.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.onnx._internal.exporter._capture_strategies
import walk_timm
import walk_transformers
from kept_registry import keep_registry
from walked_kind import Kind

from exporters.choices import suitable_flavor
from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.artifact.folder import load, save
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.models.load import load_model
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings, QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import parse_scheme
from marrq.workflows.feasible import check_feasible
from runtime.session import Model, SessionSettings

LIBRARIES: dict[str, Any] = {"timm": walk_timm, "transformers": walk_transformers}

SCHEME, METHOD = "W4A8", "rtn"
LEAST_COSINE = 0.9999
IMAGES = 8
SECONDS = 120
"""Processor time of one kind."""


@dataclass
class Outcome:
    """What became of a kind.

    result: works, refused, failed, or not built (the library itself cannot make the kind small).
    reason: of all but a kind that works.
    linears: how many were quantized.
    cosine, least: of the file's outputs to the simulation's, the median and the least of all
        images.
    """

    result: str
    reason: str = ""
    linears: int = 0
    cosine: float = 0.0
    least: float = 0.0
    seconds: float = field(default=0.0)


def tried(kind: Kind, method: str = METHOD) -> Outcome:
    """What becomes of a kind."""
    started, stage = time.perf_counter(), ["build"]
    library = LIBRARIES[kind.library]
    try:
        with _limited(SECONDS), library.tiny(kind), tempfile.TemporaryDirectory() as place:
            outcome = _taken(kind, library, Path(place), method, stage)
    except _Refused as refusal:
        outcome = Outcome("refused", str(refusal))
    # Whatever a model raises: the walk goes on.
    except (Exception, _Slow) as error:
        lines = str(error).strip().splitlines() or [""]
        outcome = Outcome("failed", f"{stage[-1]}: {type(error).__name__}: {lines[0][:200]}")
    outcome.seconds = round(time.perf_counter() - started, 1)
    return outcome


def _taken(kind: Kind, library: Any, place: Path, method: str, stage: list[str]) -> Outcome:
    """stage: takes the name of each step that begins."""
    folder = place / "checkpoint"
    folder.mkdir()
    try:
        library.write_checkpoint(kind, folder)
    # Not a matter of marrq: the library itself cannot make this kind small.
    except Exception as error:
        return Outcome("not built", f"{type(error).__name__}: {str(error).strip()[:200]}")
    with _refusals():
        stage.append("load")
        model = load_model(f"local-dir:{folder}")
        stage.append("quantize")
        record = CalibrationRecord("noise", 4, 0, "")
        settings = QuantizationSettings(parse_scheme(SCHEME), parse_method(method), record)
        made = quantize(model, kind.images(4), settings, RunOptions(torch.device("cpu")))
    try:
        return _exported(kind, made, place, stage)
    except Exception:
        # `marrq quantize` asks this first. Here it is asked only if something went wrong: it takes
        # a fifth of a kind's time, and what is exported passes it (see `main`).
        with _refusals():
            check_feasible(load_model(f"local-dir:{folder}"))
        raise


class _Refused(Exception):
    """What `marrq quantize` would say."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a sentence of marrq inside into a refusal."""
    try:
        yield
    except MarrqError as error:
        raise _Refused(re.sub(r"(local-dir:)?/\S*/checkpoint", "FOLDER", str(error))) from error


def _exported(kind: Kind, made: QuantizedModel, place: Path, stage: list[str]) -> Outcome:
    """What becomes of a quantized model."""
    stage.append("save")
    save(made, place / "artifact")
    stage.append("load the artifact")
    again = load(place / "artifact")
    stage.append("trace")
    traced = trace_quantized(again, "hash")
    stage.append("export")
    write(traced, suitable_flavor(again.scheme), place / "model.onnx")
    stage.append("run")
    return _compared(kind, made, again, place / "model.onnx")


@torch.no_grad()
def _compared(kind: Kind, made: QuantizedModel, again: QuantizedModel, file: Path) -> Outcome:
    """Outputs of the file beside those of the simulation, from the artifact and before it."""
    pixels = kind.images(IMAGES, seed=1)
    wanted = again.module(pixels).flatten(1).double().numpy()
    got = Model(file, SessionSettings(threads=1)).run(pixels.numpy()).reshape(IMAGES, -1)
    lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(got.astype(np.float64), axis=1)
    cosines = (wanted * got).sum(1) / lengths
    outcome = Outcome("works", "", len(quantized_linears(again.module)))
    outcome.cosine = round(float(np.median(cosines)), 6)
    outcome.least = round(float(cosines.min()), 6)
    if not torch.allclose(made.module(pixels).flatten(1).double(), torch.from_numpy(wanted)):
        return Outcome("failed", "load the artifact: other outputs than before it was saved")
    if not outcome.cosine >= LEAST_COSINE:
        outcome.result, outcome.reason = "failed", f"run: median cosine {outcome.cosine:.6f}"
    return outcome


class _Slow(BaseException):
    """No Exception, so that no library catches it."""

    def __str__(self) -> str:
        return f"took longer than {SECONDS} s"


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _Slow inside, if it takes more processor time."""

    def stop(*_: object) -> None:
        raise _Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def walk(library: str, file: Path, only: list[str]) -> None:
    """Try the kinds of a library that the file does not hold yet, or those that are named."""
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "kinds" not in report:
        report = {"kinds": [asdict(kind) for kind in LIBRARIES[library].kinds()], "rows": {}}
        _put(report, file)
    for fields in report["kinds"]:
        kind = Kind(**fields)
        if kind.name in only if only else kind.name not in report["rows"]:
            outcome = tried(kind)
            report["rows"][kind.name] = asdict(outcome)
            _put(report, file)
            print(f"{kind.name:44} {outcome.result:10} {outcome.seconds:6} s  {outcome.reason}")


def _put(report: dict[str, Any], file: Path) -> None:
    # In one step: a walk may be stopped at any moment.
    new = file.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1))
    new.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk over all families of models.")
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_registry()
    # The exporter's first way to trace a model, which is check_feasible's, and no other.
    strategies = torch.onnx._internal.exporter._capture_strategies
    strategies.CAPTURE_STRATEGIES = strategies.CAPTURE_STRATEGIES[:1]
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    walk(options.library, options.json, options.only)


if __name__ == "__main__":
    main()
