"""The passes for TensorRT change where numbers are rounded, and nothing else."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporters.passes.tensorrt import norms_in_float32, scale_queries

ATTENTION = """
<ir_version: 9, opset_import: ["" : 20]>
attention (float[b,2,5,4] q, float[b,2,4,5] k, float[b,2,5,4] v) => (float[b,2,5,4] y)
<float[1] s = {0.3}, float[5,5] mask = {MASK}>
{
    scores = MatMul (q, k)
    scaled = Mul (scores, s)
    masked = Add (scaled, mask)
    shares = Softmax <axis = -1> (masked)
    y = MatMul (shares, v)
}
"""
NORM = """
<ir_version: 9, opset_import: ["" : 20]>
norm (float16[n,8] x) => (float16[n,8] y)
<float16[8] w = {TWO}, float16[8] b = {ONE}>
{
    y0 = LayerNormalization <axis = -1> (x, w, b)
    y = Identity (y0)
}
"""


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, inputs)[0]
    return result


def attention(factor: str = "s") -> ir.Model:
    mask = ", ".join(str(0.1 * number) for number in range(25))
    text = ATTENTION.replace("MASK", mask)
    if factor == "none":
        text = text.replace("scaled = Mul (scores, s)", "scaled = Identity (scores)")
    return ir.from_onnx_text(text)


@pytest.mark.parametrize("factor", ["s", "none"])
def test_a_factor_on_the_queries_is_a_factor_on_the_scores(factor: str):
    generator = np.random.default_rng(0)
    inputs = {
        "q": generator.standard_normal((3, 2, 5, 4), np.float32),
        "k": generator.standard_normal((3, 2, 4, 5), np.float32),
        "v": generator.standard_normal((3, 2, 5, 4), np.float32),
    }
    model = attention(factor)
    before = run(model, **inputs)
    scale_queries(model.graph)
    np.testing.assert_allclose(run(model, **inputs), before, rtol=1e-5, atol=1e-6)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    first = products[0].inputs[0]
    assert first is not None
    made_by = first.producer()
    assert (made_by is not None and made_by.op_type == "Mul") == (factor == "s")


def test_scores_that_somebody_else_reads_keep_their_factor():
    model = attention()
    other = ir.node("Neg", model.graph[0].outputs, name="other")
    other.outputs[0].name = "other"
    model.graph.append(other)
    before = [node.op_type for node in model.graph]
    scale_queries(model.graph)
    assert [node.op_type for node in model.graph] == before


def norm() -> ir.Model:
    # The text format has float16 by its bits.
    one, two = (np.array(number, np.float16).view(np.uint16) for number in (1, 2))
    bits = {"ONE": ", ".join([str(one)] * 8), "TWO": ", ".join([str(two)] * 8)}
    return ir.from_onnx_text(NORM.replace("ONE", bits["ONE"]).replace("TWO", bits["TWO"]))


def test_a_norm_in_float32_leaves_the_types_of_the_graph_that_it_was_cloned_from():
    model = norm()
    before = [output.dtype for node in model.graph for output in node.outputs]
    # A clone shares the types of its values.
    norms_in_float32(model.clone().graph)
    assert [output.dtype for node in model.graph for output in node.outputs] == before


def test_a_norm_in_float32_keeps_tokens_whose_squares_leave_float16():
    model = norm()
    norms_in_float32(model.graph)
    operators = [node.op_type for node in model.graph]
    assert operators == ["Cast", "LayerNormalization", "Cast", "Identity"]
    x = 3000 * np.random.default_rng(0).standard_normal((6, 8))
    x = x.astype(np.float16).astype(np.float64)
    centered = x - x.mean(1, keepdims=True)
    expected = 2 * centered / np.sqrt(centered.var(1, keepdims=True) + 1e-5) + 1
    found = run(model, x=x.astype(np.float16))
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
