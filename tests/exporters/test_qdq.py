"""The qdq flavour expresses every scheme in standard operators, and its symmetric form is what
TensorRT takes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from flavor_files import agree, cosines, executed_operators, initializers, metadata, slow, traced

from exporters.lowering.symmetric import _unit
from exporters.onnx_file import write
from marrq.errors import MarrqError
from marrq.quantizers.linear import quantized_linears
from marrq.quantizers.packing import unpack
from marrq.schemes import ActivationStrategy
from runtime.audit.graph import Graph
from runtime.doctor.tensorrt import broken_rules
from runtime.session import SessionSettings

SYMMETRIC = {"symmetric": True}


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank", "strategy"),
    [
        slow("vit with LayerScale", "W2A8", None, "per-tensor"),
        ("vit with LayerScale", "W3A8", "srr:4", "per-tensor"),
        ("vit with LayerScale", "W4A8", "serq:8", "per-tensor"),
        slow("vit with LayerScale", "W3A8-g8", "serq:8", "per-token"),
        slow("swin", "W2A16", "serq:8", "per-tensor"),
        slow("vit with LayerScale", "W4A4", None, "per-tensor"),
        slow("vit with LayerScale", "W8A8", None, "per-tensor"),
        slow("vit with LayerScale", "W4A8", "srr:4:int8", "per-token"),
        slow("vit with LayerScale", "W4A8-g8", None, "per-tensor"),
        slow("swin", "W3A8-g24", None, "per-token"),
        slow("vit with LayerScale", "W4A16", None, "per-tensor"),
        slow("swin", "W4A16", None, "per-tensor"),
        slow("vit with LayerScale", "W2A16-g8", "lqer:4", "per-tensor"),
        slow("vit with LayerScale", "W3A16", None, "per-tensor"),
        slow("vit with LayerScale", "W4A8-e8", "srr:4", "per-tensor"),
        ("vit with LayerScale", "W8A8-sym", None, "per-tensor"),
        slow("vit with LayerScale", "W4A3-sym-e8", None, "per-tensor"),
    ],
)
def test_the_qdq_flavour_takes_every_scheme_in_standard_operators(
    model: str, scheme: str, lowrank: str | None, strategy: ActivationStrategy, tmp_path: Path
):
    trace = traced(model, scheme, lowrank, strategy)
    made = trace.model
    write(trace, "qdq", tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    assert {entry.domain for entry in onnx.load(tmp_path / "m.onnx").opset_import} == {""}
    executed = executed_operators(tmp_path / "m.onnx", SessionSettings(), tmp_path)
    whole = (
        made.scheme.activation is not None
        and strategy != "per-token"
        and made.scheme.weight.group_size is None
    )
    assert ("MatMulIntegerToFloat" in executed) == whole
    assert "MatMulNBits" not in executed  # it would quantize the activations again


def codes_of(file: Path, path: str, num_bits: int, shape: tuple[int, int]) -> np.ndarray:
    found = initializers(file)
    if num_bits == 3:
        planes = np.concatenate([found[f"{path}.weight_low"], found[f"{path}.weight_high"]])
        return unpack(torch.from_numpy(planes), 3, shape).numpy()
    return found[f"{path}.weight_codes"].astype(np.int8).reshape(shape)


@pytest.mark.parametrize("bits", [slow(2), 3, slow(4), slow(8)])
def test_the_qdq_flavour_holds_the_very_codes_scales_and_zero_points(bits: int, tmp_path: Path):
    for scheme, transposed in ((f"W{bits}A8", True), (f"W{bits}A16-g16", False)):
        trace = traced("vit", scheme)
        made = trace.model
        write(trace, "qdq", tmp_path / "m.onnx")
        found = initializers(tmp_path / "m.onnx")
        path = "blocks.1.mlp.fc1"
        linear = quantized_linears(made.module)[path]
        rows, columns = linear.codes.shape
        codes = codes_of(
            tmp_path / "m.onnx", path, bits, (columns, rows) if transposed else (rows, columns)
        )
        np.testing.assert_array_equal(codes.T if transposed else codes, linear.codes.numpy())
        for name, tensor in (("scale", linear.scale), ("zero_point", linear.zero_point)):
            np.testing.assert_array_equal(
                found[f"{path}.weight_{name}"], (tensor[:, 0] if transposed else tensor).numpy()
            )
        assert metadata(tmp_path / "m.onnx")["container_bits"] == str(bits)


def test_an_output_with_a_tiny_layer_scale_costs_no_other_output_a_digit():
    scale = torch.tensor([[0.01, 0.02], [1e-12, 3e-12], [-1e-6, -2e-6], [0.0, 0.0]])
    unit = _unit(scale)
    normal = scale[:3] / unit[:3, None]
    assert bool((normal >= 2.0**-14).all() & (normal < 0.1).all())
    # Powers of two, which cost no digit; and none where none is needed.
    assert np.all(np.frexp(unit[:3].abs().numpy())[0] == 0.5)
    assert (float(unit[0]), float(unit[3])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("vit with LayerScale", "W3A16-mxint"),
        slow("vit with LayerScale", "W3A16-g8-sym"),
        slow("vit with LayerScale", "W4A16-sym"),
        slow("vit with LayerScale", "W4A16-g8-sym"),
        slow("vit with LayerScale", "W2A16-sym"),
        slow("vit with LayerScale", "W8A16-sym"),
        slow("swin", "W4A16-g8-sym"),
        slow("vit", "W8A16-sym-e8"),
        ("vit with LayerScale", "W8A8-sym"),
        slow("vit", "W4A8-sym-e8"),
        slow("swin", "W2A8-sym"),
    ],
)
def test_the_symmetric_form_is_what_tensorrt_takes(model: str, scheme: str, tmp_path: Path):
    trace = traced(model, scheme)
    made = trace.model
    write(trace, "qdq", tmp_path / "m.onnx", SYMMETRIC)
    near = cosines(made, tmp_path / "m.onnx", level="1")
    # In float16 an activation near a tie between two codes may go to either side, one in twenty of
    # the largest; the tiny models spread each of these over all classes.
    quantized = made.scheme.activation is not None
    assert np.median(near) >= (0.999 if quantized else 0.99999)
    assert near[2] >= (0.99 if quantized else 0.9999)
    graph, found = onnx.load(tmp_path / "m.onnx"), initializers(tmp_path / "m.onnx")
    wide = quantized or made.scheme.weight.num_bits == 8
    opset = 20 if wide else 21
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": opset}
    nodes = {output: node for node in graph.graph.node for output in node.output}
    products = [
        node for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in nodes
    ]
    weights = [
        nodes[node.input[1]]
        for node in products
        if nodes[node.input[1]].op_type == "DequantizeLinear"
    ]
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in weights:
        codes, scale = node.input  # no zero point
        assert types[codes] == (onnx.TensorProto.INT8 if wide else onnx.TensorProto.INT4)
        assert types[scale] == onnx.TensorProto.FLOAT16
        assert (found[scale] > 0).all()
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        size = made.scheme.weight.group_size
        assert attributes == ({"axis": 1} if size is None else {"axis": 0, "block_size": size})
        assert found[scale].shape == (
            found[codes].shape[1:]
            if size is None
            else (len(found[codes]) // size, found[codes].shape[1])
        )
    paths = quantized_linears(made.module)
    parts = sum(
        3 if path.endswith("qkv") and f"{path}.q.weight_codes" in found else 1 for path in paths
    )
    assert len(weights) == parts
    path = next(path for path in paths if path.endswith("fc1"))
    np.testing.assert_array_equal(
        found[f"{path}.weight_codes"].astype(np.int8).T, paths[path].codes.numpy()
    )
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.input[1]] == onnx.TensorProto.FLOAT16
            assert types[node.input[2]] == onnx.TensorProto.INT8
            assert found[node.input[2]] == 0
        # Their weights are float32, so their inputs are.
        if node.op_type == "LayerNormalization":
            assert nodes[node.input[0]].op_type == "Cast"
            assert {types[name] for name in node.input[1:]} == {onnx.TensorProto.FLOAT}
    # A file that the doctor's rules refuse would be none for TensorRT. INT8 weights beside float
    # activations are taken, and run in float.
    broken = broken_rules(Graph.load(tmp_path / "m.onnx"))
    assert {(one.rule, one.level) for one in broken} == (
        {("between", "warning")} if wide and not quantized else set()
    )
    assert metadata(tmp_path / "m.onnx")["container_bits"] == ("8" if wide else "4")
    assert metadata(tmp_path / "m.onnx")["symmetric"] == "True"


def test_salient_columns_go_into_int8_but_not_into_int4(tmp_path: Path):
    trace = traced("vit", "W4A8-sym", "serq:8")
    write(trace, "qdq", tmp_path / "m.onnx", SYMMETRIC)
    near = cosines(trace.model, tmp_path / "m.onnx", level="1")
    # In float16 an activation near a tie between two codes may go to either side.
    assert np.median(near) >= 0.999
    path = "blocks.1.mlp.fc1"
    codes = initializers(tmp_path / "m.onnx")[f"{path}.weight_codes"]
    np.testing.assert_array_equal(
        codes.T, quantized_linears(trace.model.module)[path].codes.numpy()
    )
    with pytest.raises(MarrqError, match="do not fit INT4: export without --symmetric"):
        write(traced("vit", "W4A16-sym", "serq:8"), "qdq", tmp_path / "n.onnx", SYMMETRIC)
