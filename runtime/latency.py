"""Latency of several models, compared fairly on a machine that is never quiet.

Rounds: in each, every model is opened, warmed up, timed and closed in turn, so that only one session lives at a time (the spinning
threads of another would slow it) and slow spells of the machine fall on all models alike. A ratio is the median over rounds of the ratio
of the two models' median times within a round; percentiles are over all runs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.session import Model, SessionSettings

WARM_UP_RUNS = 5
MIN_RUNS, MAX_RUNS = 5, 200


@dataclass(frozen=True)
class Latency:
    """Time of one forward of a batch, in milliseconds, and images per second at the median. rounds_ms: median of each round."""

    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    rounds_ms: tuple[float, ...]

    def ratio_to(self, other: "Latency") -> float:
        """Tell this model's time over the other's, both measured in the same rounds."""
        return float(np.median(np.divide(self.rounds_ms, other.rounds_ms)))


class TimedModel(Protocol):
    """An open file, under any runtime."""

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [batch, classes] of inputs [batch, channels, height, width]."""

    def random_input(self, batch: int) -> NDArray[np.float32]:
        """Noise in the shape of the input."""


def measure_latency(
    paths: Sequence[Path],
    batches: Sequence[int],
    settings: SessionSettings,
    rounds: int,
    seconds: float,
    model_done: Callable[[], None] = lambda: None,
    open_model: Callable[[Path, SessionSettings], TimedModel] = Model,
) -> list[list[Latency]]:
    """For each path, for each batch size, the latency. seconds: time spent on each model, batch size and round, without the warm-up;
    model_done: called `rounds · len(paths)` times; open_model: what opens a path, where not all run under ONNX Runtime."""
    samples: list[list[list[NDArray[np.float64]]]] = [[[] for _ in batches] for _ in paths]
    for _ in range(rounds):
        for index, path in enumerate(paths):
            model = open_model(path, settings)
            for slot, batch in enumerate(batches):
                samples[index][slot].append(_time(model, model.random_input(batch), seconds))
            del model
            model_done()
    return [[_latency(batch, by_round) for batch, by_round in zip(batches, by_batch, strict=True)] for by_batch in samples]


def _time(model: TimedModel, pixels: NDArray[np.float32], seconds: float) -> NDArray[np.float64]:
    """Milliseconds of single runs."""
    for _ in range(WARM_UP_RUNS):
        model.run(pixels)
    times: list[float] = []
    while len(times) < MIN_RUNS or (sum(times) < 1e3 * seconds and len(times) < MAX_RUNS):
        start = time.perf_counter()
        model.run(pixels)
        times.append(1e3 * (time.perf_counter() - start))
    return np.array(times)


def _latency(batch: int, by_round: list[NDArray[np.float64]]) -> Latency:
    p50, p90, p99 = np.percentile(np.concatenate(by_round), [50, 90, 99])
    return Latency(
        batch, float(p50), float(p90), float(p99), 1e3 * batch / float(p50), tuple(float(np.median(times)) for times in by_round)
    )
