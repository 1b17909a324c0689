"""What the models of a bench answer, and how right that is.

A model whose logits are NaN or infinite for one image has no accuracy: its numbers overflow, and
top-1 of the images that are left would flatter it. The operator that overflows is looked for
instead (runtime/measure/overflow.py). The other models are measured as if it were not there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import (
    Logits,
    divergence,
    hits,
    measure_accuracy,
    paired_drop,
)
from runtime.measure.measured import (
    Agreement,
    BaselineDrop,
    ComparedAccuracy,
    Entry,
    NotFinite,
)
from runtime.measure.overflow import first_overflow
from runtime.session import Model, SessionSettings

NO_TARGET = -1
"""The target of every image if the images have no labels."""

# Preprocessed inputs [batch, channels, height, width] and targets [batch].
Batches = Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True)
class Answers:
    """Logits of one model, [images, classes], and the first image [1, channels, height, width] for
    which they are not finite, or None."""

    logits: Logits
    failing: NDArray[np.float32] | None

    @property
    def finite(self) -> bool:
        """Whether every logit of every image is a number."""
        return self.failing is None


def predict(
    entries: Sequence[Entry],
    batches: Batches,
    settings: SessionSettings,
    images_done: Callable[[int], None],
) -> tuple[dict[Path, Answers], NDArray[np.int64]]:
    """Answers of every model by its file, and the targets [images]. The images are read once.

    images_done: called with the number of images of each batch.
    """
    # All sessions are open at once here, since nothing is timed.
    models = {entry.file: Model(entry.file, settings) for entry in entries}
    logits: dict[Path, list[Logits]] = {path: [] for path in models}
    failing: dict[Path, NDArray[np.float32]] = {}
    targets = []
    for pixels, labels in batches:
        targets.append(labels)
        for path, model in models.items():
            found = model.run(pixels)
            logits[path].append(found)
            # One image is enough to find out which operator overflows.
            wrong = np.flatnonzero(~_are_finite(found))
            if len(wrong):
                failing.setdefault(path, pixels[wrong[:1]])
        images_done(len(labels))
    answers = {
        path: Answers(np.concatenate(parts), failing.get(path)) for path, parts in logits.items()
    }
    return answers, np.concatenate(targets)


def _are_finite(logits: Logits) -> NDArray[np.bool_]:
    """Whether all logits of an image are finite, [images]."""
    numbers = np.isfinite(logits).reshape(len(logits), -1)
    finite: NDArray[np.bool_] = np.logical_and.reduce(numbers, axis=1)
    return finite


def accuracies(
    entries: Sequence[Entry], answers: dict[Path, Answers], targets: NDArray[np.int64]
) -> list[ComparedAccuracy | None]:
    """Accuracy of each model, and what it loses against the baseline; None for a model whose logits
    are not finite, to which nothing is compared either, and for all models without targets."""
    if (targets == NO_TARGET).all():
        return [None] * len(entries)
    finite = [entry for entry in entries if answers[entry.file].finite]
    logits = {entry.file: answers[entry.file].logits for entry in finite}
    # What agreement and divergence are measured from; None if no float32 model is measured.
    float32 = next((logits[entry.file] for entry in finite if entry.flavor == "fp32"), None)
    baselines = [entry for entry in finite if entry.role == "baseline"]
    # Losses are counted from float32 if it was measured, and else from the first baseline.
    baselines.sort(key=lambda entry: entry.flavor != "fp32")
    rows: list[ComparedAccuracy | None] = []
    for entry in entries:
        if entry not in finite:
            rows.append(None)
            continue
        # Pairs, and not differences of shares: the images are the same.
        right, against = hits(logits[entry.file], targets), None
        if baselines and entry is not baselines[0]:
            drop = paired_drop(hits(logits[baselines[0].file], targets), right)
            against = BaselineDrop(**vars(drop), baseline=baselines[0].name)
        accuracy = measure_accuracy(logits[entry.file], targets, float32)
        # A bit for each image: hits of 50,000 images take 12 kB in the report.
        packed = np.packbits(right).tobytes().hex()
        rows.append(ComparedAccuracy(**vars(accuracy), against=against, hits=packed))
    return rows


def agreements(
    entries: Sequence[Entry], answers: dict[Path, Answers], targets: NDArray[np.int64]
) -> list[Agreement | None]:
    """How alike each model and the float32 model answer, if there are no targets; None if there
    are, if there is no such model, for features, and for logits that are not finite."""
    float32 = next((entry for entry in entries if entry.flavor == "fp32"), None)
    logits = {file: found.logits for file, found in answers.items() if found.finite}
    # The largest of a model's features names no class.
    classes = all(entry.has_classes for entry in entries)
    if float32 is None or float32.file not in logits or not classes or (targets >= 0).any():
        return [None] * len(entries)
    reference = logits[float32.file]
    return [
        Agreement(
            agreement=float((found.argmax(1) == reference.argmax(1)).mean()),
            divergence=divergence(reference, found),
            images=len(found),
        )
        if (found := logits.get(entry.file)) is not None
        else None
        for entry in entries
    ]


def not_finite(file: Path, answers: Answers) -> NotFinite | None:
    """How many images have no finite logits, and why; None if all have."""
    if answers.failing is None:
        return None
    images = int((~_are_finite(answers.logits)).sum())
    return NotFinite(images, first_overflow(file, answers.failing))
