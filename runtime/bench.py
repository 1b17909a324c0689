"""The bench: what several models of one source are worth, measured in one run on the same images and in the same rounds, as JSON (schema
marrq.bench/2). Whatever is shown to people (runtime/report.py) is made from that JSON."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.accuracy import Accuracy, measure_accuracy
from runtime.environment import describe
from runtime.files import size_bytes
from runtime.latency import Latency, measure_latency
from runtime.session import Model, SessionSettings, executed_operators

SCHEMA = "marrq.bench/2"

Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]
"""Preprocessed inputs [batch, channels, height, width] and targets [batch]."""


@dataclass(frozen=True)
class Entry:
    """A model to measure. file: what is run; path: what the user named; flavor: as its metadata says; parity: see runtime/parity.py."""

    name: str
    file: Path
    path: str
    role: Literal["candidate", "baseline"]
    flavor: str
    bits_per_weight: float
    parity: dict[str, Any] | None = None


@dataclass(frozen=True)
class BenchSettings:
    """batches: batch sizes timed; rounds, seconds: see measure_latency."""

    session: SessionSettings
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seconds: float = 1.0


@dataclass(frozen=True)
class Progress:
    """Called after each batch of images with its size, and after each model of each round."""

    images: Callable[[int], None] = lambda count: None
    model: Callable[[], None] = lambda: None


def bench(
    entries: Sequence[Entry], data: Batches, description: dict[str, Any], settings: BenchSettings, progress: Progress
) -> dict[str, Any]:
    """Measure all entries on the same images and in the same rounds. description: of the data, as it goes into the JSON."""
    logits, targets = _predict(entries, data, settings.session, progress)
    reference = next((logits[entry.file] for entry in entries if entry.flavor == "fp32"), None)
    latencies = measure_latency(
        [entry.file for entry in entries], settings.batches, settings.session, settings.rounds, settings.seconds, progress.model
    )
    with tempfile.TemporaryDirectory() as scratch:
        executed = [executed_operators(entry.file, settings.session, Path(scratch)) for entry in entries]
    baselines = {entry.flavor: latency for entry, latency in zip(entries, latencies, strict=True) if entry.role == "baseline"}
    models = [
        _model(entry, measure_accuracy(logits[entry.file], targets, reference), latency, baselines, operators)
        for entry, latency, operators in zip(entries, latencies, executed, strict=True)
    ]
    environment = {**describe(settings.session), "rounds": settings.rounds, "seconds": settings.seconds}
    return {"schema": SCHEMA, "environment": environment, "data": description, "models": models}


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


def _model(
    entry: Entry, accuracy: Accuracy, latencies: list[Latency], baselines: dict[str, list[Latency]], executed: dict[str, int]
) -> dict[str, Any]:
    rows = []
    for slot, latency in enumerate(latencies):
        row = asdict(latency)
        del row["rounds_ms"]
        for flavor in ("fp16", "fp32"):
            row[f"ratio_{flavor}"] = latency.ratio_to(baselines[flavor][slot]) if flavor in baselines else None
        rows.append(row)
    return {
        "name": entry.name,
        "path": entry.path,
        "role": entry.role,
        "flavor": entry.flavor,
        "size_bytes": size_bytes(entry.file),
        "bits_per_weight": entry.bits_per_weight,
        "accuracy": asdict(accuracy),
        "latency": rows,
        "executed": executed,
        "parity": entry.parity,
    }
