"""How right the answers of a bench's models are, and how far from those of the float32 model.

What can be told depends on what a model gives, and on whether the classes of the images are known:

    logits      classes known    accuracy: top-1 and top-5 (runtime/measure/accuracy.py)
                not known        agreement with the float32 model
    embeddings  in any case      likeness to the float32 model's (runtime/measure/embeddings.py)
                classes known    k-NN and retrieval too (runtime/measure/retrieval.py)
    dense       in any case      errors of each output (runtime/measure/dense.py)

Likeness, agreement and errors need the float32 model among the models. Losses are counted from
float32 if it was measured, and else from the first baseline. A model whose numbers are not finite
is compared with nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.measure.accuracy import (
    BaselineDrop,
    Logits,
    divergence,
    hits,
    hits_of,
    measure_accuracy,
    paired_drop,
)
from runtime.measure.answers import Answered, Answers
from runtime.measure.dense import OutputError
from runtime.measure.embedded import Embedded, Embedding, KnownClasses, compare_embeddings
from runtime.measure.images import NO_TARGET
from runtime.measure.measured import Agreement, ComparedAccuracy, Entry


@dataclass(frozen=True)
class Judgement:
    """What is known of one model's answers; None is not known, or not a matter of such a model."""

    accuracy: ComparedAccuracy | None = None
    agreement: Agreement | None = None
    embedding: Embedding | None = None
    outputs: tuple[OutputError, ...] = ()


def judge(
    entries: Sequence[Entry], answered: Answered, rows_done: Callable[[int], None]
) -> list[Judgement]:
    """A judgement of each model.

    rows_done: called with the number of embeddings of each chunk that was compared; for each model
    the images count once for likeness, and once for retrieval.
    """
    kinds = {one.kind for one in answered.answers.values()}
    # All models of a run are one model, so they give the same outputs.
    has_classes, gives_features = "classes" in kinds, "features" in kinds
    known = answered.targets.size > 0 and bool((answered.targets != NO_TARGET).any())
    nothing = [None] * len(entries)
    rights = accuracies(entries, answered) if has_classes and known else nothing
    alike = agreements(entries, answered) if has_classes and not known else nothing
    embedded = embeddings(entries, answered, rows_done) if gives_features else nothing
    # The distance of the float32 model from itself says nothing.
    float32 = _float32(entries)
    others = [() if entry is float32 else answered.answers[entry.file].outputs for entry in entries]
    return [Judgement(*found) for found in zip(rights, alike, embedded, others, strict=True)]


def _finite(entries: Sequence[Entry], answers: dict[Path, Answers]) -> list[Entry]:
    return [entry for entry in entries if answers[entry.file].finite]


def _float32(entries: Sequence[Entry]) -> Entry | None:
    """The float32 model, if it is measured."""
    return next((entry for entry in entries if entry.flavor == "fp32"), None)


def _baseline(entries: Sequence[Entry]) -> Entry | None:
    """The model that losses are counted from."""
    baselines = [entry for entry in entries if entry.role == "baseline"]
    baselines.sort(key=lambda entry: entry.flavor != "fp32")
    return baselines[0] if baselines else None


def accuracies(entries: Sequence[Entry], answered: Answered) -> list[ComparedAccuracy | None]:
    """Accuracy of each model, and what it loses against the baseline; None for a model whose logits
    are not finite."""
    finite, targets = _finite(entries, answered.answers), answered.targets
    logits = {entry.file: answered.answers[entry.file].vectors for entry in finite}
    float32, baseline = _float32(finite), _baseline(finite)
    # What agreement and divergence are measured from.
    reference = None if float32 is None else logits[float32.file]
    rows: list[ComparedAccuracy | None] = []
    for entry in entries:
        if entry not in finite:
            rows.append(None)
            continue
        # Pairs, and not differences of shares: the images are the same.
        right, against = hits(logits[entry.file], targets), None
        if baseline is not None and entry is not baseline:
            drop = paired_drop(hits(logits[baseline.file], targets), right)
            against = BaselineDrop(**vars(drop), baseline=baseline.name)
        accuracy = measure_accuracy(logits[entry.file], targets, reference)
        rows.append(ComparedAccuracy(**vars(accuracy), against=against, hits=hits_of(right)))
    return rows


def agreements(entries: Sequence[Entry], answered: Answered) -> list[Agreement | None]:
    """How alike each model and the float32 model answer; None if there is no such model, and for
    logits that are not finite."""
    finite = _finite(entries, answered.answers)
    float32 = _float32(finite)
    if float32 is None:
        return [None] * len(entries)
    reference = answered.answers[float32.file].vectors
    return [
        agreement(reference, answered.answers[entry.file].vectors) if entry in finite else None
        for entry in entries
    ]


def agreement(reference: Logits, found: Logits) -> Agreement:
    """How alike two models answer. Both: logits [images, classes], `reference` of float32."""
    same: NDArray[np.bool_] = found.argmax(1) == reference.argmax(1)
    return Agreement(float(same.mean()), divergence(reference, found), len(found), hits_of(same))


def embeddings(
    entries: Sequence[Entry], answered: Answered, rows_done: Callable[[int], None]
) -> list[Embedding | None]:
    """What is known of the embeddings of each model; None for embeddings that are not finite."""
    finite = _finite(entries, answered.answers)
    float32, baseline = _float32(finite), _baseline(finite)
    known = None
    if (answered.targets != NO_TARGET).all():
        known = KnownClasses(answered.targets, answered.gallery)
    models = {}
    for entry in finite:
        answers = answered.answers[entry.file]
        models[entry.name] = Embedded(answers.vectors, answers.gallery)
    found = compare_embeddings(
        models,
        known,
        None if float32 is None else float32.name,
        None if baseline is None else baseline.name,
        rows_done,
    )
    return [found.get(entry.name) for entry in entries]
