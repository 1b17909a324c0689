"""The first operator that overflows, in graphs of which it is known which one it is."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import BenchError
from runtime.measure.answers import not_finite, predict
from runtime.measure.bench import BenchSettings, Progress, bench
from runtime.measure.gate import Limits
from runtime.measure.images import ImageData, MeasuredImages
from runtime.measure.judge import accuracies
from runtime.measure.latency import Plan
from runtime.measure.measured import Entry, NotFinite
from runtime.measure.overflow import Overflow, first_overflow
from runtime.session import SessionSettings

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
SIZE = 4


def graph_file(
    path: Path, weights: list[np.ndarray], of_type: int = HALF, ends: str = "Relu"
) -> Path:
    """x → MatMul → MatMul → … → Relu or Softmax, with the weights [SIZE, SIZE], named as marrq
    names them. Input and output are float32."""
    nodes = [helper.make_node("Cast", ["pixels"], ["x0"], to=of_type, name="inward")]
    tensors = []
    for number, weight in enumerate(weights):
        stored = weight.astype(np.float16 if of_type == HALF else np.float32)
        tensors.append(numpy_helper.from_array(stored, f"blocks.{number}.weight"))
        name = f"blocks.{number}/MatMul_0"
        nodes.append(
            helper.make_node(
                "MatMul", [f"x{number}", tensors[-1].name], [f"x{number + 1}"], name=name
            )
        )
    nodes += [
        helper.make_node(ends, [f"x{len(weights)}"], ["y"], name="end"),
        helper.make_node("Cast", ["y"], ["logits"], to=FLOAT, name="outward"),
    ]
    ends_of_graph = [
        helper.make_tensor_value_info(name, FLOAT, ["batch", SIZE]) for name in ("pixels", "logits")
    ]
    graph = helper.make_graph(nodes, "g", ends_of_graph[:1], ends_of_graph[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    # Files of marrq tell the type of each value.
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def images(largest: float = 1.0) -> np.ndarray:
    return np.full((2, SIZE), largest, np.float32)


def test_the_first_value_beyond_float16_is_named_with_its_size(tmp_path: Path):
    # 1 → 4 · 100 → 4 · 400 · 100 = 160,000 → beyond
    file = graph_file(tmp_path / "m.onnx", [np.full((SIZE, SIZE), 100.0)] * 3)
    assert first_overflow(file, images()) == Overflow("blocks.1", "MatMul", 160_000.0, 65504.0)
    assert first_overflow(file, images(0.1)) == Overflow("blocks.2", "MatMul", 6_400_000.0, 65504.0)
    assert first_overflow(file, images(1e-4)) is None


def test_a_file_in_float32_has_the_limit_of_float32(tmp_path: Path):
    file = graph_file(tmp_path / "m.onnx", [np.full((SIZE, SIZE), 1e13)] * 3, FLOAT)
    found = first_overflow(file, images())
    assert found is not None
    assert (found.where, found.largest) == ("blocks.2", None)
    assert found.sentence == (
        "MatMul of 'blocks.2' reaches infinity, where float32 ends at 3.4028e+38"
    )
    assert first_overflow(file, images(1e-13)) is None


@pytest.mark.parametrize("stored", [np.inf, 65504.0])
def test_a_weight_that_float16_cannot_hold_is_found_whatever_it_is_multiplied_by(
    tmp_path: Path, stored: float
):
    weights = np.zeros((SIZE, SIZE))
    weights[0, 0] = stored
    file = graph_file(tmp_path / "m.onnx", [np.eye(SIZE), weights])
    found = first_overflow(file, images(1e-3))
    assert found is not None
    assert found.where == "blocks.1"


def test_a_mask_of_a_softmax_may_be_as_low_as_it_likes(tmp_path: Path):
    low = graph_file(tmp_path / "low.onnx", [np.full((SIZE, SIZE), -3e4)], ends="Softmax")
    assert first_overflow(low, images()) is None
    high = graph_file(tmp_path / "high.onnx", [np.full((SIZE, SIZE), 3e4)], ends="Softmax")
    assert first_overflow(high, images()) == Overflow("blocks.0", "MatMul", 120_000.0, 65504.0)


def entry(file: Path, flavor: str, **changes: str) -> Entry:
    given = {"name": flavor, "path": "m", "role": "baseline", "device": "cpu", **changes}
    return Entry(file=file, flavor=flavor, scheme=flavor, method="none", bits_per_weight=1, **given)


def test_a_bench_goes_on_without_the_models_that_overflow(tmp_path: Path):
    # ONNX Runtime computes float16 in float32 on the CPU, so only the weight overflows there.
    small, large = np.eye(SIZE), np.full((SIZE, SIZE), np.inf)
    entries = [
        entry(graph_file(tmp_path / "a.onnx", [small, large]), "fp16"),
        entry(graph_file(tmp_path / "b.onnx", [small]), "fp32"),
        entry(graph_file(tmp_path / "c.onnx", [small]), "qdq", role="candidate"),
    ]
    batches = [(np.eye(SIZE, dtype=np.float32)[[0, 3]] + 1, np.array([0, 3]))]
    looked_at = MeasuredImages(ImageData("", 2, ""), batches)
    answered = predict(entries, looked_at, SessionSettings(), lambda count: None)
    broken = not_finite(entries[0].file, answered.answers[entries[0].file])
    assert broken is not None
    assert broken == NotFinite(2, Overflow("blocks.1", "MatMul", None, 65504.0))
    first, second, third = accuracies(entries, answered)
    assert first is None
    assert second is not None
    assert second.against is None
    assert third is not None
    assert third.against is not None
    assert third.against.baseline == "fp32", "fp16 has no numbers to be compared with"
    assert third.agreement == 1


def test_a_gate_without_any_baseline_is_refused_before_anything_runs(tmp_path: Path):
    settings = BenchSettings(SessionSettings(), Plan(), limits=Limits(max_drop=1.0))
    candidate = entry(tmp_path / "missing.onnx", "qdq", role="candidate")
    with pytest.raises(BenchError, match="needs a baseline: pass --baseline fp32"):
        bench([candidate], MeasuredImages(ImageData("", 0, ""), []), settings, Progress())
