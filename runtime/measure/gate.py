"""The gates: does a model lose at most so many points of top-1 against its baseline, and are its
outputs near enough to those of the float32 model?

    held       the whole 95 % interval is on the good side of the limit
    failed     the whole interval is on the bad side, or the model's outputs are NaN or infinite
    undecided  the limit lies inside the interval: the images are too few to tell; or no baseline
               gives finite outputs

**Drop** (`max_drop`): of a classifier's top-1, or of the top-1 of k-NN with k = 20 for embeddings
of images with classes (runtime/measure/retrieval.py), on pairs. k = 20 and not 1, because the vote
of 20 images is what embeddings are usually judged by, and depends less on a single neighbour.

**Cosine** (`min_cosine`): the mean over the images of the cosine with the float32 model, for
embeddings and for each dense output (runtime/measure/cosines.py).

How many images would tell: a drop's score T at the limit (runtime/measure/accuracy.py) grows with
the root of their number as long as the shares stay as they are. So n (1.96 / T)² images bring an
end of the interval to the limit. Half the interval of a mean shrinks with that root: n (half /
distance from the limit)² images are enough.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.errors import GateError
from runtime.measure.accuracy import NORMAL_95, BaselineDrop, PairedDrop, drop_score
from runtime.measure.cosines import Cosines
from runtime.measure.measured import MeasuredModel, NotFinite
from runtime.records import Record

Outcome = Literal["held", "failed", "undecided"]
Demand = Literal["max_drop", "min_cosine"]
Reason = Literal["interval", "not finite", "no baseline"]


@dataclass(frozen=True)
class Limits:
    """What candidates are held to; None is not demanded.

    max_drop: points of top-1, hundredths of a share. min_cosine: -1 … 1.
    """

    max_drop: float | None = None
    min_cosine: float | None = None

    @property
    def any(self) -> bool:
        """Whether anything is demanded."""
        return self.max_drop is not None or self.min_cosine is not None


@dataclass(frozen=True)
class Verdict(Record):
    """The verdict on one candidate by one limit, and for a cosine on one of its outputs.

    reason: the interval of what was measured; or outputs that are NaN or infinite, or no baseline
        to be held to."""

    name: str
    demand: Demand
    verdict: Outcome
    reason: Reason
    sentence: str
    # Number of images that would decide; None if a verdict was found, and if what was found is the
    # limit itself, which no number of images would tell apart.
    images_needed: int | None


@dataclass(frozen=True)
class Gate(Record):
    """The verdicts on all candidates, and what they were held to."""

    max_drop: float | None
    min_cosine: float | None
    # What candidates are compared with; None if no baseline gives finite outputs.
    baseline: str | None
    models: tuple[Verdict, ...]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each limit that is undecided for a candidate."""
        causes: dict[Reason, str] = {
            "interval": "too few images",
            "no baseline": "no baseline gives numbers",
        }
        return [
            f"the gate of {limit} is undecided for {names}: {why}"
            for demand, limit in self._limits()
            for reason, why in causes.items()
            if (names := self._names(demand, "undecided", reason))
        ]

    def demand(self) -> None:
        """Raise GateError if a candidate failed."""
        against = "" if self.baseline is None else f" against {self.baseline}"
        failed = []
        for demand, limit in self._limits():
            if names := self._names(demand, "failed", "interval"):
                fails = "lost more than" if demand == "max_drop" else "is below"
                failed.append(f"{names} {fails} {limit}{against}")
            if names := self._names(demand, "failed", "not finite"):
                failed.append(f"{names} gives NaN or infinity")
        if failed:
            raise GateError("; ".join(dict.fromkeys(failed)))

    def _limits(self) -> Iterator[tuple[Demand, str]]:
        """What is demanded, with the limit in words."""
        if self.max_drop is not None:
            yield "max_drop", f"{self.max_drop:g} points"
        if self.min_cosine is not None:
            yield "min_cosine", f"a mean cosine of {self.min_cosine:g}"

    def _names(self, *wanted: str) -> str:
        """The models with a verdict of that demand, outcome and reason."""
        # A model with several outputs is named once.
        found = (one.name for one in self.models if (one.demand, one.verdict, one.reason) == wanted)
        return ", ".join(dict.fromkeys(found))


