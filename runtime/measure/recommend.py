"""Which candidate to take for size, latency or accuracy: a pure function of what was measured.

The best by a criterion is not alone if the difference is noise. Then the next criterion decides
among the candidates that are level with it, in the order size, latency, accuracy and round again.
Level are

- sizes within 1 %,
- latencies at the first batch size, if the other was at least as fast in one round or more: if the
  two were equally fast, five rounds would all fall to one side once in sixteen runs,
- accuracies, if the 95 % interval of the paired drop from the best includes 0
  (runtime/measure/accuracy.py). What counts as accuracy is `MeasuredModel.score`: top-1, the top-1
  of k-NN, the agreement with fp32, or a cosine. Cosines are level if their intervals meet, which
  takes more to tell them apart than pairs would.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import paired_drop
from runtime.measure.measured import MeasuredModel, Score
from runtime.records import Record

SIZE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Recommendation(Record):
    """The candidate to take by one criterion. value: by which it is the best."""

    name: str
    flavor: str
    value: float
    sentence: str


@dataclass(frozen=True)
class Criterion:
    """A way to compare models."""

    # Said of the best.
    superlative: str
    # What is compared; sign: 1 if less is better, -1 if more is.
    value: Callable[[MeasuredModel], float]
    sign: int
    # Whether a model (second) is level with the best (first).
    level: Callable[[MeasuredModel, MeasuredModel], bool]
    # The value in words.
    figure: Callable[[MeasuredModel], str]

    def best(self, models: Sequence[MeasuredModel]) -> MeasuredModel:
        """The best, the first of several."""
        return min(models, key=lambda model: self.sign * self.value(model))

    def level_with_best(self, models: Sequence[MeasuredModel]) -> list[MeasuredModel]:
        """The best, and those from which only noise tells it apart."""
        best = self.best(models)
        return [model for model in models if model is best or self.level(best, model)]

    def named(self, model: MeasuredModel) -> str:
        """A model with its value."""
        return f"{model.name}, {self.figure(model)}"


def recommend(models: Sequence[MeasuredModel]) -> dict[str, Recommendation]:
    """For each criterion the candidate to take; empty if no candidate's answers could be judged."""
    # A model that answers nothing is recommended for nothing, however small and fast it is.
    candidates = [model for model in models if model.is_candidate and model.score is not None]
    return {name: _recommended(name, candidates) for name in CRITERIA} if candidates else {}


def _recommended(name: str, candidates: list[MeasuredModel]) -> Recommendation:
    first, *others = _from(name)
    # The first criterion is the one that the user reads about.
    criterion = CRITERIA[first]
    level = criterion.level_with_best(candidates)
    # The next criteria see only the models that the ones before could not tell apart.
    rest, decided = level, None
    for other in others:
        if len(rest) > 1:
            rest, decided = CRITERIA[other].level_with_best(rest), other
    chosen = criterion.best(rest)
    # A criterion has decided only if it left a single model.
    reason = f"{decided} decides" if decided and len(rest) == 1 else "nothing tells them apart"
    sentence = _sentence(criterion, chosen, level, candidates, reason)
    return Recommendation(chosen.name, chosen.flavor, criterion.value(chosen), sentence)


def _from(name: str) -> list[str]:
    """All criteria in their order, beginning with one of them."""
    names = list(CRITERIA)
    # Round again: size, latency, accuracy, size, …
    start = names.index(name)
    return names[start:] + names[:start]


def _sentence(
    criterion: Criterion,
    chosen: MeasuredModel,
    level: list[MeasuredModel],
    candidates: list[MeasuredModel],
    reason: str,
) -> str:
    """The choice, and what it is level with; if it stands alone, the next best."""
    said = f"{criterion.superlative}: {criterion.named(chosen)}"
    if len(candidates) == 1:
        return f"{said}, the only candidate"
    # The best is alone: the next best shows by how much.
    if len(level) == 1:
        second = criterion.best([model for model in candidates if model is not chosen])
        return f"{said}; next {criterion.named(second)}"
    peers = " and ".join(criterion.named(model) for model in level if model is not chosen)
    return f"{said}; within noise of {peers}: {reason}"


def _round_ratio(best: MeasuredModel, model: MeasuredModel) -> NDArray[np.float64]:
    """Time of the model over that of the best in each round, at the first batch size, [rounds]."""
    ratio: NDArray[np.float64] = np.divide(model.latency[0].rounds_ms, best.latency[0].rounds_ms)
    return ratio


def _latency_figure(model: MeasuredModel) -> str:
    first = model.latency[0]
    ratio = "" if first.ratio_fp32 is None else f" ({first.ratio_fp32:.2f} × fp32)"
    return f"{first.p50_ms:.2f} ms at batch {first.batch}{ratio}"


def _score_of(model: MeasuredModel) -> Score:
    # Models without a score are no candidates of a recommendation.
    assert model.score is not None
    return model.score


def _equally_right(best: Score, score: Score) -> bool:
    if best.right is None or score.right is None:
        return score.high >= best.low
    return paired_drop(best.right, score.right).drop_low <= 0


# In the order in which they decide.
CRITERIA = {
    "size": Criterion(
        "smallest",
        value=lambda model: model.size_bytes,
        sign=1,
        level=lambda best, model: model.size_bytes <= (1 + SIZE_TOLERANCE) * best.size_bytes,
        figure=lambda model: f"{model.size_bytes / 1e6:.2f} MB",
    ),
    "latency": Criterion(
        "fastest",
        value=lambda model: model.latency[0].p50_ms,
        sign=1,
        level=lambda best, model: bool(_round_ratio(best, model).min() <= 1),
        figure=_latency_figure,
    ),
    "accuracy": Criterion(
        "most accurate",
        value=lambda model: _score_of(model).value,
        sign=-1,
        level=lambda best, model: _equally_right(_score_of(best), _score_of(model)),
        figure=lambda model: _score_of(model).figure,
    ),
}
