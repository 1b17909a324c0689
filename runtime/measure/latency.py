"""Latency and throughput of several models, compared fairly on a machine that is never quiet.

**Rounds.** In each round every session is opened, warmed up, timed and closed, one after the other.
So only one session lives at a time (the spinning threads of another would slow it), and a slow
spell of the machine falls on all models alike. Percentiles are over all runs of all rounds. A ratio
of two models is the median over the rounds of the ratio of their medians within the round.

**Warm-up.** A session runs until the median of its last three runs is at most 5 % below the median
of the three runs before: at least 6 runs, at most 30. What is left is noise, with which the rounds
deal, or a machine that does not settle.

**Throughput** is images over the time of a round's runs, back to back; the median over the rounds.
**Load time** is the time to create the session; the median over the rounds. The file is in the
system's cache after the first round.

On CUDA and TensorRT a run begins and ends on the device (`Model.forward`). With CUDA graphs each
batch size has a session of its own (runtime/session.py), whose graph is recorded in the warm-up.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.records import Record
from runtime.session import Model, SessionSettings

WARM_UP_WINDOW = 3  # runs
WARM_UP_TOLERANCE = 0.05
MAX_WARM_UP = 30  # runs
MIN_RUNS, MAX_RUNS = 5, 200  # of one round, after the warm-up


@dataclass(frozen=True)
class Latency(Record):
    """Time of one forward of a batch."""

    batch: int
    # Percentiles over all runs of all rounds, in milliseconds.
    p50_ms: float
    p90_ms: float
    p99_ms: float
    # At the median.
    images_per_s: float
    # Median of each round: what ratios and level latencies are computed from.
    rounds_ms: tuple[float, ...]

    def ratio_to(self, other: "Latency") -> float:
        """Time of this model over that of the other: the median over the rounds of the ratio within
        a round. Both were measured in the same rounds."""
        return float(np.median(np.divide(self.rounds_ms, other.rounds_ms)))


@dataclass(frozen=True)
class Speed:
    """Speed of one model.

    latency: at each batch size, in the order of the plan.
    load_ms: time to create the session.
    """

    latency: tuple[Latency, ...]
    load_ms: float


@dataclass(frozen=True)
class Throughput(Record):
    """Images per second of one model at a batch size and a number of threads."""

    batch: int
    threads: int
    images_per_s: float


@dataclass(frozen=True)
class Plan:
    """How to measure.

    batches: batch sizes.
    rounds: how often each session is opened.
    seconds: time spent on each batch size in a round, without the warm-up; at least 5 runs and at
        most 200, however long they take.
    cuda_graph: record the forward of each batch size as a CUDA graph.
    """

    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seconds: float = 1.0
    cuda_graph: bool = False

    @property
    def sessions(self) -> tuple[tuple[int, ...], ...]:
        """The batch sizes that share a session, for each session of a model in a round."""
        return tuple((batch,) for batch in self.batches) if self.cuda_graph else (self.batches,)


# Milliseconds of single runs of one session: [batch size][round] → [runs].
Samples = list[list[NDArray[np.float64]]]


class TimedModel(Protocol):
    """An open model under any runtime: what a comparison with another tool has to provide."""

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [batch, classes] of inputs [batch, channels, height, width]."""

    def forward(self, pixels: NDArray[np.float32]) -> Callable[[], None]:
        """A function that runs one forward and returns when it is done. pixels: [batch, channels,
        height, width]."""

    def random_input(self, batch: int) -> NDArray[np.float32]:
        """Noise in the shape of the input."""


def measure_latency(
    paths: Sequence[Path],
    settings: SessionSettings,
    plan: Plan,
    session_done: Callable[[], None] = lambda: None,
    open_model: Callable[[Path, SessionSettings], TimedModel] = Model,
) -> list[Speed]:
    """Latency and load time of each path.

    session_done: called after each path's sessions of a round, `plan.rounds · len(paths)` times.
    open_model: opens a path; another function than `Model` measures another runtime.
    """
    measured = _interleaved([(path, settings) for path in paths], plan, session_done, open_model)
    return [
        Speed(
            tuple(_latency(*pair) for pair in zip(plan.batches, samples, strict=True)),
            float(np.median(loads)),
        )
        for samples, loads in measured
    ]


