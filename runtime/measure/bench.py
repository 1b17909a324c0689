"""The bench: what several models of one source are worth, measured in one run on the same images
and in the same rounds, as JSON (schema marrq.bench/2). Whatever is shown to people
(runtime/report/tables.py) is made from that JSON."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.audit.audit import audit, examine
from runtime.audit.graph import size_bytes
from runtime.audit.precision import measure_precision
from runtime.environment import describe
from runtime.measure.accuracy import hits, measure_accuracy, paired_drop
from runtime.measure.gate import judge
from runtime.measure.latency import Latency, Plan, Speed, measure_latency, measure_throughput
from runtime.measure.memory import measure_peak_memory
from runtime.measure.recommend import recommend
from runtime.session import WHOLE_GRAPH_PROVIDERS, Model, SessionSettings, executed_operators

SCHEMA = "marrq.bench/2"

Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Preprocessed inputs [batch, channels, height, width] and targets [batch]."""


@dataclass(frozen=True)
class Entry:
    """A model to measure. file: what is run; path: what the user named; flavor, scheme, method: as
    its metadata says; quantization: how each linear was quantized, where its artifact was at hand;
    parity: see runtime/measure/parity.py."""

    name: str
    file: Path
    path: str
    role: Literal["candidate", "baseline"]
    flavor: str
    scheme: str
    method: str
    bits_per_weight: float
    quantization: list[dict[str, Any]] | None = None
    parity: dict[str, Any] | None = None


@dataclass(frozen=True)
class BenchSettings:
    """throughput_threads: numbers of threads to measure throughput with, none for no throughput;
    max_drop: points of top-1 that a candidate may lose against the baseline, None for no gate;
    recommend: name the best candidates."""

    session: SessionSettings
    plan: Plan
    throughput_threads: tuple[int, ...] = ()
    max_drop: float | None = None
    recommend: bool = False


@dataclass(frozen=True)
class Progress:
    """Called after each batch of images with its size, and after each session that was timed."""

    images: Callable[[int], None] = lambda count: None
    session: Callable[[], None] = lambda: None


def bench(
    entries: Sequence[Entry],
    data: Batches,
    description: dict[str, Any],
    settings: BenchSettings,
    progress: Progress,
) -> dict[str, Any]:
    """Measure all entries on the same images and in the same rounds. description: of the data, as
    it goes into the JSON."""
    environment = {
        **describe(settings.session),
        "rounds": settings.plan.rounds,
        "seconds": settings.plan.seconds,
    }
    accuracies = _accuracies(entries, *_predict(entries, data, settings.session, progress))
    speeds = _speeds(entries, settings, progress)
    models = [
        _described(entry) | accuracy | speed | _what_runs(entry.file, settings.session)
        for entry, accuracy, speed in zip(entries, accuracies, speeds, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "environment": environment,
        "data": description,
        "models": models,
        "gate": None if settings.max_drop is None else judge(models, settings.max_drop),
        "recommendation": recommend(models) if settings.recommend else None,
    }


def _predict(
    entries: Sequence[Entry], data: Batches, settings: SessionSettings, progress: Progress
) -> tuple[dict[Path, NDArray[np.float32]], NDArray[np.int64]]:
    """Logits of every model on the same images, read once."""
    models = {entry.file: Model(entry.file, settings) for entry in entries}
    logits: dict[Path, list[NDArray[np.float32]]] = {path: [] for path in models}
    targets = []
    for pixels, labels in data:
        targets.append(labels)
        for path, model in models.items():
            logits[path].append(model.run(pixels))
        progress.images(len(labels))
    return {path: np.concatenate(parts) for path, parts in logits.items()}, np.concatenate(targets)


def _described(entry: Entry) -> dict[str, Any]:
    """What is known of a model before it runs."""
    return {
        "name": entry.name,
        "path": entry.path,
        "role": entry.role,
        "flavor": entry.flavor,
        "scheme": entry.scheme,
        "method": entry.method,
        "size_bytes": size_bytes(entry.file),
        "bits_per_weight": entry.bits_per_weight,
        "quantization": entry.quantization,
        "parity": entry.parity,
    }


def _accuracies(
    entries: Sequence[Entry], logits: dict[Path, NDArray[np.float32]], targets: NDArray[np.int64]
) -> list[dict[str, dict[str, Any]]]:
    """Accuracy of each model, and what it loses against the baseline: float32 where it is one, else
    the first. hits: a bit an image in the images' order, the first in the highest bit of the first
    byte, so that any two models can be compared in pairs."""
    reference = next((logits[entry.file] for entry in entries if entry.flavor == "fp32"), None)
    baselines = sorted(
        (entry for entry in entries if entry.role == "baseline"),
        key=lambda entry: entry.flavor != "fp32",
    )
    rows = []
    for entry in entries:
        right = hits(logits[entry.file], targets)
        against = None
        if baselines and entry is not baselines[0]:
            drop = paired_drop(hits(logits[baselines[0].file], targets), right)
            against = {"baseline": baselines[0].name, **asdict(drop)}
        accuracy = asdict(measure_accuracy(logits[entry.file], targets, reference))
        rows.append(
            {
                "accuracy": {
                    **accuracy,
                    "against": against,
                    "hits": np.packbits(right).tobytes().hex(),
                }
            }
        )
    return rows


def _speeds(
    entries: Sequence[Entry], settings: BenchSettings, progress: Progress
) -> list[dict[str, Any]]:
    """Latency, load time, memory, throughput where it is asked for, and what ran where, of each
    model."""
    files, session = [entry.file for entry in entries], settings.session
    speeds = measure_latency(files, session, settings.plan, progress.session)
    throughputs = measure_throughput(
        files, session, settings.plan, settings.throughput_threads, progress.session
    )
    memory = measure_peak_memory(files, max(settings.plan.batches), session)
    baselines = {
        entry.flavor: speed
        for entry, speed in zip(entries, speeds, strict=True)
        if entry.role == "baseline"
    }
    with tempfile.TemporaryDirectory() as scratch:
        return [
            {
                "latency": [
                    _latency_row(slot, latency, baselines)
                    for slot, latency in enumerate(speed.latency)
                ],
                "load_ms": speed.load_ms,
                "peak_memory_mb": peak,
                "throughput": [asdict(row) for row in rows],
                "executed": executed_operators(file, session, Path(scratch)),
                "executed_on": executed_operators(file, session, Path(scratch), by="provider"),
            }
            for file, speed, peak, rows in zip(files, speeds, memory, throughputs, strict=True)
        ]


def _latency_row(slot: int, latency: Latency, baselines: dict[str, Speed]) -> dict[str, Any]:
    """The latency at one batch size with its ratio to each baseline."""
    ratios = {
        f"ratio_{flavor}": latency.ratio_to(baselines[flavor].latency[slot])
        if flavor in baselines
        else None
        for flavor in ("fp16", "fp32")
    }
    return {**asdict(latency), **ratios}


def _what_runs(file: Path, settings: SessionSettings) -> dict[str, Any]:
    """Audit and precision; none with a provider that takes whole graphs, into which nobody can
    look."""
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        return {"audit": [], "precision": None}
    examined = examine(file, settings)
    return {
        "audit": [asdict(row) for row in audit(examined)],
        "precision": asdict(measure_precision(examined)),
    }
