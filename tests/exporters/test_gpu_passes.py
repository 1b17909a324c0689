"""Operators of ONNX Runtime's own, in graphs for GPUs: each gives what the nodes gave that it takes
the place of, and does not take it if it would not."""

from collections import Counter
from collections.abc import Callable
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from flavor_files import slow
from onnx import numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tiny_models import dinov2, noise, swin, transformers_vit, vit_with_layer_scale
from torch import nn

from exporters.flavors.floating import FLOAT_FLAVORS
from exporters.opsets import ATTENTION_OPSET, ONNXRUNTIME_DOMAIN, OPSET
from exporters.passes.bias_gelu import gelu_with_bias
from exporters.passes.multi_head import name_multi_head, project_in_attention
from exporters.passes.skip_norm import norm_with_residual
from exporters.trace import INPUT, trace

Rewrite = Callable[[ir.Graph], None]
RANDOM = np.random.default_rng(0)
TOKENS = {"x": (2, 3, 8), "r": (2, 3, 8), "other": (2, 3, 8)}
"""What the graphs below read: tokens [b, n, c]."""


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, dtype=np.float32)


CONSTANTS = {
    **{name: normal(8, 8) for name in ("wq", "wk", "wv")},
    **{name: normal(8) for name in ("bq", "bk", "bv", "gamma", "beta")},
    "position": normal(1, 3, 8),
    "column": normal(3, 1),
    "wide": normal(8, 16),
    "codes": RANDOM.integers(-8, 8, (8, 8)).astype(ml_dtypes.int4),
    "mask": normal(1, 1, 3, 3),
}


