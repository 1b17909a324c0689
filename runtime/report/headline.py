"""What a page of the bench begins with: what each candidate gains and what it costs, in a sentence
and in the numbers that decide. And how a page writes numbers."""

from collections.abc import Sequence

from runtime.measure.accuracy import Accuracy, BaselineDrop
from runtime.measure.measured import KNN_TOP1, TOP1, MeasuredModel, Score

ACCURACIES = {TOP1: "top-1 accuracy", KNN_TOP1: "k-NN top-1 accuracy"}
"""Scores that count right answers, in words."""


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point, a true minus sign and no negative zero; – for None."""
    if value is None:
        return "–"
    # Adding 0.0 makes -0.0 positive.
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share 0 … 1, or a difference of two, in percent."""
    return number(None if share is None else 100 * share, 1)


def top1(accuracy: Accuracy | None) -> str:
    """Top-1 in percent with its 95 % interval; – without an accuracy."""
    return (
        "–" if accuracy is None else _interval(accuracy.top1_low, accuracy.top1, accuracy.top1_high)
    )


def top5(accuracy: Accuracy) -> str:
    """Top-5 in percent with its 95 % interval."""
    return _interval(accuracy.top5_low, accuracy.top5, accuracy.top5_high)


def _interval(low: float, share: float, high: float) -> str:
    return f"{percent(share)} ({percent(low)}–{percent(high)})"


def scored(model: MeasuredModel) -> str:
    """The score with its 95 % interval: a share in percent, a cosine as it is; – without a
    score."""
    score = model.score
    if score is None:
        return "–"
    if score.right is not None:
        return _interval(score.low, score.value, score.high)
    low, value, high = (number(end, 4) for end in (score.low, score.value, score.high))
    return f"{value} ({low}–{high})"


def measure_of(models: Sequence[MeasuredModel]) -> str:
    """What the models of a report are ranked by, with its unit."""
    scores = [model.score for model in models if model.score is not None]
    if not scores:
        return f"{TOP1} %"
    return scores[0].measure + ("" if scores[0].right is None else " %")


def meaning_of(models: Sequence[MeasuredModel], images: str) -> str:
    """What the score of the models says, as a sentence. images: how many of which folder."""
    measures = {model.score.measure for model in models if model.score is not None}
    if TOP1 in measures:
        return f"Share of {images} whose best class is the right one."
    if KNN_TOP1 in measures:
        return f"Share of {images} for whose class the 20 nearest images vote."
    if any(model.agreement is not None for model in models):
        return f"Share of {images} to which the model gives the class that fp32 gives them."
    return f"Cosine of what the model and fp32 give, mean over {images}."


def sentence(model: MeasuredModel, reference: MeasuredModel | None) -> str:
    """What a candidate gains and what it costs."""
    first = model.latency[0]
    # Without a baseline there is nothing to be smaller or faster than.
    gain = f"takes {number(model.size_bytes / 1e6)} MB, and {number(first.p50_ms)} ms"
    if reference is not None:
        smaller, faster = _gains(model, reference)
        gain = f"is {smaller} smaller than {reference.name}, and {faster} as fast"
    start = f"{model.name} {gain} at batch {first.batch}."
    # What it gains means nothing if it answers nothing.
    if model.not_finite is not None:
        return f"{start} It {model.not_finite.sentence}."
    return start if model.score is None else f"{start} {_answers(model, model.score)}"


def _answers(model: MeasuredModel, score: Score) -> str:
    """A sentence about how right a model answers."""
    against = model.against
    if model.agreement is not None:
        share = f"{percent(score.value)} % of {score.images:,} images"
        return f"It gives {share} the class that fp32 gives them."
    if score.measure not in ACCURACIES:
        what = "embeddings" if model.embedding is not None else "outputs"
        return f"Its {what} have a mean cosine of {scored(model)} with those of fp32."
    accuracy = ACCURACIES[score.measure]
    if against is None:
        return f"Its {accuracy} is {scored(model)} %."
    # A loss is claimed only if the interval shows one.
    if against.drop_low <= 0 <= against.drop_high:
        return (
            f"Its {accuracy} is {percent(score.value)} %, which {score.images:,} images cannot "
            f"tell from that of {against.baseline}."
        )
    # A gain is told as one, and not as a negative loss.
    change = "loses" if against.drop > 0 else "gains"
    points = f"{percent(abs(against.drop))} points of {accuracy}"
    return f"It {change} {points} against {against.baseline}."


def key_numbers(
    model: MeasuredModel, reference: MeasuredModel | None
) -> list[tuple[str, str, str]]:
    """The numbers that decide, each with what it counts and what it rests on."""
    first = model.latency[0]
    size, time = f"{number(model.size_bytes / 1e6)} MB", f"{number(first.p50_ms)} ms"
    batch = f"at batch {first.batch}"
    gains = [(size, "file", model.flavor), (time, f"one forward {batch}", "median")]
    if reference is not None:
        smaller, faster = _gains(model, reference)
        other_size = f"{reference.name} {number(reference.size_bytes / 1e6)} MB"
        other_time = f"{reference.name} {number(reference.latency[0].p50_ms)} ms"
        gains = [
            (smaller, "smaller", f"{size}, {other_size}"),
            (faster, f"as fast {batch}", f"{time}, {other_time}"),
        ]
    bits = (number(model.bits_per_weight), "bits a weight", "with scales and zero points")
    return [*gains, _accuracy_number(model), bits]


def _accuracy_number(model: MeasuredModel) -> tuple[str, str, str]:
    """The drop if there is a baseline, else the score."""
    score, against = model.score, model.against
    if score is None:
        why = "not measured" if model.not_finite is None else "its outputs are NaN or infinite"
        return "–", "top-1 accuracy", why
    if model.agreement is not None:
        return f"{percent(score.value)} %", "with fp32's class", f"of {score.images:,} images"
    if score.measure not in ACCURACIES:
        ends = f"{number(score.low, 4)} to {number(score.high, 4)}"
        return number(score.value, 4), score.measure, f"95 % interval {ends}"
    if against is not None:
        return _drop_number(against, score)
    basis = _bounds(score.low, score.high)
    return f"{percent(score.value)} %", ACCURACIES[score.measure], basis


def _drop_number(against: BaselineDrop, score: Score) -> tuple[str, str, str]:
    basis = _bounds(against.drop_low, against.drop_high)
    return percent(against.drop), f"points of {score.measure} lost", basis


def _bounds(low: float, high: float) -> str:
    return f"95 % interval {percent(low)} to {percent(high)}"


def _gains(model: MeasuredModel, reference: MeasuredModel) -> tuple[str, str]:
    """How many times smaller than the reference, and as fast at the first batch size."""
    ratio = model.latency[0].ratio(reference.flavor)
    assert ratio is not None  # the reference was measured
    gains = (reference.size_bytes / model.size_bytes, 1 / ratio)
    # A factor below one needs a digit more to say as much.
    smaller, faster = (f"{number(gain, 1 if gain >= 1 else 2)} ×" for gain in gains)
    return smaller, faster
