"""The bench: accuracy, size and speed of several models of one source, measured in one run on the
same images and in the same rounds.

The result is a `BenchReport`, whose JSON has the schema marrq.bench/2. Tables, sentences and pages
for people (runtime/report/) are made from it; nothing is measured there.
"""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.audit.graph import size_bytes
from runtime.audit.linears import examine
from runtime.audit.precision import Precision, measure_precision
from runtime.audit.rows import AuditRow, audit
from runtime.environment import Environment, describe
from runtime.measure.accuracy import Logits, hits, measure_accuracy, paired_drop
from runtime.measure.gate import Gate, hold_against_limit
from runtime.measure.latency import (
    Latency,
    Plan,
    Speed,
    Throughput,
    measure_latency,
    measure_throughput,
)
from runtime.measure.measured import (
    BaselineDrop,
    ComparedAccuracy,
    ComparedLatency,
    MeasuredModel,
    Role,
)
from runtime.measure.memory import measure_peak_memory
from runtime.measure.parity import Parity
from runtime.measure.recommend import Recommendation, recommend
from runtime.quantization import QuantizedModule
from runtime.records import Json, Record
from runtime.session import WHOLE_GRAPH_PROVIDERS, Model, SessionSettings, executed_operators

SCHEMA = "marrq.bench/2"

# Preprocessed inputs [batch, channels, height, width] and targets [batch].
Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True)
class Entry:
    """A model to measure."""

    name: str
    # What is run.
    file: Path
    # What the user named.
    path: str
    role: Role
    # As the file's metadata say.
    flavor: str
    scheme: str
    method: str
    bits_per_weight: float
    # How each linear was quantized; None without the artifact.
    quantization: tuple[QuantizedModule, ...] | None = None
    # How the file compares with its artifact; None if that was not asked for.
    parity: Parity | None = None


@dataclass(frozen=True)
class BenchSettings:
    """How to measure."""

    session: SessionSettings
    plan: Plan
    # Numbers of threads to measure throughput with; empty for no throughput.
    throughput_threads: tuple[int, ...] = ()
    # Points of top-1 that a candidate may lose against the baseline; None for no gate.
    max_drop: float | None = None
    # Whether the best candidates are named.
    recommend: bool = False


