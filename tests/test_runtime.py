"""Numbers of the bench against their definitions, and its refusals."""

import math
from pathlib import Path

import numpy as np
import pytest

from runtime.accuracy import measure_accuracy, wilson_interval
from runtime.errors import BenchError
from runtime.latency import Latency, measure_latency
from runtime.session import Model, SessionSettings


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 3), (970, 1000), (25_000, 50_000)])
def test_the_interval_holds_exactly_the_shares_that_the_score_test_does_not_reject(hits: int, count: int):
    share = hits / count
    for bound in wilson_interval(hits, count):
        assert 0 <= bound <= 1
        if 1e-9 < bound < 1 - 1e-9:  # at a bound p: |share - p| = z · sqrt(p (1 - p) / n)
            assert abs(share - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / count))


def test_accuracy_counts_hits_and_agreement():
    logits = np.eye(7, dtype=np.float32)[[0, 1, 2, 3]] + np.arange(7, dtype=np.float32) / 100
    reference = logits[:, ::-1].copy()
    reference[0] = logits[0]
    accuracy = measure_accuracy(logits, np.array([0, 1, 0, 6]), reference)
    assert accuracy.top1 == 0.5
    assert accuracy.top5 == 0.75  # the third image's class 0 has the least logit
    assert accuracy.agreement == 0.5  # the first image, and the fourth whose best is the middle class
    assert accuracy.images == 4


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(BenchError, match="NaN or infinite"):
        measure_accuracy(np.full((2, 3), np.nan, np.float32), np.array([0, 1]))


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    fast = Latency(1, 0, 0, 0, 0, rounds_ms=(1.0, 5.0, 2.0))
    slow = Latency(1, 0, 0, 0, 0, rounds_ms=(2.0, 10.0, 100.0))
    assert fast.ratio_to(slow) == 0.5


@pytest.fixture(scope="module")
def demo_file(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from marrq.cli import main

    file = tmp_path_factory.mktemp("runtime") / "model.onnx"
    assert main(["export", str(demo_artifact), "-o", str(file)]) == 0
    return file


def test_latency_is_ordered_and_covers_every_model_batch_and_round(demo_file: Path):
    done = []
    measured = measure_latency([demo_file, demo_file], [1, 3], SessionSettings(), rounds=2, seconds=0.01, model_done=lambda: done.append(1))
    assert len(done) == 4
    assert [[latency.batch for latency in row] for row in measured] == [[1, 3], [1, 3]]
    for latency in (latency for row in measured for latency in row):
        assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p99_ms
        assert latency.images_per_s == pytest.approx(1e3 * latency.batch / latency.p50_ms)
        assert len(latency.rounds_ms) == 2


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "npu"])
def test_a_provider_that_is_not_there_is_an_error(demo_file: Path, provider: str):
    with pytest.raises(BenchError, match=f"provider '{provider}' is not available here"):
        Model(demo_file, SessionSettings(provider))


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08")
    with pytest.raises(BenchError, match=r"cannot load .*broken\.onnx"):
        Model(tmp_path / "broken.onnx", SessionSettings())