def graph_of(nodes: str, outputs: str = "y", opset: int = 21) -> ir.Model:
    """A graph of nodes in ONNX's text form on the tokens and constants above."""
    given = ", ".join(f"float[{b},{n},{c}] {name}" for name, (b, n, c) in TOKENS.items())
    made = ", ".join(f"float[2,3,8] {name}" for name in outputs.split())
    imports = f'"": {opset}, "{ONNXRUNTIME_DOMAIN}": 1'
    proto = onnx.parser.parse_model(
        f"<ir_version: 10, opset_import: [{imports}]> g ({given}) => ({made}) {{ {nodes} }}"
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        # Shape inference knows no operators of ONNX Runtime; all of these give tokens.
        if node.outputs[0].shape is None and node.inputs[0] is not None:
            node.outputs[0].shape = node.inputs[0].shape
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


def run(model: ir.Model) -> list[np.ndarray]:
    feeds = {name: np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
             for name, shape in TOKENS.items()}  # fmt: skip
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def rewritten(model: ir.Model, rewrite: Rewrite) -> None:
    rewrite(model.graph)
    RemoveUnusedNodesPass()(model)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


QKV = """q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    q = Add(q0, bq) k = Add(bk, k0) v = Add(v0, bv)"""
ATTEND = f"y = {ONNXRUNTIME_DOMAIN}.MultiHeadAttention<num_heads = 2, scale = 0.3>(q, k, v)"
NAMED = "y = Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.3>"
SUM = "a = MatMul(x, wq) b = Add(a, bq) s = Add(r, b)"
NORM = "LayerNormalization<axis = -1, epsilon = 0.1>"

CASES = {
    # The rewrite, the nodes, the outputs, and the operators that are left.
    "q, k and v of one input": (
        project_in_attention, f"{QKV} {ATTEND}", "y", {"Attention": 1}),
    "k without a bias": (
        project_in_attention, f"{QKV} {ATTEND}".replace("Add(bk, k0)", "Identity(k0)"), "y",
        {"MatMul": 3, "Identity": 1, "MultiHeadAttention": 1}),
    "no biases at all": (
        project_in_attention,
        f"q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {ATTEND}", "y", {"Attention": 1}),
    "queries of other tokens": (
        project_in_attention, f"{QKV} {ATTEND}".replace("MatMul(x, wq)", "MatMul(r, wq)"), "y",
        {"MatMul": 3, "MultiHeadAttention": 1}),
    "a query that is read elsewhere": (
        project_in_attention, f"{QKV} {ATTEND} z = Identity(q)", "y z",
        {"MatMul": 3, "Add": 1, "MultiHeadAttention": 1, "Identity": 1}),
    "a product that is read elsewhere": (
        project_in_attention, f"{QKV} {ATTEND} z = Identity(q0)", "y z",
        {"MatMul": 3, "MultiHeadAttention": 1, "Identity": 1}),
    "a weight that depends on the images": (
        project_in_attention,
        f"t = Transpose<perm = [0, 2, 1]>(x) w = MatMul(t, other) {QKV} {ATTEND}".replace(
            "MatMul(x, wq)", "MatMul(x, w)"), "y",
        {"Transpose": 1, "MatMul": 4, "MultiHeadAttention": 1}),
    "attention on tokens": (
        name_multi_head, f"{NAMED}(x, r, other)", "y", {"MultiHeadAttention": 1}),
    "attention with a mask": (
        name_multi_head, f"{NAMED}(x, r, other, mask)", "y", {"Attention": 1}),
    "a residual stream": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma, beta)", "y",
        {"MatMul": 1, "SkipLayerNormalization": 1}),
    "a residual stream that goes on": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma, beta) z = Add(s, y)", "y z",
        {"MatMul": 1, "SkipLayerNormalization": 1, "Add": 1}),
    "a branch on the left, without a bias": (
        norm_with_residual, f"a = MatMul(x, wq) s = Add(a, r) y = {NORM}(s, gamma, beta)", "y",
        {"MatMul": 1, "SkipLayerNormalization": 1}),
    "a branch that is read elsewhere": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma, beta) z = Identity(b)", "y z",
        {"MatMul": 1, "Add": 1, "SkipLayerNormalization": 1, "Identity": 1}),
    "two norms of one sum": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma, beta) z = {NORM}(s, beta, gamma)", "y z",
        {"MatMul": 1, "SkipLayerNormalization": 1, "LayerNormalization": 1}),
    "a sum that is an output": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma, beta)", "y s",
        {"MatMul": 1, "Add": 2, "LayerNormalization": 1}),
    "a position embedding": (
        norm_with_residual, f"s = Add(x, position) y = {NORM}(s, gamma, beta)", "y",
        {"Add": 1, "LayerNormalization": 1}),
    "a norm without a bias": (
        norm_with_residual, f"{SUM} y = {NORM}(s, gamma)", "y",
        {"MatMul": 1, "Add": 2, "LayerNormalization": 1}),
    "a GELU": (gelu_with_bias, "a = Add(x, bq) y = Gelu(a)", "y", {"BiasGelu": 1}),
    "a GELU by the error function": (
        gelu_with_bias, 'a = Add(bq, x) y = Gelu<approximate = "none">(a)', "y", {"BiasGelu": 1}),
    "a GELU by tanh": (
        gelu_with_bias, 'a = Add(x, bq) y = Gelu<approximate = "tanh">(a)', "y", {"FastGelu": 1}),
    "a GELU without a bias": (
        gelu_with_bias, "a = Add(x, r) y = Gelu(a)", "y", {"Add": 1, "Gelu": 1}),
    "a bias along another axis": (
        gelu_with_bias, "a = Add(x, column) y = Gelu(a)", "y", {"Add": 1, "Gelu": 1}),
    "a sum before a GELU that is read elsewhere": (
        gelu_with_bias, "a = Add(x, bq) y = Gelu(a) z = Identity(a)", "y z",
        {"Add": 1, "Gelu": 1, "Identity": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("rewrite", "nodes", "outputs", "left"), CASES.values(), ids=CASES.keys())
def test_a_rewrite_gives_what_the_graph_gave_and_leaves_what_it_cannot_take(
    rewrite: Rewrite, nodes: str, outputs: str, left: dict[str, int]
):
    opset = ATTENTION_OPSET if rewrite is name_multi_head else 21
    model = graph_of(nodes, outputs, opset)
    before = run(model)
    rewritten(model, rewrite)
    assert operators(model) == left
    for found, expected in zip(run(model), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_initializer_that_two_linears_share_stays_as_it_is():
    """torch's exporter shares equal initializers, so nothing may be changed in place."""
    model = graph_of(f"{QKV} {ATTEND} z = Add(y, bq)".replace("bk", "bq"), "z")
    before = run(model)
    project_in_attention(model.graph)
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-5)


def test_weights_from_codes_are_joined_and_folded_when_the_file_is_loaded(tmp_path):
    widened = "f = Cast<to = 1>(codes) w = Mul(f, bv)"
    model = graph_of(f"{widened} {QKV} {ATTEND}".replace("wk", "w"))
    before = run(model)
    rewritten(model, project_in_attention)
    assert operators(model) == {"Cast": 1, "Mul": 1, "Concat": 1, "Attention": 1}
    np.testing.assert_allclose(run(model)[0], before[0], rtol=1e-5, atol=1e-5)

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    left = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert [node.op_type for node in left] == ["Attention"]


def test_grouped_heads_stay_attention_of_the_standard():
    grouped = NAMED.replace("kv_num_heads = 2", "kv_num_heads = 1")
    model = graph_of(f"{grouped}(x, r, other)", opset=ATTENTION_OPSET)
    name_multi_head(model.graph)
    assert operators(model) == {"Attention": 1}


FORMS = [
    # One block is projected in its attention; in the last one the head reads a single token.
    (
        vit_with_layer_scale,
        {"Attention": 1, "MultiHeadAttention": 1, "SkipLayerNormalization": 4, "BiasGelu": 2},
    ),
    slow(dinov2, {"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}),
    slow(
        transformers_vit,
        {"Attention": 1, "MultiHeadAttention": 1, "SkipLayerNormalization": 4, "BiasGelu": 2},
    ),
    slow(swin, {"BiasGelu": 4}),
]


@cache
def traced(make: Callable[[], nn.Module]) -> ir.Model:
    return trace(make(), (3, 32, 32), OPSET)


def lowered(make: Callable[[], nn.Module], flavor: str, device: str) -> ir.Model:
    graph = traced(make).clone()
    FLOAT_FLAVORS[flavor]().rewrite(graph, device)
    return graph


def difference(make: Callable[[], nn.Module], graph: ir.Model) -> float:
    """Largest difference of a graph's logits from those of the untouched trace."""
    logits = []
    for compared in (traced(make), graph):
        proto = ir.to_proto(compared).SerializeToString()
        session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
        logits.append(session.run(None, {INPUT: noise(3).numpy()})[0])
    return float(np.abs(logits[1] - logits[0]).max())


@pytest.mark.parametrize(("make", "own"), FORMS)
def test_a_float_model_for_a_gpu_has_the_operators_of_its_family_and_the_logits_of_its_trace(
    make: Callable[[], nn.Module], own: dict[str, int]
):
    graph = lowered(make, "fp32", "gpu")
    assert own == Counter(node.op_type for node in graph.graph if node.domain == ONNXRUNTIME_DOMAIN)
    assert difference(make, graph) < 1e-5


def test_a_float16_model_for_a_gpu_has_the_same_operators():
    graphs = [lowered(vit_with_layer_scale, flavor, "gpu") for flavor in FLOAT_FLAVORS]
    # Of the pixels and of the logits.
    assert operators(graphs[1]) - operators(graphs[0]) == {"Cast": 2}
    assert difference(vit_with_layer_scale, graphs[1]) < 1e-2


def test_a_float_model_for_the_cpu_has_standard_operators_only_and_the_logits_of_its_trace():
    graph = lowered(vit_with_layer_scale, "fp32", "cpu")
    assert set(graph.opset_imports) == {""}
    # LayerScale is in the weights, which are named after their modules.
    assert "Mul" not in operators(graph)
    assert "blocks.0.attn.qkv.q.weight_float" in graph.graph.initializers
    assert difference(vit_with_layer_scale, graph) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_without_fusion_a_float_model_needs_no_opset_of_attention(device: str):
    graph = traced(vit_with_layer_scale).clone()
    FLOAT_FLAVORS["fp32"](fuse=False).rewrite(graph, device)
    assert (graph.opset_imports[""], operators(graph)["Softmax"]) == (OPSET, 2)
    assert difference(vit_with_layer_scale, graph) < 1e-5


def test_a_layer_scale_that_float16_would_round_away_stays_a_product_of_its_own():
    """1e-5 times a weight of 0.1 is below the normal numbers of float16."""
    graph = traced(vit_with_layer_scale).clone()
    for name, value in graph.graph.initializers.items():
        if name.endswith("gamma"):
            value.const_value = ir.tensor(np.full(64, 1e-5, np.float32), name=name)
    before = operators(graph)["Mul"]
    FLOAT_FLAVORS["fp16"]().rewrite(graph, "gpu")
    # The factor of the attention's scores is a Mul of the trace too, and goes.
    assert (before, operators(graph)["Mul"]) == (6, 4)
