"""Numbers of the bench against their definitions, and its refusals."""

import math
import platform
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import session
from runtime.environment import FLAGS, describe
from runtime.errors import BenchError
from runtime.measure.accuracy import divergence, measure_accuracy, wilson_interval
from runtime.measure.latency import (
    Latency,
    Plan,
    _time,
    is_warm,
    measure_latency,
    measure_throughput,
    thread_counts,
)
from runtime.measure.memory import measure_peak_memory, resident_peak_mb
from runtime.session import Model, SessionSettings


@pytest.mark.parametrize(
    ("hits", "count"), [(0, 10), (10, 10), (1, 3), (970, 1000), (25_000, 50_000)]
)
def test_the_interval_holds_exactly_the_shares_that_the_score_test_does_not_reject(
    hits: int, count: int
):
    share = hits / count
    for bound in wilson_interval(hits, count):
        assert 0 <= bound <= 1
        if 1e-9 < bound < 1 - 1e-9:  # at a bound p: |share - p| = z · sqrt(p (1 - p) / n)
            assert abs(share - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / count)
            )


def test_accuracy_counts_hits_and_agreement():
    logits = np.eye(7, dtype=np.float32)[[0, 1, 2, 3]] + np.arange(7, dtype=np.float32) / 100
    reference = logits[:, ::-1].copy()
    reference[0] = logits[0]
    accuracy = measure_accuracy(logits, np.array([0, 1, 0, 6]), reference)
    assert accuracy.top1 == 0.5
    assert accuracy.top5 == 0.75  # the third image's class 0 has the least logit
    assert (accuracy.top5_low, accuracy.top5_high) == wilson_interval(3, 4)
    assert (
        accuracy.agreement == 0.5
    )  # the first image, and the fourth whose best is the middle class
    assert accuracy.images == 4


def test_the_divergence_is_that_of_the_classes_shares_by_hand():
    reference = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    logits = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32)) + np.float32(
        300
    )  # a constant more is the same answer
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert measure_accuracy(logits, np.array([0, 0]), reference).divergence == pytest.approx(
        by_hand, rel=1e-4
    )


def test_a_class_that_is_all_but_impossible_leaves_the_divergence_finite():
    far = np.array([[0, 1e4]], np.float32)
    assert divergence(far, -far) == pytest.approx(1e4)
    assert divergence(far, far) == 0


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(BenchError, match="NaN or infinite"):
        measure_accuracy(np.full((2, 3), np.nan, np.float32), np.array([0, 1]))


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians():
    fast = Latency(1, 0, 0, 0, 0, rounds_ms=(1.0, 5.0, 2.0))
    slow = Latency(1, 0, 0, 0, 0, rounds_ms=(2.0, 10.0, 100.0))
    assert fast.ratio_to(slow) == 0.5


def test_latency_is_ordered_and_covers_every_model_batch_and_round(integer_file: Path):
    done = []
    plan = Plan((1, 3), rounds=2, seconds=0.01)
    measured = measure_latency(
        [integer_file, integer_file], SessionSettings(), plan, session_done=lambda: done.append(1)
    )
    assert len(done) == 4
    assert [[latency.batch for latency in speed.latency] for speed in measured] == [[1, 3], [1, 3]]
    assert all(speed.load_ms > 0 for speed in measured)
    for latency in (latency for speed in measured for latency in speed.latency):
        assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p99_ms
        assert latency.images_per_s == pytest.approx(1e3 * latency.batch / latency.p50_ms)
        assert len(latency.rounds_ms) == 2


def test_one_session_lives_at_a_time_and_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch):
    living, opened = weakref.WeakSet(), []

    class FakeModel:
        def __init__(self, path: Path, settings: SessionSettings) -> None:
            assert not living
            living.add(self)
            opened.append((path.name, settings.threads))

        def random_input(self, batch: int) -> int:
            return batch

        def forward(self, batch: int) -> Callable[[], None]:
            return lambda: None

    monkeypatch.setattr("runtime.measure.latency.Model", FakeModel)
    plan = Plan((1, 2), rounds=2, seconds=0)
    rows = measure_throughput([Path("a"), Path("b")], SessionSettings(), plan, threads=(1, 4))
    assert opened == [("a", 1), ("a", 4), ("b", 1), ("b", 4)] * 2
    assert [[(row.threads, row.batch) for row in model] for model in rows] == [
        [(1, 1), (1, 2), (4, 1), (4, 2)]
    ] * 2


