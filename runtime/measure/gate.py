"""The accuracy gate: does a model lose at most so many points of top-1 against its baseline?

    held       the upper end of the drop's 95 % interval is within the limit
    failed     the lower end is beyond it
    undecided  the limit lies inside the interval: the images are too few to tell

How many images would tell: the score T at the limit grows with the root of their number as long as
the shares stay as they are, so that n (1.96 / T)² images bring the interval's end to the limit."""

import math
from typing import Any

from runtime.errors import BenchError, GateError
from runtime.measure.accuracy import NORMAL_95, drop_score


def judge(models: list[dict[str, Any]], max_drop: float) -> dict[str, Any]:
    """The verdict on each candidate, as JSON. models: as in the bench's report; max_drop: in
    points, hundredths of a share.

    images_needed: None where a verdict was found, or where the drop found is the limit itself,
    which no number of images would part."""
    candidates = [model for model in models if model["role"] == "candidate"]
    if any(model["accuracy"]["against"] is None for model in candidates):
        raise BenchError("an accuracy gate needs a baseline: pass --baseline fp32")
    baseline = next((model["accuracy"]["against"]["baseline"] for model in candidates), None)
    return {
        "max_drop": max_drop,
        "baseline": baseline,
        "models": [_verdict(model, max_drop) for model in candidates],
    }


def _verdict(model: dict[str, Any], max_drop: float) -> dict[str, Any]:
    accuracy, limit = model["accuracy"], max_drop / 100
    against, images = accuracy["against"], accuracy["images"]
    low, drop, high = (100 * against[key] for key in ("drop_low", "drop", "drop_high"))
    found = f"{drop:.1f} points ({low:.1f}…{high:.1f}) against {against['baseline']}"
    needed = None
    if against["drop_high"] <= limit:
        verdict, sentence = "held", f"loses {found}, within {max_drop:g}"
    elif against["drop_low"] > limit:
        verdict, sentence = "failed", f"loses {found}, more than {max_drop:g}"
    else:
        needed = images_needed(against, images, limit)
        enough = (
            "no number of images would tell"
            if needed is None
            else f"about {_rounded(needed):,} would tell"
        )
        verdict, sentence = (
            "undecided",
            f"loses {found}: {images:,} images are too few to hold that against {max_drop:g}; "
            f"{enough}",
        )
    return {
        "name": model["name"],
        "verdict": verdict,
        "sentence": f"{verdict}: {model['name']} {sentence}",
        "images_needed": needed,
    }


def images_needed(against: dict[str, Any], images: int, limit: float) -> int | None:
    """With how many images the limit leaves the interval, should the shares stay as they are.
    limit: a share."""
    score = drop_score(against["only_baseline"], against["only_model"], images, limit)
    return math.ceil(images * (NORMAL_95 / score) ** 2) if score else None


def undecided(gate: dict[str, Any]) -> list[str]:
    """A sentence about the candidates that too few images decide; none if all are decided."""
    names = _named(gate, "undecided")
    return (
        [f"the gate of {gate['max_drop']:g} points is undecided for {names}: too few images"]
        if names
        else []
    )


def demand_held(gate: dict[str, Any]) -> None:
    """Raise GateError if a candidate failed."""
    names = _named(gate, "failed")
    if names:
        raise GateError(
            f"{names} lost more than {gate['max_drop']:g} points against {gate['baseline']}"
        )


def _named(gate: dict[str, Any], verdict: str) -> str:
    return ", ".join(model["name"] for model in gate["models"] if model["verdict"] == verdict)


def _rounded(number: int) -> int:
    """Two leading digits, upwards."""
    unit = int(10 ** max(0, len(str(number)) - 2))
    return -(-number // unit) * unit
