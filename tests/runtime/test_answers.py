"""What can be told of answers depends on what a model gives and on what is known of the images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.measure.accuracy import divergence, measure_accuracy
from runtime.measure.answers import Answered, Answers, judged_output
from runtime.measure.dense import OutputError
from runtime.measure.images import NO_TARGET
from runtime.measure.judge import Judgement, judge
from runtime.measure.measured import Entry
from runtime.metadata import Output, OutputKind

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(20, 5)).astype(np.float32)
UNKNOWN = np.full(20, NO_TARGET)
KNOWN = RANDOM.integers(0, 5, 20)
BROKEN = np.zeros((1, 3, 2, 2), np.float32)


def entry(flavor: str) -> Entry:
    role = "baseline" if flavor.startswith("fp") else "candidate"
    path = Path(flavor)
    return Entry(flavor, path, flavor, role, flavor, "cpu", "", "", 4)


ENTRIES = [entry("fp32"), entry("integer")]


def judged(
    targets: np.ndarray,
    kind: OutputKind = "classes",
    entries: list[Entry] = ENTRIES,
    failing: str = "",
    **changed: np.ndarray,
) -> list[Judgement]:
    """failing: the model whose numbers overflow. changed: vectors other than LOGITS, by model."""
    answers = {
        one.file: Answers(
            kind,
            changed.get(one.name, LOGITS),
            failing=BROKEN if one.name == failing else None,
        )
        for one in entries
    }
    return judge(entries, Answered(answers, targets), lambda count: None)


def test_agreement_is_the_share_of_images_with_the_same_best_class():
    # The best and the worst class of 7 images change places.
    other = LOGITS.copy()
    other[:7] *= -1
    found = [one.agreement for one in judged(UNKNOWN, integer=other)]
    assert [one and one.agreement for one in found] == [1, 13 / 20]
    assert [one and one.divergence for one in found] == [0, divergence(LOGITS, other)]
    assert found[1] is not None
    assert found[1].right.tolist() == [False] * 7 + [True] * 13


def test_with_classes_there_is_accuracy_and_without_there_is_agreement():
    first, second = judged(KNOWN)
    assert first.agreement is first.embedding is None
    assert first.accuracy is not None
    assert first.accuracy.top1 == measure_accuracy(LOGITS, KNOWN).top1
    assert second.accuracy is not None
    assert second.accuracy.against is not None
    assert [one.accuracy for one in judged(UNKNOWN)] == [None, None]


def test_embeddings_are_compared_by_their_own_measures_and_count_classes_if_they_are_known():
    for targets in (KNOWN, UNKNOWN):
        first, second = judged(targets, "features")
        assert first.accuracy is first.agreement is second.accuracy is second.agreement is None
        assert first.embedding is not None
        assert second.embedding is not None
        assert second.embedding.likeness is not None
        assert second.embedding.likeness.cosine == pytest.approx(1)
        assert (second.embedding.retrieval is None) == (targets is UNKNOWN)
    seen = judged(KNOWN, "features")[1].embedding
    assert seen is not None
    assert seen.retrieval is not None
    assert seen.retrieval.leave_one_out
    assert seen.retrieval.knn20.against is not None
    assert seen.retrieval.knn20.against.baseline == "fp32"


def test_without_float32_embeddings_are_like_nothing_and_may_lose_against_another_baseline():
    first, second = judged(KNOWN, "features", [entry("fp16"), entry("integer")])
    for one in (first, second):
        assert one.embedding is not None
        assert one.embedding.likeness is None
        assert one.embedding.retrieval is not None
    assert second.embedding is not None
    assert second.embedding.retrieval is not None
    assert second.embedding.retrieval.knn1.against is not None
    assert second.embedding.retrieval.knn1.against.baseline == "fp16"


def test_without_float32_nothing_is_agreed_with():
    found = judged(UNKNOWN, entries=[entry("fp16"), entry("integer")])
    assert [one.agreement for one in found] == [None, None]


@pytest.mark.parametrize("kind", ["classes", "features"])
def test_numbers_that_overflow_are_compared_with_nothing(kind: OutputKind):
    for targets in (KNOWN, UNKNOWN):
        first, second = judged(targets, kind, failing="integer")
        assert first != Judgement()
        assert second == Judgement()
    first, second = judged(UNKNOWN, kind, failing="fp32")
    assert first == Judgement()
    assert second.embedding is None or second.embedding.likeness is None


def test_a_single_image_has_no_neighbours():
    answers = {one.file: Answers("features", LOGITS[:1]) for one in ENTRIES}
    found = judge(ENTRIES, Answered(answers, KNOWN[:1]), lambda count: None)
    assert [one.embedding for one in found] == [None, None]


def test_the_float32_model_is_not_compared_with_itself_in_other_outputs():
    row = OutputError(0.9, 0.8, 1.0, 0.7, 20, "tokens", 0.1, None)
    answers = {one.file: Answers("classes", LOGITS, outputs=(row,)) for one in ENTRIES}
    found = judge(ENTRIES, Answered(answers, KNOWN), lambda count: None)
    assert [one.outputs for one in found] == [(), (row,)]
    # A second float32 model is a candidate like any other.
    second = replace(ENTRIES[0], name="own", file=Path("own"), role="candidate")
    answers[second.file] = answers[ENTRIES[1].file]
    found = judge([ENTRIES[0], second], Answered(answers, KNOWN), lambda count: None)
    assert [one.outputs for one in found] == [(), (row,)]


def test_the_judged_output_is_the_classes_or_else_the_first_embedding():
    tokens, first, second = (
        Output("tokens", (None, 8), "dense"),
        Output("pooled", (8,), "features"),
        Output("projected", (4,), "features"),
    )
    logits = Output("logits", (5,), "classes")
    assert judged_output([tokens, first, second]) == first
    assert judged_output([tokens, first, logits]) == logits
    assert judged_output([tokens]) is None