@pytest.mark.parametrize("slow_runs", [0, 4, 11])
def test_warming_up_ends_once_runs_are_no_faster_than_before(slow_runs: int):
    times = [10 * 0.8**run for run in range(slow_runs)] + [10 * 0.8**slow_runs] * 20
    warm = next(count for count in range(len(times)) if is_warm(times[:count]))
    assert max(6, slow_runs + 3) <= warm <= slow_runs + 6


def test_warming_up_is_bounded_for_a_model_that_never_settles(monkeypatch: pytest.MonkeyPatch):
    runs = []
    monkeypatch.setattr("runtime.measure.latency.is_warm", lambda times: False)
    assert len(_time(lambda: runs.append(1), seconds=0)) == 5
    assert len(runs) == 30 + 5


@pytest.mark.parametrize(
    ("most", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_numbers_of_threads_double_up_to_the_most(most: int, counts: tuple[int, ...]):
    assert thread_counts(most) == counts


def test_a_device_forward_binds_once_and_waits_for_the_device(
    integer_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """The path of CUDA and TensorRT, on the processor's memory."""
    monkeypatch.setitem(session.DEVICES, "cpu", "cpu")
    model = Model(integer_file, SessionSettings())
    bindings = []

    class Recording:
        def __getattr__(self, name: str) -> object:
            return getattr(opened, name)

        def run_with_iobinding(self, binding: object) -> None:
            opened.run_with_iobinding(binding)
            bindings.append(binding)

    opened, model.session = model.session, Recording()
    pixels = model.random_input(2)
    forward = model.forward(pixels)
    forward()
    forward()
    assert bindings[0] is bindings[1]
    np.testing.assert_array_equal(
        bindings[0].copy_outputs_to_cpu()[0], opened.run(None, {model.input.name: pixels})[0]
    )


def test_peak_memory_grows_with_the_batch_and_is_that_of_the_model_alone(integer_file: Path):
    if resident_peak_mb() is None:
        pytest.skip("this system does not tell the peak of a process")
    [one], [many] = (
        [peak.host for peak in measure_peak_memory([integer_file], batch, SessionSettings())]
        for batch in (1, 512)
    )
    assert one is not None
    assert many is not None
    assert 0 < one < many
    assert many < 2000


def test_a_process_that_measures_memory_and_fails_is_an_error(tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"\x08")
    with pytest.raises(
        BenchError, match=r"measures memory of .*broken\.onnx' ended with 1: .*is no ONNX file"
    ):
        measure_peak_memory([tmp_path / "broken.onnx"], 1, SessionSettings())


def test_the_environment_names_flags_versions_providers_and_settings():
    found = describe(SessionSettings(threads=3))
    assert found.onnxruntime in found.packages.values()
    assert {"numpy", "onnx"} <= set(found.packages)
    assert found.provider == "cpu"
    assert "CPUExecutionProvider" in found.providers_available
    assert (found.threads, found.allow_spinning) == (3, True)
    assert set(found.processor_flags) <= set(FLAGS)
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        assert found.processor_flags


def test_two_packages_of_onnx_runtime_are_an_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("runtime.environment.version", lambda package: "1.30.0")
    with pytest.raises(
        BenchError,
        match=r"onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are both installed.*pip uninstall",
    ):
        describe(SessionSettings())


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "npu"])
def test_a_provider_that_is_not_there_is_an_error(integer_file: Path, provider: str):
    with pytest.raises(BenchError, match=f"provider '{provider}' is not available here"):
        Model(integer_file, SessionSettings(provider))


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path):
    # Cut off within a field; without any content.
    for content in (b"\x08", b""):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(
            BenchError, match=r"broken\.onnx' is no ONNX file, or not the whole of one: export or"
        ):
            Model(tmp_path / "broken.onnx", SessionSettings())
