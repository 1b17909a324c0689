"""Which candidate to take for size, for latency, for accuracy: a pure function of the bench's
report.

The best by a criterion is not alone where the difference is noise, and then the next criterion
decides among those that are level with it, in the order size, latency, accuracy and round again.
Level are

- sizes within 1 %,
- latencies, at the first batch size, where the other was at least as fast in one round or more:
were they the same, five rounds would all
  fall to one side once in sixteen runs,
- accuracies where the 95 % interval of the paired drop from the best includes 0
(runtime/measure/accuracy.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import paired_drop

SIZE_TOLERANCE = 0.01

Measured = dict[str, Any]
"""A model of the bench's report."""


@dataclass(frozen=True)
class Criterion:
    """superlative: of the best; value: as it stands in the report; sign: 1 where less is better, -1
    where more is; level: whether a model (second) is level with the best (first); figure: the value
    in words."""

    superlative: str
    value: Callable[[Measured], float]
    sign: int
    level: Callable[[Measured, Measured], bool]
    figure: Callable[[Measured], str]

    def best(self, models: list[Measured]) -> Measured:
        """The best, the first of several."""
        return min(models, key=lambda model: self.sign * self.value(model))


def recommend(models: list[Measured]) -> dict[str, dict[str, Any]]:
    """For each criterion the candidate to take, as JSON. models: as in the bench's report, one
    candidate at least."""
    candidates = [model for model in models if model["role"] == "candidate"]
    return {name: _recommended(name, candidates) for name in CRITERIA}


def _recommended(name: str, candidates: list[Measured]) -> dict[str, Any]:
    first, *others = _from(name)
    criterion = CRITERIA[first]
    level = _level_with_best(criterion, candidates)
    rest, decided = level, None
    for other in others:
        if len(rest) > 1:
            rest, decided = _level_with_best(CRITERIA[other], rest), other
    chosen = criterion.best(rest)
    return {
        "name": chosen["name"],
        "flavor": chosen["flavor"],
        "value": criterion.value(chosen),
        "sentence": _sentence(
            criterion, chosen, level, candidates, decided if len(rest) == 1 else None
        ),
    }


def _from(name: str) -> list[str]:
    """All criteria in their order, from one on."""
    names = list(CRITERIA)
    start = names.index(name)
    return names[start:] + names[:start]


def _level_with_best(criterion: Criterion, models: list[Measured]) -> list[Measured]:
    best = criterion.best(models)
    return [model for model in models if model is best or criterion.level(best, model)]


def _sentence(
    criterion: Criterion,
    chosen: Measured,
    level: list[Measured],
    candidates: list[Measured],
    decided: str | None,
) -> str:
    """The choice, and what it is level with or, where it stands alone, the next best."""
    said = f"{criterion.superlative}: {_named(criterion, chosen)}"
    if len(candidates) == 1:
        return f"{said}, the only candidate"
    if len(level) == 1:
        second = criterion.best([model for model in candidates if model is not chosen])
        return f"{said}; next {_named(criterion, second)}"
    peers = " and ".join(_named(criterion, model) for model in level if model is not chosen)
    reason = f"{decided} decides" if decided else "nothing tells them apart"
    return f"{said}; within noise of {peers}: {reason}"


def _named(criterion: Criterion, model: Measured) -> str:
    return f"{model['name']}, {criterion.figure(model)}"


def _round_ratio(best: Measured, model: Measured) -> NDArray[np.float64]:
    """Of the model's time to the best's in each round, at the first batch size."""
    ratio: NDArray[np.float64] = np.divide(
        model["latency"][0]["rounds_ms"], best["latency"][0]["rounds_ms"]
    )
    return ratio


def _latency_figure(model: Measured) -> str:
    row = model["latency"][0]
    ratio = "" if row["ratio_fp32"] is None else f" ({row['ratio_fp32']:.2f} × fp32)"
    return f"{row['p50_ms']:.2f} ms at batch {row['batch']}{ratio}"


def _hits(model: Measured) -> NDArray[np.bool_]:
    """Whether each image's top-1 is right, unpacked."""
    accuracy = model["accuracy"]
    packed = np.frombuffer(bytes.fromhex(accuracy["hits"]), np.uint8)
    return np.unpackbits(packed, count=accuracy["images"]).astype(bool)


def _accuracy_figure(model: Measured) -> str:
    accuracy = model["accuracy"]
    return f"top-1 {100 * accuracy['top1']:.1f} % ({100 * accuracy['top1_low']:.1f}–{100 * accuracy['top1_high']:.1f})"


CRITERIA = {
    "size": Criterion(
        "smallest",
        lambda model: model["size_bytes"],
        1,
        lambda best, model: model["size_bytes"] <= (1 + SIZE_TOLERANCE) * best["size_bytes"],
        lambda model: f"{model['size_bytes'] / 1e6:.2f} MB",
    ),
    "latency": Criterion(
        "fastest",
        lambda model: model["latency"][0]["p50_ms"],
        1,
        lambda best, model: bool(_round_ratio(best, model).min() <= 1),
        _latency_figure,
    ),
    "accuracy": Criterion(
        "most accurate",
        lambda model: model["accuracy"]["top1"],
        -1,
        lambda best, model: paired_drop(_hits(best), _hits(model)).drop_low <= 0,
        _accuracy_figure,
    ),
}
"""In the order in which they decide."""
