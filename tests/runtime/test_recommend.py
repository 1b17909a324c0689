"""The recommendation from literal reports: who is named, when the best is not alone, and what
decides then."""

from dataclasses import replace

import numpy as np
from sample_report import EMBEDDER, W4A8, without_accuracy

from runtime.measure.embedded import Embedding
from runtime.measure.measured import ComparedLatency, MeasuredModel, Role
from runtime.measure.recommend import recommend


def measured(
    name: str,
    size: int,
    rounds: tuple[float, ...],
    wrong: tuple[int, ...],
    role: Role = "candidate",
) -> MeasuredModel:
    """A model of the report. wrong: of 100 images, those whose top-1 is."""
    right = np.array([image not in wrong for image in range(100)])
    accuracy = replace(
        W4A8.accuracy,
        top1=float(right.mean()),
        top1_low=0.1,
        top1_high=0.9,
        images=100,
        hits=np.packbits(right).tobytes().hex(),
    )
    p50 = float(np.median(rounds))
    latency = (ComparedLatency(1, p50, p50, p50, 1e3 / p50, rounds, None, 0.5),)
    flavor = name.split()[0]
    return replace(
        W4A8,
        name=name,
        flavor=flavor,
        role=role,
        size_bytes=size,
        accuracy=accuracy,
        latency=latency,
    )


SMALL = measured("qdq a", 1_000_000, (4, 4, 4), tuple(range(20)))
FAST = measured("integer b", 2_000_000, (1, 1, 1), tuple(range(10)))
EXACT = measured("matmulnbits c", 3_000_000, (2, 2, 2), ())


def test_each_criterion_names_its_own_best_with_its_number_and_the_next():
    found = recommend([measured("fp32", 1, (0.1,) * 3, (), role="baseline"), SMALL, FAST, EXACT])
    assert {name: (choice.name, choice.flavor, choice.value) for name, choice in found.items()} == {
        "size": ("qdq a", "qdq", 1_000_000),
        "latency": ("integer b", "integer", 1.0),
        "accuracy": ("matmulnbits c", "matmulnbits", 1.0),
    }
    assert found["size"].sentence == "smallest: qdq a, 1.00 MB; next integer b, 2.00 MB"
    assert found["latency"].sentence == (
        "fastest: integer b, 1.00 ms at batch 1 (0.50 × fp32); next matmulnbits c, 2.00 ms at "
        "batch 1 (0.50 × fp32)"
    )


def test_latencies_whose_rounds_overlap_are_level_and_accuracy_decides():
    slower = measured("qdq d", 1_000_000, (1.2, 1.3, 0.9), ())
    latency = recommend([FAST, slower])["latency"]
    assert latency.name == "qdq d"  # ten images better, and as fast in one round
    assert latency.sentence.endswith(
        "within noise of integer b, 1.00 ms at batch 1 (0.50 × fp32): accuracy decides"
    )
    always_slower = measured("qdq d", 1_000_000, (1.2, 1.3, 1.1), ())
    assert recommend([FAST, always_slower])["latency"].name == "integer b"


def test_accuracies_whose_paired_interval_holds_0_are_level_and_size_decides():
    one_better = measured("qdq e", 2_500_000, (3, 3, 3), tuple(range(9)))
    accuracy = recommend([one_better, FAST])["accuracy"]
    assert accuracy.name == "integer b"
    assert accuracy.sentence.endswith(
        "within noise of qdq e, top-1 91.0 % (10.0–90.0): size decides"
    )


def test_what_decides_is_asked_of_those_that_are_level_alone():
    """The smallest of all is out of the race for latency, and the next criterion after a tie may
    tie too."""
    other = measured("qdq f", 2_005_000, (0.9, 1.1, 1.1), tuple(range(10)))
    latency = recommend([FAST, other, SMALL])["latency"]
    assert latency.name == "integer b"
    assert "within noise of qdq f" in latency.sentence
    assert latency.sentence.endswith(
        "nothing tells them apart"
    )  # accuracies the same, sizes within 1 %


def test_a_single_candidate_is_said_to_be_the_only_one():
    assert recommend([FAST])["size"].sentence == "smallest: integer b, 2.00 MB, the only candidate"


def test_a_candidate_that_answers_no_numbers_is_never_recommended():
    broken = without_accuracy(measured("small", 1, (1.0,), ()))
    good = measured("large", 1000, (9.0,), (1, 2))
    assert {choice.name for choice in recommend([broken, good]).values()} == {"large"}
    assert recommend([broken]) == {}


def test_embeddings_without_classes_are_ranked_by_cosines_whose_intervals_decide():
    def embedder(name: str, size: int, cosine: float) -> MeasuredModel:
        assert EMBEDDER.embedding is not None
        assert EMBEDDER.embedding.likeness is not None
        alike = replace(
            EMBEDDER.embedding.likeness,
            cosine=cosine,
            cosine_low=cosine - 0.001,
            cosine_high=cosine + 0.001,
        )
        model = measured(name, size, (1, 1, 1), ())
        return replace(model, accuracy=None, embedding=Embedding(alike, None))

    near, level, far = (
        embedder(*one) for one in (("qdq a", 3, 0.99), ("qdq b", 2, 0.989), ("qdq c", 1, 0.95))
    )
    found = recommend([near, level, far])["accuracy"]
    assert found.name == "qdq b"
    assert found.sentence.startswith(
        "most accurate: qdq b, cosine with fp32 0.9890 (0.9880–0.9900)"
    )
    assert found.sentence.endswith("size decides")
    assert recommend([near, far])["accuracy"].name == "qdq a"


def test_embeddings_with_classes_are_ranked_by_the_vote_of_20_neighbours():
    found = recommend([EMBEDDER])["accuracy"]
    assert (
        found.sentence
        == "most accurate: W4A8 marr-stream, k-NN top-1 54.2 % (52.2–56.2), the only candidate"
    )
