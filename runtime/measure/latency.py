"""Latency and throughput of several models, compared fairly on a machine that is never quiet.

Rounds: in each, every session is opened, warmed up, timed and closed in turn, so that only one
lives at a time (the spinning threads of another would slow it) and slow spells of the machine fall
on all alike. A ratio is the median over rounds of the ratio of the two models' median times within
a round; percentiles are over all runs. Throughput is images in the time of a round's runs, back to
back, the median over rounds; load time is that of creating the session, the median over rounds, the
file being in the system's cache after the first.

Warm-up: runs until the median of the last three is not more than 5 % below that of the three
before, six at least and thirty at most. What is left is noise, which the rounds deal with, or a
machine that does not settle.

On CUDA and TensorRT a run begins and ends on the device (see `Model.forward`). That path has not
been timed on a device yet."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.session import Model, SessionSettings

WARM_UP_WINDOW, WARM_UP_TOLERANCE, MAX_WARM_UP = 3, 0.05, 30
MIN_RUNS, MAX_RUNS = 5, 200


@dataclass(frozen=True)
class Latency:
    """Time of one forward of a batch, in milliseconds, and images per second at the median.
    rounds_ms: median of each round."""

    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    rounds_ms: tuple[float, ...]

    def ratio_to(self, other: "Latency") -> float:
        """Tell this model's time over the other's, both measured in the same rounds."""
        return float(np.median(np.divide(self.rounds_ms, other.rounds_ms)))


@dataclass(frozen=True)
class Speed:
    """Of one model: the latency at each batch size, and how long its session takes to create, in
    milliseconds."""

    latency: tuple[Latency, ...]
    load_ms: float


@dataclass(frozen=True)
class Throughput:
    """Images per second of one model at a batch size and a number of threads."""

    batch: int
    threads: int
    images_per_s: float


@dataclass(frozen=True)
class Plan:
    """How to measure. batches: batch sizes; rounds: how often each session is opened; seconds: time
    spent in each on each batch size, without the warm-up."""

    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seconds: float = 1.0


Samples = list[list[NDArray[np.float64]]]
"""Milliseconds of single runs of one session: [batch size][round] → [runs]."""


class TimedModel(Protocol):
    """An open file, under any runtime."""

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
    """Latency and load time of each path. session_done: called `plan.rounds · len(paths)` times;
    open_model: what opens a path, where not all run under ONNX Runtime."""
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
    """Throughput of each path at each batch size and number of threads, whatever `settings` has for
    threads. session_done: called `plan.rounds · len(paths) · len(threads)` times."""
    sessions = [(path, replace(settings, threads=number)) for path in paths for number in threads]
    measured = iter(_interleaved(sessions, plan, session_done, Model))
    return [
        [row for number in threads for row in _throughput(number, plan.batches, next(measured)[0])]
        for _ in paths
    ]


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and the most itself."""
    powers = tuple(2**exponent for exponent in range(most.bit_length()))
    return powers if powers[-1] == most else (*powers, most)


def _interleaved(
    sessions: Sequence[tuple[Path, SessionSettings]],
    plan: Plan,
    session_done: Callable[[], None],
    open_model: Callable[[Path, SessionSettings], TimedModel],
) -> list[tuple[Samples, list[float]]]:
    """For each session its samples, and the milliseconds that its creation took in each round."""
    measured: list[tuple[Samples, list[float]]] = [
        ([[] for _ in plan.batches], []) for _ in sessions
    ]
    for _ in range(plan.rounds):
        for (path, settings), (samples, loads) in zip(sessions, measured, strict=True):
            start = time.perf_counter()
            model = open_model(path, settings)
            loads.append(1e3 * (time.perf_counter() - start))
            for batch, by_round in zip(plan.batches, samples, strict=True):
                by_round.append(_time(model.forward(model.random_input(batch)), plan.seconds))
            del model
            session_done()
    return measured


def _time(forward: Callable[[], None], seconds: float) -> NDArray[np.float64]:
    """Milliseconds of single runs, warm."""

    def timed() -> float:
        start = time.perf_counter()
        forward()
        return 1e3 * (time.perf_counter() - start)

    warming: list[float] = []
    while len(warming) < MAX_WARM_UP and not is_warm(warming):
        warming.append(timed())
    times: list[float] = []
    while len(times) < MIN_RUNS or (sum(times) < 1e3 * seconds and len(times) < MAX_RUNS):
        times.append(timed())
    return np.array(times)


def is_warm(times: Sequence[float]) -> bool:
    """Whether the last runs are no faster than those before, but for the tolerance."""
    if len(times) < 2 * WARM_UP_WINDOW:
        return False
    before, last = times[-2 * WARM_UP_WINDOW : -WARM_UP_WINDOW], times[-WARM_UP_WINDOW:]
    return float(np.median(last)) >= (1 - WARM_UP_TOLERANCE) * float(np.median(before))


def _latency(batch: int, by_round: list[NDArray[np.float64]]) -> Latency:
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
    """A row a batch size, of a session with so many threads."""
    rates = [
        [1e3 * batch * len(times) / times.sum() for times in by_round]
        for batch, by_round in zip(batches, samples, strict=True)
    ]
    return [
        Throughput(batch, threads, float(np.median(by_round)))
        for batch, by_round in zip(batches, rates, strict=True)
    ]