def hold_against_limits(models: Sequence[MeasuredModel], limits: Limits) -> Gate:
    """The verdict on each candidate, by each limit."""
    candidates = [model for model in models if model.is_candidate]
    drops = [model.against for model in candidates]
    baseline = next((drop.baseline for drop in drops if drop is not None), None)
    # Cosines are always taken with float32.
    if baseline is None and any(model.cosines for model in candidates):
        baseline = "fp32"
    verdicts: list[Verdict] = []
    for model in candidates:
        if limits.max_drop is not None:
            verdicts.append(_by_drop(model, limits.max_drop))
        if limits.min_cosine is not None:
            verdicts += _by_cosine(model, limits.min_cosine)
    return Gate(limits.max_drop, limits.min_cosine, baseline, tuple(verdicts))


def _by_drop(model: MeasuredModel, max_drop: float) -> Verdict:
    # Answers that are no numbers are wrong answers, whatever the baseline says.
    if model.not_finite is not None:
        return _not_finite(model.name, "max_drop", model.not_finite)
    against, score = model.against, model.score
    if against is None or score is None:
        why = "has no baseline with finite outputs to be held to"
        return _said(model.name, "max_drop", "undecided", why, reason="no baseline")
    return _on_drop(model.name, against, score.images, max_drop)


def _on_drop(name: str, against: BaselineDrop, images: int, max_drop: float) -> Verdict:
    limit = max_drop / 100
    low, drop, high = (100 * x for x in (against.drop_low, against.drop, against.drop_high))
    found = f"loses {drop:.1f} points ({low:.1f}…{high:.1f}) against {against.baseline}"
    # The whole interval lies within the limit.
    if against.drop_high <= limit:
        return _said(name, "max_drop", "held", f"{found}, within {max_drop:g}")
    # The whole interval lies beyond the limit.
    if against.drop_low > limit:
        return _said(name, "max_drop", "failed", f"{found}, more than {max_drop:g}")
    # The limit lies inside the interval: more images would make it narrower.
    needed = images_needed(against, images, limit)
    sentence = f"{found}: {_too_few(images, max_drop, needed)}"
    return _said(name, "max_drop", "undecided", sentence, needed)


def _by_cosine(model: MeasuredModel, min_cosine: float) -> list[Verdict]:
    """A verdict on each output."""
    if model.not_finite is not None:
        return [_not_finite(model.name, "min_cosine", model.not_finite)]
    if not model.cosines:
        why = "has no float32 model with finite outputs to be held to"
        return [_said(model.name, "min_cosine", "undecided", why, reason="no baseline")]
    return [
        _on_cosine(model.name, output, found, min_cosine) for output, found in model.cosines.items()
    ]


def _on_cosine(name: str, output: str, found: Cosines, limit: float) -> Verdict:
    low, mean, high = found.cosine_low, found.cosine, found.cosine_high
    said = f"has a mean cosine of {mean:.4f} ({low:.4f}…{high:.4f}) in {output}"
    if low >= limit:
        return _said(name, "min_cosine", "held", f"{said}, at least {limit:g}")
    if high < limit:
        return _said(name, "min_cosine", "failed", f"{said}, less than {limit:g}")
    # n' = n (half / distance)²; the lower half, because the upper one ends at 1.
    distance = abs(mean - limit)
    needed = math.ceil(found.images * ((mean - low) / distance) ** 2) if distance else None
    sentence = f"{said}: {_too_few(found.images, limit, needed)}"
    return _said(name, "min_cosine", "undecided", sentence, needed)


def _too_few(images: int, limit: float, needed: int | None) -> str:
    enough = (
        "no number of images would tell"
        if needed is None
        else f"about {_rounded(needed):,} would tell"
    )
    return f"{images:,} images are too few to hold that against {limit:g}; {enough}"


def _not_finite(name: str, demand: Demand, found: NotFinite) -> Verdict:
    return _said(name, demand, "failed", found.sentence, reason="not finite")


def _said(
    name: str,
    demand: Demand,
    outcome: Outcome,
    sentence: str,
    needed: int | None = None,
    reason: Reason = "interval",
) -> Verdict:
    return Verdict(name, demand, outcome, reason, f"{outcome}: {name} {sentence}", needed)


def images_needed(against: PairedDrop, images: int, limit: float) -> int | None:
    """Number of images with which the limit leaves the interval, if the shares stay as they are.

    against: found with `images` images. limit: a share. None if the drop is the limit itself.
    """
    # T at the limit grows with √n: T √(n' / n) = 1.96 gives n' = n (1.96 / T)².
    score = drop_score(against.only_baseline, against.only_model, images, limit)
    return math.ceil(images * (NORMAL_95 / score) ** 2) if score else None


def _rounded(number: int) -> int:
    """Two leading digits, upwards: the number is an estimate."""
    unit = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // unit) * unit
