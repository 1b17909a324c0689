"""The accuracy gate: does a model lose at most so many points of top-1 against its baseline?

    held       the upper end of the drop's 95 % interval is within the limit
    failed     the lower end is beyond the limit, or the model's logits are NaN or infinite
    undecided  the limit lies inside the interval: the images are too few to tell; or no baseline
               gives finite logits

How many images would tell: the score T at the limit (runtime/measure/accuracy.py) grows with the
root of their number as long as the shares stay as they are. So n (1.96 / T)² images bring an end of
the interval to the limit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.errors import GateError
from runtime.measure.accuracy import NORMAL_95, PairedDrop, drop_score
from runtime.measure.measured import BaselineDrop, MeasuredModel
from runtime.records import Record

Outcome = Literal["held", "failed", "undecided"]


@dataclass(frozen=True)
class Verdict(Record):
    """The verdict on one candidate."""

    name: str
    verdict: Outcome
    sentence: str
    # Number of images that would decide; None if a verdict was found, and if the drop that was
    # found is the limit itself, which no number of images would tell apart.
    images_needed: int | None


@dataclass(frozen=True)
class Gate(Record):
    """The verdicts on all candidates. max_drop: the limit, in points, hundredths of a share."""

    max_drop: float
    baseline: str | None
    models: tuple[Verdict, ...]

    @property
    def warnings(self) -> list[str]:
        """A sentence if candidates are undecided."""
        names = self._names("undecided")
        why = "too few images" if self.baseline is not None else "no baseline gives numbers"
        undecided = f"the gate of {self.max_drop:g} points is undecided for {names}: {why}"
        return [undecided] if names else []

    def demand(self) -> None:
        """Raise GateError if a candidate failed."""
        names = self._names("failed")
        if names:
            against = "" if self.baseline is None else f" against {self.baseline}"
            raise GateError(f"{names} lost more than {self.max_drop:g} points{against}")

    def _names(self, outcome: Outcome) -> str:
        return ", ".join(model.name for model in self.models if model.verdict == outcome)


def hold_against_limit(models: Sequence[MeasuredModel], max_drop: float) -> Gate:
    """The verdict on each candidate. max_drop: in points."""
    candidates = [model for model in models if model.is_candidate]
    drops = [model.against for model in candidates]
    baseline = next((drop.baseline for drop in drops if drop is not None), None)
    verdicts = tuple(_verdict_on(model, max_drop) for model in candidates)
    return Gate(max_drop, baseline, verdicts)


def _verdict_on(model: MeasuredModel, max_drop: float) -> Verdict:
    accuracy = model.accuracy
    # Answers that are no numbers are wrong answers, whatever the baseline says.
    if model.not_finite is not None:
        return _said(model.name, "failed", model.not_finite.sentence)
    if accuracy is None or accuracy.against is None:
        return _said(model.name, "undecided", "has no baseline with finite logits to be held to")
    return _verdict(model.name, accuracy.against, accuracy.images, max_drop)


def _verdict(name: str, against: BaselineDrop, images: int, max_drop: float) -> Verdict:
    limit = max_drop / 100
    low, drop, high = (100 * x for x in (against.drop_low, against.drop, against.drop_high))
    found = f"loses {drop:.1f} points ({low:.1f}…{high:.1f}) against {against.baseline}"
    # The whole interval lies within the limit.
    if against.drop_high <= limit:
        return _said(name, "held", f"{found}, within {max_drop:g}")
    # The whole interval lies beyond the limit.
    if against.drop_low > limit:
        return _said(name, "failed", f"{found}, more than {max_drop:g}")
    # The limit lies inside the interval: more images would make it narrower.
    needed = images_needed(against, images, limit)
    enough = (
        "no number of images would tell"
        if needed is None
        else f"about {_rounded(needed):,} would tell"
    )
    too_few = f"{images:,} images are too few to hold that against {max_drop:g}"
    return _said(name, "undecided", f"{found}: {too_few}; {enough}", needed)


def _said(name: str, outcome: Outcome, sentence: str, needed: int | None = None) -> Verdict:
    return Verdict(name, outcome, f"{outcome}: {name} {sentence}", needed)


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
