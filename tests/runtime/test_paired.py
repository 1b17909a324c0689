"""Paired statistics against slow, direct references, and the gate that rests on them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sample_report import DENSE, EMBEDDER, FP32, W4A8, without_accuracy

from marrq.errors import MarrqError
from marrq.workflows.bench_options import check_limits
from runtime.errors import GateError
from runtime.measure.accuracy import (
    NORMAL_95,
    BaselineDrop,
    drop_interval,
    drop_score,
    hits,
    mcnemar,
    paired_drop,
)
from runtime.measure.gate import Gate, Limits, hold_against_limits
from runtime.measure.measured import MeasuredModel, Role


@st.composite
def tables(draw: st.DrawFn, largest: int = 400) -> tuple[int, int, int]:
    """Images right in the baseline alone, in the model alone, and in all."""
    count = draw(st.integers(1, largest))
    only_baseline = draw(st.integers(0, count))
    return only_baseline, draw(st.integers(0, count - only_baseline)), count


def direct_score(only_baseline: int, only_model: int, count: int, drop: float) -> float:
    """T with the likeliest share found by looking at a fine grid, and again around the best, in
    place of the root of an equation."""
    low, high = max(0.0, -drop), (1 - drop) / 2
    counts = np.array([only_baseline, only_model, count - only_baseline - only_model])[:, None]
    for _ in range(6):
        shares = np.linspace(low, high, 401)  # right in the model alone
        cells = np.array([shares + drop, shares, 1 - 2 * shares - drop])
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(counts > 0, counts * np.log(np.maximum(cells, 0)), 0.0)
        best, step = shares[logs.sum(0).argmax()], (high - low) / 400
        low, high = max(low, best - step), min(high, best + step)
    distance = only_baseline - only_model - count * drop
    return distance / math.sqrt(count * (2 * best + drop - drop * drop))


@pytest.mark.parametrize("drop", [-0.7, -0.2, -0.01, 0.0, 0.004, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "table",
    [(9, 4, 100), (0, 3, 40), (3, 0, 40), (0, 0, 25), (25, 0, 25), (200, 150, 1000), (7, 8, 15)],
)
def test_the_score_is_that_of_the_likeliest_share_under_the_drop(
    table: tuple[int, int, int], drop: float
):
    if drop == 0 and table[:2] == (0, 0):
        assert drop_score(*table, drop) == 0  # no image tells anything; the variance is 0
    else:
        assert drop_score(*table, drop) == pytest.approx(
            direct_score(*table, drop), rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize(
    "table", [(9, 4, 100), (0, 3, 40), (0, 0, 25), (200, 150, 1000), (1, 0, 2)]
)
def test_the_interval_holds_exactly_the_drops_that_the_score_test_does_not_reject(
    table: tuple[int, int, int],
):
    low, high = drop_interval(*table)
    for drop in np.linspace(-0.995, 0.995, 399):
        accepted = (
            abs(direct_score(*table, drop)) <= NORMAL_95 if drop or table[:2] != (0, 0) else True
        )
        if min(abs(drop - low), abs(drop - high)) > 1e-4:
            assert accepted == (low < drop < high)


@given(tables())
def test_the_interval_holds_the_drop_mirrors_and_stays_within_bounds(table: tuple[int, int, int]):
    only_baseline, only_model, count = table
    low, high = drop_interval(*table)
    assert -1 <= low <= (only_baseline - only_model) / count <= high <= 1
    assert drop_interval(only_model, only_baseline, count) == pytest.approx((-high, -low), abs=1e-9)


@given(tables(largest=60), st.floats(-0.99, 0.99), st.floats(-0.99, 0.99))
@example((0, 0, 1), 0.5, 1e-178)  # whose square is 0
def test_the_score_falls_as_the_drop_that_is_taken_for_true_grows(
    table: tuple[int, int, int], one: float, other: float
):
    assert drop_score(*table, min(one, other)) >= drop_score(*table, max(one, other)) - 1e-9


def test_without_a_discordant_image_the_interval_is_that_of_so_many_images():
    z2 = NORMAL_95**2
    assert drop_interval(0, 0, 50) == pytest.approx((-z2 / (50 + z2), z2 / (50 + z2)))


def test_the_interval_covers_a_true_drop_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    draws = random.multinomial(200, [0.08, 0.03, 0.89], size=2000)
    covered = np.mean(
        [low <= 0.05 <= high for low, high in (drop_interval(b, c, 200) for b, c, _ in draws)]
    )
    assert 0.935 <= covered <= 0.965


def test_the_p_value_is_the_share_of_equally_likely_throws_that_are_as_uneven():
    for throws in range(12):
        for heads in range(throws + 1):
            uneven = abs(2 * heads - throws)
            outcomes = (bin(outcome).count("1") for outcome in range(2**throws))
            share = Fraction(sum(abs(2 * ones - throws) >= uneven for ones in outcomes), 2**throws)
            assert mcnemar(heads, throws - heads) == pytest.approx(float(share))


def test_the_p_value_of_many_images_is_that_of_whole_numbers():
    exact = Fraction(2 * sum(math.comb(3000, heads) for heads in range(1401)), 2**3000)
    assert mcnemar(1400, 1600) == pytest.approx(float(exact), rel=1e-9)


def test_a_paired_drop_counts_what_one_model_alone_gets_right():
    targets = np.array([0, 1, 2, 2])
    baseline, model = (
        hits(np.eye(3, dtype=np.float32)[best], targets) for best in ([0, 1, 2, 0], [0, 0, 0, 2])
    )
    drop = paired_drop(baseline, model)
    assert (drop.drop, drop.only_baseline, drop.only_model, drop.p_value) == (0.25, 2, 1, 1.0)
    assert (drop.drop_low, drop.drop_high) == drop_interval(2, 1, 4)


def measured(
    only_baseline: int, only_model: int, images: int, role: Role = "candidate"
) -> MeasuredModel:
    """A model of the report with so many images right in one model alone."""
    drop = (only_baseline - only_model) / images
    interval = drop_interval(only_baseline, only_model, images)
    against = BaselineDrop(drop, *interval, only_baseline, only_model, 1.0, "fp32")
    accuracy = replace(W4A8.accuracy, images=images, against=against)
    return replace(W4A8, name="W4A8 marr", role=role, accuracy=accuracy)


def held_to(models: Sequence[MeasuredModel], max_drop: float) -> Gate:
    return hold_against_limits(models, Limits(max_drop))


@pytest.mark.parametrize(
    ("table", "verdict"),
    [((100, 100, 50_000), "held"), ((900, 100, 10_000), "failed"), ((20, 5, 1_000), "undecided")],
)
def test_the_verdict_is_that_of_the_interval(table: tuple[int, int, int], verdict: str):
    gate = held_to([measured(*table), measured(900, 0, 1000, role="baseline")], 1.0)
    assert (gate.max_drop, gate.baseline) == (1.0, "fp32")
    [found] = gate.models
    assert found.verdict == verdict
    assert found.sentence.startswith(f"{verdict}: W4A8 marr loses ")
    assert (found.images_needed is None) == (verdict != "undecided")


@pytest.mark.parametrize(("only_baseline", "only_model"), [(3, 0), (10, 5), (6, 3), (0, 0)])
def test_as_many_images_as_the_gate_asks_for_decide_it_and_fewer_do_not(
    only_baseline: int, only_model: int
):
    images = 100
    limit = 2.0
    needed = held_to([measured(only_baseline, only_model, images)], limit).models[0].images_needed

    def verdict(count: float) -> str:
        scaled = [round(number * count / images) for number in (only_baseline, only_model)]
        return held_to([measured(*scaled, round(count))], limit).models[0].verdict

    assert verdict(1.1 * needed) != "undecided"
    assert verdict(0.9 * needed) == "undecided"


def test_a_drop_that_is_the_limit_itself_is_not_told_by_any_number_of_images():
    [found] = held_to([measured(2, 1, 100)], 1.0).models
    assert (found.verdict, found.images_needed) == ("undecided", None)
    assert "no number of images would tell" in found.sentence


def test_a_gate_is_undecided_if_no_baseline_gives_numbers_and_says_so():
    model = measured(1, 1, 10)
    model = replace(model, accuracy=replace(model.accuracy, against=None))
    gate = held_to([without_accuracy(FP32), model], 1.0)
    assert [verdict.verdict for verdict in gate.models] == ["undecided"]
    assert gate.warnings == [
        "the gate of 1 points is undecided for W4A8 marr: no baseline gives numbers"
    ]
    gate.demand()


def test_a_candidate_that_answers_no_numbers_fails_the_gate():
    gate = held_to([FP32, without_accuracy(measured(0, 0, 10))], 99.0)
    assert gate.models[0].sentence == (
        "failed: W4A8 marr gives NaN or infinite outputs for 17 images: MatMul of "
        "'blocks.0.mlp.fc2' reaches 9.1e+07, where float16 ends at 65504"
    )
    with pytest.raises(GateError, match=r"^W4A8 marr gives NaN or infinity$"):
        gate.demand()


def test_a_candidate_that_failed_is_demanded_and_an_undecided_one_is_warned_of():
    failed = held_to([measured(900, 100, 10_000)], 1.0)
    assert failed.warnings == []
    with pytest.raises(GateError, match=r"^W4A8 marr lost more than 1 points against fp32$"):
        failed.demand()
    undecided = held_to([measured(20, 5, 1_000)], 1.0)
    assert undecided.warnings == ["the gate of 1 points is undecided for W4A8 marr: too few images"]
    undecided.demand()


def near(low: float, cosine: float, high: float, images: int = 100) -> MeasuredModel:
    """An embedder with this interval of the mean cosine."""
    assert EMBEDDER.embedding is not None
    assert EMBEDDER.embedding.likeness is not None
    alike = replace(
        EMBEDDER.embedding.likeness,
        cosine=cosine,
        cosine_low=low,
        cosine_high=high,
        images=images,
    )
    return replace(EMBEDDER, embedding=replace(EMBEDDER.embedding, likeness=alike))


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.98, 0.985, 0.99), "held"),
        ((0.9, 0.92, 0.94), "failed"),
        ((0.94, 0.97, 1.0), "undecided"),
        ((0.94, 0.945, 0.96), "undecided"),
    ],
)
def test_a_mean_cosine_is_judged_by_its_interval(
    interval: tuple[float, float, float], verdict: str
):
    gate = hold_against_limits([near(*interval)], Limits(min_cosine=0.95))
    [found] = gate.models
    assert (found.demand, found.verdict) == ("min_cosine", verdict)
    assert (found.images_needed is None) == (verdict != "undecided")
    if verdict == "failed":
        with pytest.raises(GateError, match=r"is below a mean cosine of 0\.95 against fp32"):
            gate.demand()


def test_as_many_images_as_the_cosine_s_gate_asks_for_bring_its_interval_to_the_limit():
    [found] = hold_against_limits([near(0.94, 0.97, 1.0)], Limits(min_cosine=0.95)).models
    assert found.images_needed in (225, 226)  # 100 (0.03 / 0.02)², but for rounding of floats
    assert "about 230 would tell" in found.sentence
    [same] = hold_against_limits([near(0.94, 0.95, 0.96)], Limits(min_cosine=0.95)).models
    assert same.images_needed is None
    assert "no number of images would tell" in same.sentence


def test_embeddings_of_images_with_classes_are_held_to_the_drop_of_k_nn():
    gate = hold_against_limits([EMBEDDER], Limits(max_drop=3.0, min_cosine=0.98))
    assert [(one.demand, one.verdict) for one in gate.models] == [
        ("max_drop", "held"),
        ("min_cosine", "held"),
    ]
    assert gate.models[0].sentence.startswith("held: W4A8 marr-stream loses 1.3 points (0.2…2.4)")


def test_every_dense_output_is_held_to_the_cosine():
    gate = hold_against_limits([DENSE], Limits(min_cosine=0.98))
    assert [one.verdict for one in gate.models] == ["held", "failed"]
    assert "in tokens" in gate.models[0].sentence
    assert "in masks" in gate.models[1].sentence
    with pytest.raises(GateError, match=r"^W4A8 marr-stream is below"):
        gate.demand()


def test_a_cosine_is_demanded_of_what_stands_beside_logits_and_not_of_logits_alone():
    limits = Limits(min_cosine=0.9)
    check_limits(limits, "classes", is_alone=False)
    with pytest.raises(MarrqError, match="gives logits of classes: pass --max-drop"):
        check_limits(limits, "classes", is_alone=True)
