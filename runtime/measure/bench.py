"""The bench: accuracy, size and speed of several models of one source, measured in one run on the
same images and in the same rounds.

The result is a `BenchReport`, whose JSON has the schema marrq.bench/2. Tables, sentences and pages
for people (runtime/report/) are made from it; nothing is measured there.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.audit.graph import size_bytes
from runtime.audit.linears import examine
from runtime.audit.placement import misplacement
from runtime.audit.precision import Precision, measure_precision
from runtime.audit.rows import AuditRow, audit
from runtime.environment import Environment, describe
from runtime.errors import BenchError
from runtime.gpu import COMMAND, Gpu, describe_gpu
from runtime.measure.answers import Answers, not_finite, predict
from runtime.measure.gate import Gate, Limits, hold_against_limits
from runtime.measure.images import ImageData, MeasuredImages
from runtime.measure.judge import Judgement, judge
from runtime.measure.latency import (
    Latency,
    Plan,
    Speed,
    Throughput,
    measure_latency,
    measure_throughput,
)
from runtime.measure.measured import ComparedLatency, Entry, MeasuredModel
from runtime.measure.memory import PeakMemory, measure_peak_memory
from runtime.measure.recommend import Recommendation, recommend
from runtime.records import Json, Record
from runtime.session import (
    DEVICES,
    WHOLE_GRAPH_PROVIDERS,
    ExecutedNode,
    SessionSettings,
    executed_nodes,
)

SCHEMA = "marrq.bench/2"


@dataclass(frozen=True)
class BenchSettings:
    """How to measure."""

    session: SessionSettings
    plan: Plan
    # Numbers of threads to measure throughput with; empty for no throughput.
    throughput_threads: tuple[int, ...] = ()
    # What candidates are held to.
    limits: Limits = field(default_factory=Limits)
    # Whether the best candidates are named.
    recommend: bool = False


@dataclass(frozen=True)
class Progress:
    """Called after each batch of images with its size, after each chunk of embeddings that was
    compared with its size, and after each session that was timed."""

    images: Callable[[int], None] = lambda count: None
    embeddings: Callable[[int], None] = lambda count: None
    session: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class BenchEnvironment(Environment):
    """The environment, with the plan, and the GPU just after the last timed run; None on the CPU,
    and if its driver does not tell."""

    rounds: int
    seconds: float
    cuda_graph: bool
    gpu: Gpu | None


@dataclass(frozen=True)
class BenchReport(Record):
    """Everything that a run of the bench found."""

    environment: BenchEnvironment
    # The images that answers were measured on, and those that k-NN looked among; None if there are
    # none of their own.
    data: ImageData
    gallery: ImageData | None
    # Baselines first, then candidates.
    models: tuple[MeasuredModel, ...]
    # None if nothing was demanded.
    gate: Gate | None
    # By criterion; None if it was not asked for, empty if no candidate could be judged.
    recommendation: dict[str, Recommendation] | None
    # What was left out of the measuring or may falsify it.
    warnings: tuple[str, ...]

    def to_json(self) -> Json:
        """Schema marrq.bench/2."""
        return {"schema": SCHEMA, **super().to_json()}


@dataclass(frozen=True)
class _Ran:
    """What ran of one model: the nodes, the audit and the precision, and what ran elsewhere."""

    nodes: list[ExecutedNode]
    audit: tuple[AuditRow, ...]
    precision: Precision | None
    misplaced: str | None


@dataclass(frozen=True)
class _Running:
    """Speed of one model, and what it takes."""

    speed: Speed
    memory: PeakMemory
    throughput: tuple[Throughput, ...]


def bench(
    entries: Sequence[Entry],
    images: MeasuredImages,
    settings: BenchSettings,
    progress: Progress,
    warnings: Sequence[str] = (),
) -> BenchReport:
    """Measure all entries on the same images and in the same rounds.

    warnings: for the report, of what the caller left out.

    Raises BenchError if a gate has no baseline, and for a candidate that the provider cannot run
    whole (runtime/audit/placement.py).
    """
    _check_gate(entries, settings)
    plan, session = settings.plan, settings.session
    described = vars(describe(session))
    # What cannot run fails before minutes of timing.
    answered = predict(entries, images, session, progress.images)
    judged = judge(entries, answered, progress.embeddings)
    ran = [_what_runs(entry, session) for entry in entries]
    runnings, gpu = _run(entries, settings, progress)
    on_gpu = session.provider in DEVICES
    environment = BenchEnvironment(
        **described,
        rounds=plan.rounds,
        seconds=plan.seconds,
        cuda_graph=plan.cuda_graph,
        gpu=gpu,
    )
    baselines = {
        entry.flavor: running.speed
        for entry, running in zip(entries, runnings, strict=True)
        if entry.role == "baseline"
    }
    models = tuple(
        _measured(entry, judgement, answered.answers[entry.file], nodes, running, baselines)
        for entry, judgement, nodes, running in zip(entries, judged, ran, runnings, strict=True)
    )
    elsewhere = [
        f"{entry.name}: {nodes.misplaced}"
        for entry, nodes in zip(entries, ran, strict=True)
        if nodes.misplaced is not None
    ]
    return BenchReport(
        environment=environment,
        data=images.data,
        gallery=images.gallery,
        models=models,
        gate=hold_against_limits(models, settings.limits) if settings.limits.any else None,
        recommendation=recommend(models) if settings.recommend else None,
        warnings=(*warnings, *elsewhere, *(_about_gpu(gpu) if on_gpu else ())),
    )


def _about_gpu(gpu: Gpu | None) -> list[str]:
    """What is not known of the GPU, or makes its times those of a slower one."""
    if gpu is None:
        return [f"{COMMAND} tells of no GPU: its name, driver, clocks and memory are not known"]
    if gpu.throttled:
        clock = "" if gpu.sm_mhz is None else f", to {gpu.sm_mhz:.0f} MHz"
        return [f"the clock of {gpu.name} was held down{clock}"]
    return []


def _check_gate(entries: Sequence[Entry], settings: BenchSettings) -> None:
    baselines = [entry for entry in entries if entry.role == "baseline"]
    if settings.limits.max_drop is not None and not baselines:
        raise BenchError("an accuracy gate needs a baseline: pass --baseline fp32, or a file")
    is_there = any(entry.flavor == "fp32" for entry in baselines)
    if settings.limits.min_cosine is not None and not is_there:
        raise BenchError("--min-cosine compares with fp32, and fp32 is not measured: add it")


def _what_runs(entry: Entry, settings: SessionSettings) -> _Ran:
    """The nodes that ran, audit and precision. A provider that compiles the whole graph cannot be
    looked into. Raises BenchError for a candidate with nodes on another provider, whose time would
    be that of the copies."""
    with tempfile.TemporaryDirectory() as scratch:
        nodes = executed_nodes(entry.file, settings, Path(scratch))
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        return _Ran(nodes, (), None, None)
    examined = examine(entry.file, settings)
    elsewhere = misplacement(examined, nodes)
    # A baseline is no reason to end a bench: the report says what is wrong with it.
    if elsewhere is not None and entry.role == "candidate":
        raise BenchError(f"{entry.name}: {elsewhere}; export it with --device gpu")
    return _Ran(nodes, tuple(audit(examined)), measure_precision(examined), elsewhere)


def _run(
    entries: Sequence[Entry], settings: BenchSettings, progress: Progress
) -> tuple[list[_Running], Gpu | None]:
    """Latency, load time, throughput and memory of each model; and the GPU that ran them."""
    files, session, plan = [entry.file for entry in entries], settings.session, settings.plan
    # One after the other: each would disturb the times of the next.
    speeds = measure_latency(files, session, plan, progress.session)
    throughputs = measure_throughput(
        files, session, plan, settings.throughput_threads, progress.session
    )
    # Now, while the clocks are still those of the last timed run.
    gpu = describe_gpu() if session.provider in DEVICES else None
    # Memory at the largest batch, which a server has to have room for.
    memory = measure_peak_memory(files, max(plan.batches), session)
    runnings = [
        _Running(speed, peak, tuple(throughput))
        for speed, peak, throughput in zip(speeds, memory, throughputs, strict=True)
    ]
    return runnings, gpu


def _measured(
    entry: Entry,
    judgement: Judgement,
    answers: Answers,
    ran: _Ran,
    running: _Running,
    baselines: dict[str, Speed],
) -> MeasuredModel:
    """All that was found of one model. baselines: speeds of the baselines, by flavour."""
    return MeasuredModel(
        name=entry.name,
        path=entry.path,
        role=entry.role,
        flavor=entry.flavor,
        device=entry.device,
        scheme=entry.scheme,
        method=entry.method,
        size_bytes=size_bytes(entry.file),
        bits_per_weight=entry.bits_per_weight,
        quantization=entry.quantization,
        refinement=entry.refinement,
        parity=entry.parity,
        **vars(judgement),
        not_finite=not_finite(entry.file, answers),
        latency=tuple(
            _with_ratios(latency, slot, baselines)
            for slot, latency in enumerate(running.speed.latency)
        ),
        load_ms=running.speed.load_ms,
        peak_memory_mb=running.memory.host,
        peak_gpu_memory_mb=running.memory.gpu,
        throughput=running.throughput,
        executed=_counted(node.operator for node in ran.nodes),
        executed_on=_counted(node.provider for node in ran.nodes),
        audit=ran.audit,
        precision=ran.precision,
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _with_ratios(latency: Latency, slot: int, baselines: dict[str, Speed]) -> ComparedLatency:
    """A latency with its ratio to each baseline. slot: place of the batch size in the plan."""
    ratios = {
        flavor: latency.ratio_to(baselines[flavor].latency[slot]) if flavor in baselines else None
        for flavor in ("fp16", "fp32")
    }
    return ComparedLatency(**vars(latency), ratio_fp16=ratios["fp16"], ratio_fp32=ratios["fp32"])
