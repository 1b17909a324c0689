"""Embeddings, k-NN, retrieval and dense outputs against slow references that share no code with
them, and what must hold for any embeddings."""

import numpy as np
import pytest

from runtime.measure import retrieval as retrieving
from runtime.measure import similarity
from runtime.measure.accuracy import drop_interval, mcnemar
from runtime.measure.dense import OutputComparison, class_axis
from runtime.measure.embeddings import Likeness, likeness
from runtime.measure.means import mean_of, student
from runtime.measure.retrieval import Gallery, find, retrieval

IMAGES, CHANNELS, CLASSES = 40, 6, 4


def drawn(seed: int, count: int = IMAGES) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, CHANNELS)).astype(np.float32)


def moved(size: float, seed: int = 9) -> np.ndarray:
    return drawn(0) + np.float32(size) * drawn(seed)


TARGETS = np.random.default_rng(5).integers(0, CLASSES, IMAGES)
GALLERY = Gallery(drawn(7, 31), np.random.default_rng(6).integers(0, CLASSES, 31))


@pytest.fixture(params=[2**22, 64], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of one row, and one that holds all rows, must find the same."""
    monkeypatch.setattr(similarity, "CHUNK", request.param)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ranked(query: np.ndarray, others: list[np.ndarray]) -> list[int]:
    """Indices of the others, the most similar first."""
    return sorted(range(len(others)), key=lambda place: -cosine(query, others[place]))


def shares(features: np.ndarray, image: int) -> list[float]:
    """The share of each other image, in the order of the images."""
    others = [other for other in range(len(features)) if other != image]
    powers = [np.exp(cosine(features[image], features[other]) / 0.07) for other in others]
    return [float(power / sum(powers)) for power in powers]


@pytest.mark.usefixtures("chunk")
def test_likeness_is_what_its_formulas_say():
    a, b = drawn(0), moved(0.3)
    found = likeness(a, b)
    cosines = [cosine(x, y) for x, y in zip(a, b, strict=True)]
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.least_cosine == pytest.approx(min(cosines))
    assert found.cosine_p1 == pytest.approx(np.percentile(cosines, 1))
    overlaps, divergences = [], []
    for image in range(IMAGES):
        others = [other for other in range(IMAGES) if other != image]
        nearest = [
            set(ranked(features[image], [features[other] for other in others])[:10])
            for features in (a, b)
        ]
        overlaps.append(len(nearest[0] & nearest[1]) / 10)
        p, q = shares(a, image), shares(b, image)
        divergences.append(sum(x * np.log(x / y) for x, y in zip(p, q, strict=True)))
    assert found.overlap == pytest.approx(np.mean(overlaps))
    assert found.divergence == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found.images == IMAGES


def top1_by_vote(query: np.ndarray, among: np.ndarray, classes: np.ndarray, k: int) -> int:
    votes = dict.fromkeys(range(CLASSES), 0.0)
    for place in ranked(query, list(among))[:k]:
        votes[int(classes[place])] += np.exp(cosine(query, among[place]) / 0.07)
    return max(votes, key=lambda name: votes[name])


def average_precision(image: int, features: np.ndarray) -> float:
    others = [other for other in range(IMAGES) if other != image]
    order = [others[place] for place in ranked(features[image], [features[o] for o in others])]
    right = [TARGETS[other] == TARGETS[image] for other in order]
    return float(np.mean([sum(right[: n + 1]) / (n + 1) for n in range(len(right)) if right[n]]))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("gallery", [None, GALLERY], ids=["leave one out", "gallery"])
def test_neighbours_vote_and_images_are_found_as_the_formulas_say(gallery: Gallery | None):
    features = drawn(0)
    found = find(features, TARGETS, gallery)
    for k in (1, 20):
        for image in range(IMAGES):
            among, classes = np.delete(features, image, 0), np.delete(TARGETS, image)
            if gallery is not None:
                among, classes = gallery.features, gallery.classes
            best = top1_by_vote(features[image], among, classes, k)
            assert found.knn[k][image] == (best == TARGETS[image])
    expected = [average_precision(image, features) for image in range(IMAGES)]
    np.testing.assert_allclose(found.precisions, expected)
    # The nearest image of all others.
    assert found.recalled.tolist() == find(features, TARGETS, None).knn[1].tolist()
    assert (found.gallery, found.leave_one_out) == ((39, True) if gallery is None else (31, False))


def permuted(features: np.ndarray) -> np.ndarray:
    return features[np.random.default_rng(8).permutation(IMAGES)]


def close(one: Likeness, other: Likeness) -> bool:
    return all(
        getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-6) for name in vars(one)
    )


def test_equal_embeddings_are_alike_in_all_and_lose_nothing():
    found = likeness(drawn(0), drawn(0))
    assert found.cosine == pytest.approx(1)
    assert (found.overlap, found.divergence) == (1, 0)
    seen = find(drawn(0), TARGETS, None)
    section = retrieval(seen, seen, "fp32")
    for share in (section.knn1, section.knn20, section.recall1):
        assert share is not None
        assert share.against is not None
        assert share.against.drop == 0
    assert section.mean_average_precision is not None
    assert section.mean_average_precision.against is not None
    assert section.mean_average_precision.against.drop == 0


def test_the_order_of_the_images_and_the_scale_of_embeddings_change_nothing():
    a, b = drawn(0), moved(0.3)
    plain = likeness(a, b)
    assert close(plain, likeness(permuted(a), permuted(b)))
    assert close(plain, likeness(np.float32(3) * a, np.float32(0.01) * b))
    # A scale for each image, and one at which squares overflow in float32.
    each = np.exp(drawn(4)[:, :1])
    assert close(plain, likeness(a, each * b))
    assert close(plain, likeness(a, np.float32(1e30) * b))
    before = find(b, TARGETS, GALLERY)
    after = find(permuted(each * b), permuted(TARGETS), GALLERY)
    assert before.knn[20].sum() == after.knn[20].sum()
    assert before.precisions.mean() == pytest.approx(after.precisions.mean())


def test_equal_similarities_give_the_same_precision_in_any_order():
    """Three images of a class and three others, all in one place: 2 of the 5 others are right."""
    features, targets = np.ones((6, 2), np.float32), np.array([0, 1, 0, 1, 0, 1])
    for order in (np.arange(6), np.array([3, 0, 5, 1, 4, 2])):
        assert find(features, targets[order], None).precisions.tolist() == pytest.approx(
            [2 / 5] * 6
        )


def test_an_image_that_is_alone_in_its_class_is_no_query():
    targets = np.array([0, 0, 1, 2, 2])
    found = find(drawn(0, 5), targets, None)
    assert len(found.recalled) == len(found.precisions) == 4
    assert len(found.knn[1]) == 5
    section = retrieval(find(drawn(0, 5), np.arange(5), None), None, "")
    assert section.recall1 is section.mean_average_precision is None
    assert section.knn1.share == 0


def test_an_embedding_of_zeros_is_similar_to_nothing():
    broken = drawn(0)
    broken[3] = 0
    found = likeness(drawn(0), broken)
    assert found.least_cosine == 0
    assert np.isfinite(found.divergence)


def test_losses_are_those_of_pairs():
    a, b = find(drawn(0), TARGETS, GALLERY), find(moved(1.5), TARGETS, GALLERY)
    section = retrieval(b, a, "fp32")
    lost = int((a.knn[20] & ~b.knn[20]).sum())
    won = int((b.knn[20] & ~a.knn[20]).sum())
    against = section.knn20.against
    assert against is not None
    assert (against.only_baseline, against.only_model) == (lost, won)
    assert (against.drop_low, against.drop_high) == drop_interval(lost, won, IMAGES)
    assert against.p_value == mcnemar(lost, won)
    assert section.knn20.right.tolist() == b.knn[20].tolist()
    precision = section.mean_average_precision
    assert precision is not None
    assert precision.against is not None
    assert precision.against.drop == pytest.approx((a.precisions - b.precisions).mean())


def jackknifed(values: np.ndarray) -> float:
    """The standard error of the mean, each image left out once."""
    n = len(values)
    means = np.array([np.delete(values, image).mean() for image in range(n)])
    return float(np.sqrt((n - 1) / n * np.square(means - means.mean()).sum()))


def test_the_interval_of_a_mean_is_that_of_the_jackknife():
    values = np.random.default_rng(3).uniform(size=12)
    found = mean_of(values, 0, 1)
    assert found.error == pytest.approx(jackknifed(values))
    assert found.high - found.value == pytest.approx(2.201 * found.error, rel=1e-3)  # 11 freedoms
    assert student(10**9) == pytest.approx(1.96, abs=1e-3)
    single = mean_of(np.array([0.5]), 0, 1)
    assert (single.value, single.low, single.high) == (0.5, 0, 1)
    assert mean_of(np.array([0.9, 1.0, 1.0]), 0, 1).high == 1


def test_the_interval_of_a_mean_holds_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(2)
    drawn_means = [mean_of(random.beta(8, 2, 30), 0, 1) for _ in range(2000)]
    held = np.mean([one.low <= 0.8 <= one.high for one in drawn_means])
    assert 0.93 < held < 0.965


def test_the_divergence_tells_two_models_apart_sooner_than_recall_does():
    """Two models, one with a quarter more noise: over draws of 60 images of 6 classes the
    divergence orders them right more often than recall@1, k-NN top-1 and mAP do."""
    right = {"divergence": 0, "recall1": 0, "knn20": 0, "map": 0}
    for seed in range(40):
        random = np.random.default_rng(seed)
        targets = np.arange(60) % 6
        original = random.normal(size=(60, 16)) + 1.5 * random.normal(size=(6, 16))[targets]
        better, worse = (
            (original + size * random.normal(size=(60, 16))).astype(np.float32)
            for size in (0.4, 0.5)
        )
        good, bad = find(better, targets, None), find(worse, targets, None)
        reference = original.astype(np.float32)
        right["divergence"] += (
            likeness(reference, better).divergence < likeness(reference, worse).divergence
        )
        right["recall1"] += good.recalled.mean() > bad.recalled.mean()
        right["knn20"] += good.knn[20].mean() > bad.knn[20].mean()
        right["map"] += good.precisions.mean() > bad.precisions.mean()
    assert right["divergence"] >= 38
    assert right["divergence"] > max(right["recall1"], right["knn20"])


def test_dense_outputs_are_compared_as_if_they_were_one_batch():
    random = np.random.default_rng(1)
    reference = random.normal(size=(7, 5, 4, 3)).astype(np.float32)
    found = reference + 0.1 * random.normal(size=reference.shape).astype(np.float32)
    comparison = OutputComparison("logits", classes=5)
    for rows in (slice(0, 3), slice(3, 7)):
        comparison.add(reference[rows], found[rows])
    result = comparison.result()
    cosines = [cosine(a.ravel(), b.ravel()) for a, b in zip(reference, found, strict=True)]
    assert result.cosine == pytest.approx(np.mean(cosines))
    assert result.least_cosine == pytest.approx(min(cosines))
    assert result.relative_error == pytest.approx(
        np.linalg.norm(found - reference) / np.linalg.norm(reference)
    )
    assert result.agreement == (reference.argmax(1) == found.argmax(1)).mean()
    assert (result.output, result.images) == ("logits", 7)


@pytest.mark.parametrize(
    ("dims", "classes", "axis"),
    [
        ((150, 32, 32), 150, 0),
        ((100, 91), 91, 1),
        ((100, 92), 91, 1),  # with DETR's "no object"
        ((5, 5), 5, None),
        ((196, 384), 0, None),
        ((196, 384), 10, None),
        ((11,), 10, None),
        ((1, 32, 32), 1, None),  # a single class is always the best one
        ((100, 2), 1, 1),
    ],
)
def test_the_axis_of_the_classes_is_told_by_its_length(
    dims: tuple[int, ...], classes: int, axis: int | None
):
    assert class_axis(dims, classes) == axis


def test_boxes_have_no_agreement_if_a_detector_has_as_many_classes_as_a_box_has_numbers():
    boxes = np.random.default_rng(1).normal(size=(3, 10, 4)).astype(np.float32)
    for classes in (3, 4):
        comparison = OutputComparison("pred_boxes", classes)
        comparison.add(boxes, boxes)
        assert comparison.result().agreement is None


def test_an_output_that_is_zero_in_both_models_has_lost_nothing():
    comparison, nothing = OutputComparison("depth", 0), np.zeros((2, 3, 4), np.float32)
    comparison.add(nothing, nothing)
    result = comparison.result()
    assert (result.cosine, result.least_cosine, result.relative_error) == (1, 1, 0)
    # An output that only the float32 model does not have is another matter.
    comparison.add(nothing, nothing + 1)
    assert comparison.result().least_cosine == 0


@pytest.mark.parametrize(("freedom", "expected"), [(2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262)])
def test_students_quantile_is_that_of_the_tables_within_a_hundredth(freedom: int, expected: float):
    assert student(freedom) == pytest.approx(expected, rel=1e-2)


def test_a_gallery_larger_than_the_measured_images_is_looked_at_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
):
    sizes, vote = [], retrieving.vote

    def counted(similarities: np.ndarray, classes: np.ndarray, k: int, count: int) -> np.ndarray:
        sizes.append(similarities.size)
        return vote(similarities, classes, k, count)

    whole = find(drawn(0, 5), TARGETS[:5], GALLERY)
    monkeypatch.setattr(similarity, "CHUNK", 64)
    monkeypatch.setattr(retrieving, "vote", counted)
    parts = find(drawn(0, 5), TARGETS[:5], GALLERY)
    assert max(sizes) <= 64
    assert all((whole.knn[k] == parts.knn[k]).all() for k in (1, 20))
