"""Without targets there is no accuracy, and models are compared by their answers alone."""

from pathlib import Path

import numpy as np
import pytest

from runtime.measure.accuracy import divergence
from runtime.measure.answers import NO_TARGET, Answers, accuracies, agreements
from runtime.measure.measured import Entry

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(20, 5)).astype(np.float32)
UNKNOWN = np.full(20, NO_TARGET)


def entry(flavor: str, has_classes: bool = True) -> Entry:
    role = "baseline" if flavor == "fp32" else "candidate"
    path = Path(flavor)
    return Entry(flavor, path, flavor, role, flavor, "cpu", "", "", 4, has_classes=has_classes)


ENTRIES = [entry("fp32"), entry("integer")]


def answers(**changed: np.ndarray) -> dict[Path, Answers]:
    logits = {"fp32": LOGITS, "integer": LOGITS, **changed}
    return {Path(name): Answers(found, None) for name, found in logits.items()}


def test_agreement_is_the_share_of_images_with_the_same_best_class():
    # The best and the worst class of 7 images change places.
    other = LOGITS.copy()
    other[:7] *= -1
    found = agreements(ENTRIES, answers(integer=other), UNKNOWN)
    assert [one and one.agreement for one in found] == [1, 13 / 20]
    assert [one and one.divergence for one in found] == [0, divergence(LOGITS, other)]
    assert accuracies(ENTRIES, answers(), UNKNOWN) == [None, None]


@pytest.mark.parametrize(
    ("entries", "targets"),
    [
        (ENTRIES, np.zeros(20, int)),
        ([entry("fp16"), entry("integer")], UNKNOWN),
        ([entry("fp32"), entry("integer", has_classes=False)], UNKNOWN),
    ],
    ids=["labelled", "without float32", "features"],
)
def test_agreement_is_left_out_where_it_says_nothing(entries: list[Entry], targets: np.ndarray):
    assert agreements(entries, answers(fp16=LOGITS), targets) == [None, None]


def test_numbers_that_overflow_agree_with_nothing():
    broken = answers() | {Path("integer"): Answers(LOGITS, np.zeros((1, 3, 2, 2), np.float32))}
    first, second = agreements(ENTRIES, broken, UNKNOWN)
    assert first is not None
    assert second is None
    broken = answers() | {Path("fp32"): Answers(LOGITS, np.zeros((1, 3, 2, 2), np.float32))}
    assert agreements(ENTRIES, broken, UNKNOWN) == [None, None]