def measure_throughput(
    paths: Sequence[Path],
    settings: SessionSettings,
    plan: Plan,
    threads: Sequence[int],
    session_done: Callable[[], None] = lambda: None,
) -> list[list[Throughput]]:
    """Throughput of each path at each batch size and number of threads.

    settings: its number of threads is not used.
    session_done: called `plan.rounds · len(paths) · len(threads)` times.
    """
    # All numbers of threads of one path, then of the next.
    sessions = [(path, replace(settings, threads=number)) for path in paths for number in threads]
    # The sessions of one path follow each other: each takes the next of what was measured.
    measured = iter(_interleaved(sessions, plan, session_done, Model))
    return [
        [row for number in threads for row in _throughput(number, plan.batches, next(measured)[0])]
        for _ in paths
    ]


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and the most itself."""
    # Powers of two up to the most; bit_length is the number of them.
    powers = tuple(2**exponent for exponent in range(most.bit_length()))
    return powers if powers[-1] == most else (*powers, most)


def _interleaved(
    sessions: Sequence[tuple[Path, SessionSettings]],
    plan: Plan,
    session_done: Callable[[], None],
    open_model: Callable[[Path, SessionSettings], TimedModel],
) -> list[tuple[Samples, list[float]]]:
    """For each session its samples, and the milliseconds that each of its creations took."""
    measured: list[tuple[Samples, list[float]]] = [
        ([[] for _ in plan.batches], []) for _ in sessions
    ]
    # The round is the outer loop, so that a slow spell falls on all models.
    for _ in range(plan.rounds):
        for (path, settings), (samples, loads) in zip(sessions, measured, strict=True):
            by_batch = iter(samples)
            for batches in plan.sessions:
                recorded = batches[0] if plan.cuda_graph else None
                start = time.perf_counter()
                # In every round anew, so that each starts cold.
                model = open_model(path, replace(settings, graph_batch=recorded))
                loads.append(1e3 * (time.perf_counter() - start))
                for batch in batches:
                    forward = model.forward(model.random_input(batch))
                    next(by_batch).append(_time(forward, plan.seconds))
                    del forward
                del model  # closes the session: its threads would spin beside the next one
            session_done()
    return measured


def _time(forward: Callable[[], None], seconds: float) -> NDArray[np.float64]:
    """Milliseconds of single runs after the warm-up, [runs]."""

    def timed() -> float:
        start = time.perf_counter()
        forward()
        return 1e3 * (time.perf_counter() - start)

    # First runs are slow: memory grows, caches fill, the clock of the processor rises.
    warming: list[float] = []
    while len(warming) < MAX_WARM_UP and not is_warm(warming):
        warming.append(timed())
    # At least MIN_RUNS, so that a slow model has a median too; at most MAX_RUNS, so that a fast one
    # does not fill the memory with times.
    times: list[float] = []
    while len(times) < MIN_RUNS or (sum(times) < 1e3 * seconds and len(times) < MAX_RUNS):
        times.append(timed())
    return np.array(times)


def is_warm(times: Sequence[float]) -> bool:
    """Whether the last three runs are at most 5 % faster than the three before, by their
    medians."""
    if len(times) < 2 * WARM_UP_WINDOW:
        return False
    # Medians, so that one slow run does not keep a session from being warm.
    before, last = times[-2 * WARM_UP_WINDOW : -WARM_UP_WINDOW], times[-WARM_UP_WINDOW:]
    return float(np.median(last)) >= (1 - WARM_UP_TOLERANCE) * float(np.median(before))


def _latency(batch: int, by_round: list[NDArray[np.float64]]) -> Latency:
    # Over all rounds: a percentile of few runs would be the slowest of them.
    p50, p90, p99 = np.percentile(np.concatenate(by_round), [50, 90, 99])
    return Latency(
        batch,
        float(p50),
        float(p90),
        float(p99),
        1e3 * batch / float(p50),
        tuple(float(np.median(times)) for times in by_round),
    )


def _throughput(threads: int, batches: Sequence[int], samples: Samples) -> list[Throughput]:
    """The throughput at each batch size, of a session with that many threads."""
    # Images over the whole time of a round, not over the median: a server pays for slow runs too.
    rates = [
        [1e3 * batch * len(times) / times.sum() for times in by_round]
        for batch, by_round in zip(batches, samples, strict=True)
    ]
    return [
        Throughput(batch, threads, float(np.median(by_round)))
        for batch, by_round in zip(batches, rates, strict=True)
    ]
