"""The integer flavour runs on integer kernels and gives torch's logits, whatever the scheme."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from flavor_files import agree, executed_operators, initializers, slow, traced

from exporters.onnx_file import write
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import ActivationStrategy
from runtime.session import SessionSettings


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank", "strategy"),
    [
        slow("vit with LayerScale", "W4A8", None, "per-token"),
        slow("vit with LayerScale", "W4A4", None, "per-token"),
        ("vit with LayerScale", "W3A8", "srr:4", "per-token"),
        slow("swin", "W3A8", "srr:4", "per-token"),
        slow("vit with LayerScale", "W4A8", "srr:4", "per-tensor"),
        slow("vit with LayerScale", "W2A8", "lqer:4:int8", "per-tensor"),
        slow("swin", "W2A8", "lqer:4:int8", "per-tensor"),
        slow("vit with LayerScale", "W8A8-sym", "qera:4:int8", "per-token"),
        ("vit with LayerScale", "W4A8", "serq:8", "per-tensor"),
        slow("swin", "W2A8", "serq:8", "per-token"),
        slow("vit with LayerScale", "W3A8", "serq:8", "per-token"),
        slow("vit with LayerScale", "W4A8-g64", "serq:8", "per-tensor"),
        ("vit with LayerScale", "W4A8-g64", None, "per-tensor"),
        slow("vit with LayerScale", "W3A8-g64", None, "per-token"),
        slow("vit with LayerScale", "W2A4-e8", None, "per-token"),
        slow("swin", "W4A8-e8", None, "per-tensor"),
        ("vit with LayerScale", "W8A8-sym", None, "per-tensor"),
        slow("vit with LayerScale", "W4A3-sym-e8", None, "per-tensor"),
    ],
)
def test_the_integer_flavour_takes_tokens_with_their_own_grids_group_scales_and_lowrank_branches(
    model: str, scheme: str, lowrank: str | None, strategy: ActivationStrategy, tmp_path: Path
):
    trace = traced(model, scheme, lowrank, strategy)
    made = trace.model
    write(trace, "integer", tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    executed = executed_operators(tmp_path / "m.onnx", SessionSettings(), tmp_path)
    products = sum(
        3 if path.endswith("qkv") and "swin" not in model else 1
        for path in quantized_linears(made.module)
    )
    assert executed["MatMulIntegerToFloat"] >= products
    # A branch reads floats; salient columns have no product of their own.
    branched = lowrank is not None and not lowrank.startswith("serq")
    assert ("DequantizeLinear" in executed) == branched
    assert not {"GatherND", "ScatterND"} & set(executed)


def test_a_token_of_zeros_gives_the_bias(tmp_path: Path):
    trace = traced("vit", "W4A4", strategy="per-token")
    write(trace, "integer", tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    first = next(node for node in graph.graph.node if node.op_type == "QuantizeLinear")
    path = "blocks.0.attn.qkv.q"
    last = next(node for node in graph.graph.node if node.name.startswith(f"{path}/Add"))
    parts = onnx.utils.Extractor(graph).extract_model([first.input[0]], [last.output[0]])
    tokens = np.zeros((2, 17, 64), np.float32)
    y = ort.InferenceSession(parts.SerializeToString()).run(None, {first.input[0]: tokens})[0]
    np.testing.assert_array_equal(
        y, np.broadcast_to(initializers(tmp_path / "m.onnx")[f"{path}.bias_and_sums"][1], y.shape)
    )