@dataclass(frozen=True)
class Progress:
    """Called after each batch of images with its size, and after each session that was timed."""

    images: Callable[[int], None] = lambda count: None
    session: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class BenchEnvironment(Environment):
    """The environment, with the rounds and seconds of the plan."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class ImageData(Record):
    """The images that accuracy was measured on. hash: over the list of their names."""

    path: str
    images: int
    hash: str


@dataclass(frozen=True)
class BenchReport(Record):
    """Everything that a run of the bench found."""

    environment: BenchEnvironment
    data: ImageData
    # Baselines first, then candidates.
    models: tuple[MeasuredModel, ...]
    # None if no drop was demanded.
    gate: Gate | None
    # By criterion; None if it was not asked for.
    recommendation: dict[str, Recommendation] | None

    def to_json(self) -> Json:
        """Schema marrq.bench/2."""
        return {"schema": SCHEMA, **super().to_json()}


@dataclass(frozen=True)
class _Running:
    """Speed of one model, and what ran."""

    speed: Speed
    peak_memory_mb: float | None
    throughput: tuple[Throughput, ...]
    executed: dict[str, int]
    executed_on: dict[str, int]


def bench(
    entries: Sequence[Entry],
    batches: Batches,
    data: ImageData,
    settings: BenchSettings,
    progress: Progress,
) -> BenchReport:
    """Measure all entries on the same images and in the same rounds. data: describes the images."""
    plan, session = settings.plan, settings.session
    environment = BenchEnvironment(
        **vars(describe(session)), rounds=plan.rounds, seconds=plan.seconds
    )
    # Accuracy first: files that cannot run fail before minutes of timing.
    accuracies = _accuracies(entries, *_predict(entries, batches, session, progress))
    runnings = _run(entries, settings, progress)
    baselines = {
        entry.flavor: running.speed
        for entry, running in zip(entries, runnings, strict=True)
        if entry.role == "baseline"
    }
    models = tuple(
        _measured(entry, accuracy, running, baselines, session)
        for entry, accuracy, running in zip(entries, accuracies, runnings, strict=True)
    )
    return BenchReport(
        environment=environment,
        data=data,
        models=models,
        gate=None if settings.max_drop is None else hold_against_limit(models, settings.max_drop),
        recommendation=recommend(models) if settings.recommend else None,
    )


def _predict(
    entries: Sequence[Entry], batches: Batches, settings: SessionSettings, progress: Progress
) -> tuple[dict[Path, Logits], NDArray[np.int64]]:
    """Logits of every model by its file, and the targets. The images are read once."""
    # All sessions are open at once here, since nothing is timed.
    models = {entry.file: Model(entry.file, settings) for entry in entries}
    logits: dict[Path, list[Logits]] = {path: [] for path in models}
    targets = []
    for pixels, labels in batches:
        targets.append(labels)
        for path, model in models.items():
            logits[path].append(model.run(pixels))
        progress.images(len(labels))
    return {path: np.concatenate(parts) for path, parts in logits.items()}, np.concatenate(targets)


def _accuracies(
    entries: Sequence[Entry], logits: dict[Path, Logits], targets: NDArray[np.int64]
) -> list[ComparedAccuracy]:
    """Accuracy of each model, and what it loses against the baseline."""
    # What agreement and divergence are measured from; None if no float32 model is measured.
    float32 = next((logits[entry.file] for entry in entries if entry.flavor == "fp32"), None)
    baselines = [entry for entry in entries if entry.role == "baseline"]
    # Losses are counted from float32 if it was measured, and else from the first baseline.
    baselines.sort(key=lambda entry: entry.flavor != "fp32")
    rows = []
    for entry in entries:
        # Pairs, and not differences of shares: the images are the same.
        right, against = hits(logits[entry.file], targets), None
        if baselines and entry is not baselines[0]:
            drop = paired_drop(hits(logits[baselines[0].file], targets), right)
            against = BaselineDrop(**vars(drop), baseline=baselines[0].name)
        accuracy = measure_accuracy(logits[entry.file], targets, float32)
        # A bit for each image: hits of 50,000 images take 12 kB in the report.
        packed = np.packbits(right).tobytes().hex()
        rows.append(ComparedAccuracy(**vars(accuracy), against=against, hits=packed))
    return rows


def _run(entries: Sequence[Entry], settings: BenchSettings, progress: Progress) -> list[_Running]:
    """Latency, load time, throughput, memory and executed operators of each model."""
    files, session, plan = [entry.file for entry in entries], settings.session, settings.plan
    # One after the other: each would disturb the times of the next.
    speeds = measure_latency(files, session, plan, progress.session)
    throughputs = measure_throughput(
        files, session, plan, settings.throughput_threads, progress.session
    )
    # Memory at the largest batch, which a server has to have room for.
    memory = measure_peak_memory(files, max(plan.batches), session)
    with tempfile.TemporaryDirectory() as scratch:
        # Profiles are written by ONNX Runtime, and read back from here.
        folder = Path(scratch)
        return [
            _Running(
                speed,
                peak,
                tuple(throughput),
                executed_operators(file, session, folder),
                executed_operators(file, session, folder, by="provider"),
            )
            for file, speed, peak, throughput in zip(
                files, speeds, memory, throughputs, strict=True
            )
        ]


def _measured(
    entry: Entry,
    accuracy: ComparedAccuracy,
    running: _Running,
    baselines: dict[str, Speed],
    session: SessionSettings,
) -> MeasuredModel:
    """All that was found of one model. baselines: speeds of the baselines, by flavour."""
    # Examined after the timing, which it would disturb.
    rows, precision = _what_runs(entry.file, session)
    return MeasuredModel(
        name=entry.name,
        path=entry.path,
        role=entry.role,
        flavor=entry.flavor,
        scheme=entry.scheme,
        method=entry.method,
        size_bytes=size_bytes(entry.file),
        bits_per_weight=entry.bits_per_weight,
        quantization=entry.quantization,
        parity=entry.parity,
        accuracy=accuracy,
        latency=tuple(
            _with_ratios(latency, slot, baselines)
            for slot, latency in enumerate(running.speed.latency)
        ),
        load_ms=running.speed.load_ms,
        peak_memory_mb=running.peak_memory_mb,
        throughput=running.throughput,
        executed=running.executed,
        executed_on=running.executed_on,
        audit=rows,
        precision=precision,
    )


def _with_ratios(latency: Latency, slot: int, baselines: dict[str, Speed]) -> ComparedLatency:
    """A latency with its ratio to each baseline. slot: place of the batch size in the plan."""
    ratios = {
        flavor: latency.ratio_to(baselines[flavor].latency[slot]) if flavor in baselines else None
        for flavor in ("fp16", "fp32")
    }
    return ComparedLatency(**vars(latency), ratio_fp16=ratios["fp16"], ratio_fp32=ratios["fp32"])


def _what_runs(
    file: Path, settings: SessionSettings
) -> tuple[tuple[AuditRow, ...], Precision | None]:
    """Audit and precision. A provider that compiles the whole graph cannot be looked into."""
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        return (), None
    examined = examine(file, settings)
    return tuple(audit(examined)), measure_precision(examined)
