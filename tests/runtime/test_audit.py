"""The audit names each planted fault, in marrq's files and in others', without false alarms; the
precision counts what the file has."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from rich.console import Console
from sample_report import FP32, REPORT, W4A8
from tiny_models import noise, quantized, randomized, swin, vit

from exporters.onnx_file import write
from exporters.opsets import OPSET
from exporters.trace import TracedModel, trace, trace_quantized
from marrq.cli import main
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import bits_per_weight, quantized_linears
from runtime.audit.graph import Graph
from runtime.audit.inspect import inspect_file
from runtime.audit.linears import Examined, examine
from runtime.audit.precision import measure_precision
from runtime.audit.rows import AuditRow, audit
from runtime.errors import BenchError
from runtime.report.inspection import audit_table, inspection_table
from runtime.report.tables import shortfalls
from runtime.session import SessionSettings

CPU = SessionSettings(threads=1)


def deit_tiny() -> Any:
    """The widths of DeiT-T: 192, 768."""
    return vit(embed_dim=192, num_heads=3, mlp_ratio=4)


def swin_tiny() -> Any:
    """The widths of the first two stages of Swin-T: 96, 192, 384, 768."""
    arguments = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 96,
        "depths": (1, 1),
        "num_heads": (3, 6),
        "window_size": 4,
    }
    return randomized(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **arguments))


MODELS: dict[str, Callable[[], Any]] = {
    "vit": vit,
    "swin": swin,
    "deit tiny": deit_tiny,
    "swin tiny": swin_tiny,
}


def make(
    model: str, scheme: str, method: str = "rtn", strategy: str = "per-tensor"
) -> QuantizedModel:
    return quantized(MODELS[model](), noise(8), scheme, method, strategy=strategy)  # type: ignore[arg-type]


@cache
def traced(model: str, scheme: str, strategy: str = "per-tensor") -> TracedModel:
    """A model whose codes were rounded to nearest; tests do not change it."""
    return trace_quantized(make(model, scheme, strategy=strategy), "hash")


def alarms(rows: list[AuditRow]) -> dict[str, str | None]:
    return {row.linear: row.reason for row in rows if row.reason is not None}


@pytest.mark.parametrize(
    "model", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
@pytest.mark.parametrize(
    ("flavor", "scheme"),
    [
        ("integer", "W4A8"),
        ("matmulnbits", "W4A16"),
        pytest.param("qdq", "W3A8", marks=pytest.mark.slow),
    ],
)
def test_a_healthy_file_raises_no_alarm_whatever_the_widths(
    model: str, flavor: str, scheme: str, tmp_path: Path
):
    made = traced(model, scheme).model
    write(traced(model, scheme), flavor, tmp_path / "m.onnx")
    rows = audit(examine(tmp_path / "m.onnx", CPU))
    assert alarms(rows) == {}
    of_scheme = {row.linear: row for row in rows if row.nominal != "float"}
    assert set(of_scheme) == set(quantized_linears(made.module))
    assert all(row.integer and row.nominal == scheme for row in of_scheme.values())
    kernel = "MatMulNBits" if flavor == "matmulnbits" else "MatMulIntegerToFloat"
    types = ("int4", "float32") if flavor == "matmulnbits" else ("int8", "uint8")
    assert {(row.operator, row.weight, row.activation) for row in of_scheme.values()} == {
        (kernel, *types)
    }
    assert all(
        row.operators == (3 if path.endswith("qkv") else 1) for path, row in of_scheme.items()
    )
    assert [row.operator for row in rows if row.nominal == "float"] == [
        "Conv",
        "Gemm",
    ]  # patch embedding, head


@pytest.mark.parametrize(
    ("flavor", "scheme", "strategy", "operators"),
    [
        ("integer", "W4A8", "per-token", {1, 3}),
        pytest.param("integer", "W4A8-g64", "per-tensor", {1, 2, 3}, marks=pytest.mark.slow),
        pytest.param("integer", "W2A4", "per-tensor", {1, 3}, marks=pytest.mark.slow),
    ],
)
def test_tokens_grids_group_scales_and_branches_are_no_alarm_and_no_linears_of_their_own(
    flavor: str, scheme: str, strategy: str, operators: set[int], tmp_path: Path
):
    made = make("vit", scheme, "gptq,lowrank=srr:4", strategy)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    examined = examine(tmp_path / "m.onnx", CPU)
    rows = audit(examined)
    assert alarms(rows) == {}
    assert len(rows) == len(quantized_linears(made.module)) + 2
    assert {row.operators for row in rows} == operators
    parts = {part.what: part for part in measure_precision(examined).float_remainder}
    assert parts["low-rank branches"].count >= 20  # R x and L for each, and L three times for qkv
    assert ("corrections for the tokens' zero points" in parts) == (strategy == "per-token")


@pytest.mark.parametrize(
    ("scheme", "strategy", "options", "operator", "reason"),
    [
        ("W4A16", "per-tensor", {}, "FusedMatMul", "a Transpose behind DequantizeLinear"),
        pytest.param(
            "W4A8",
            "per-token",
            {},
            "FusedMatMul",
            "scales found at run time",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "W4A8-g32",
            "per-tensor",
            {},
            "FusedMatMul",
            "a scale for every 32 inputs, which no fused kernel takes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "W4A16-g32-sym",
            "per-tensor",
            {"symmetric": True},
            "MatMulNBits",
            "quantizes its activations to int8 at accuracy level 4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "W8A8-sym",
            "per-tensor",
            {"symmetric": True},
            "MatMul",
            "its graph is float16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_qdq_cannot_have_on_a_kernel_is_told(
    scheme: str,
    strategy: str,
    options: dict[str, bool | int],
    operator: str,
    reason: str,
    tmp_path: Path,
):
    model = traced("vit", scheme, strategy)
    write(model, "qdq", tmp_path / "m.onnx", options)
    rows = [row for row in audit(examine(tmp_path / "m.onnx", CPU)) if row.nominal != "float"]
    assert {row.operator for row in rows} == {operator}
    assert all(row.reason is not None and reason in row.reason for row in rows)
    assert all(row.falls_short == ("A8" in scheme) for row in rows)


@pytest.fixture(scope="module")
def qdq_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("audit") / "qdq.onnx"
    write(traced("vit", "W4A8"), "qdq", file)
    return file


FAULTY = "blocks.1.mlp.fc1"


def planted(healthy: Path, file: Path, plant: Callable[[onnx.GraphProto], None]) -> Path:
    model = onnx.load(healthy)
    plant(model.graph)
    onnx.save(model, file)
    return file


def node_of(graph: onnx.GraphProto, prefix: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name.startswith(prefix))


def int4_straight_into_dq(graph: onnx.GraphProto) -> None:
    node_of(graph, f"{FAULTY}/DequantizeLinear").input[0] = f"{FAULTY}.weight_codes"
    zero_point = next(
        tensor for tensor in graph.initializer if tensor.name == f"{FAULTY}.weight_zero_point"
    )
    zero_point.CopyFrom(
        numpy_helper.from_array(
            numpy_helper.to_array(zero_point).astype(ml_dtypes.int4), zero_point.name
        )
    )


def float_weight(graph: onnx.GraphProto) -> None:
    graph.initializer.append(
        numpy_helper.from_array(np.ones((64, 128), np.float32), f"{FAULTY}.weight")
    )
    node_of(graph, f"{FAULTY}/MatMul").input[1] = f"{FAULTY}.weight"


PLANTS = {
    "int4 straight into DequantizeLinear": (
        int4_straight_into_dq,
        "int4 codes go straight into DequantizeLinear",
    ),
    "a float linear": (float_weight, "its weight is float32 in the file, not codes"),
}


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found_where_it_is_and_strict_exits_with_three(
    fault: str, qdq_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plant, reason = PLANTS[fault]
    file = planted(qdq_file, tmp_path / "m.onnx", plant)
    found = alarms(audit(examine(file, CPU)))
    assert list(found) == [FAULTY]
    assert reason in str(found[FAULTY])
    assert main(["inspect", str(file)]) == 0
    assert main(["inspect", str(file), "--strict"]) == 3
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert (
        f"1 of 10 linears run in float where their scheme says integers; the first is '{FAULTY}', "
        "W4A8" in error[0]
    )
    assert reason in error[0]


def test_a_third_of_qkv_that_differs_is_a_row_of_its_own(qdq_file: Path, tmp_path: Path):
    def plant(graph: onnx.GraphProto) -> None:
        graph.initializer.append(
            numpy_helper.from_array(np.ones((64, 64), np.float32), "blocks.0.attn.qkv.k.weight")
        )
        node_of(graph, "blocks.0.attn.qkv.k/MatMul").input[1] = "blocks.0.attn.qkv.k.weight"

    rows = {
        row.linear: row
        for row in audit(examine(planted(qdq_file, tmp_path / "m.onnx", plant), CPU))
    }
    assert [rows[f"blocks.0.attn.qkv.{part}"].integer for part in "qkv"] == [True, False, True]
    assert rows["blocks.0.attn.qkv.k"].falls_short
    assert rows["blocks.1.attn.qkv"].operators == 3


def test_a_linear_of_the_scheme_that_the_file_lacks_is_named(qdq_file: Path, tmp_path: Path):
    model = onnx.load(qdq_file)
    entry = next(entry for entry in model.metadata_props if entry.key == "marrq.schemes")
    entry.value = json.dumps({"W4A8": [*json.loads(entry.value)["W4A8"], "blocks.2.mlp.fc1"]})
    onnx.save(model, tmp_path / "m.onnx")
    rows = audit(examine(tmp_path / "m.onnx", CPU))
    assert alarms(rows) == {"blocks.2.mlp.fc1": "no product of the file has its weight"}
    assert rows[-1].falls_short


@pytest.mark.parametrize("level", ["none", "basic", "extended"])
def test_a_level_of_optimization_that_fuses_nothing_is_the_reason(level: str, qdq_file: Path):
    rows = audit(examine(qdq_file, replace(CPU, optimization=level)))
    short = [row for row in rows if row.falls_short]
    assert len(short) == (0 if level == "extended" else 8)
    assert all(
        row.reason == f"graph optimization {level!r} fuses no Q/DQ: set it to extended or all"
        for row in short
    )


def test_a_node_that_another_provider_runs_is_named(qdq_file: Path):
    examined = examine(qdq_file, CPU)
    on_cuda = {node.name: "CUDAExecutionProvider" for node in examined.file.nodes}
    left = next(
        node.name for node in examined.file.nodes if node.name.startswith(f"{FAULTY}/MatMul")
    )
    elsewhere = replace(
        examined,
        settings=SessionSettings("cuda"),
        assigned=on_cuda | {left: "CPUExecutionProvider"},
    )
    reason = "its node runs on CPUExecutionProvider: CUDAExecutionProvider has no kernel for it"
    assert alarms(audit(elsewhere)) == {FAULTY: reason}
    with pytest.raises(BenchError, match="tensorrt builds engines"):
        examine(qdq_file, SessionSettings("tensorrt"))


def test_accuracy_level_4_is_eight_bit_activations_whatever_the_scheme_says(tmp_path: Path):
    made = traced("vit", "W4A16").model
    for level in (1, 4):
        file = tmp_path / f"{level}.onnx"
        write(traced("vit", "W4A16"), "matmulnbits", file, {"accuracy_level": level})
    quiet, told = (examine(tmp_path / f"{level}.onnx", CPU) for level in (1, 4))
    assert alarms(audit(quiet)) == {}
    assert set(alarms(audit(told))) == set(quantized_linears(made.module))
    assert all(
        "to int8 at accuracy level 4" in str(reason) for reason in alarms(audit(told)).values()
    )
    assert not any(row.falls_short for row in audit(told))
    assert [measure_precision(found).kernel_activation_bits for found in (quiet, told)] == [32, 8]
    assert measure_precision(told).activation_bits == 16


TYPES = {
    "int2": ml_dtypes.int2,
    "int4": ml_dtypes.int4,
    "int8": np.int8,
    "uint4": ml_dtypes.uint4,
    "uint8": np.uint8,
    "uint16": np.uint16,
}


def one_linear(
    codes: str = "int8",
    activations: str | None = None,
    product: str = "MatMul",
    transposed: bool = False,
    block: int | None = None,
    inputs: int = 64,
    bias: bool = False,
    rank: int = 3,
    zero_point: bool = False,
) -> onnx.ModelProto:
    """x [→ Q → DQ] → product with DQ(codes) [+ bias] → Relu, of 32 outputs; the codes are [in,
    out], or [out, in] where transposed."""
    random, nodes, tensors = np.random.default_rng(0), [], []

    def constant(name: str, array: np.ndarray | np.generic) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(op_type: str, inputs: list[str], output: str, **attributes: int | list[int]) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    x, shape = "x", (32, inputs) if transposed else (inputs, 32)
    if activations is not None:
        grid = [
            constant("x_scale", np.float32(0.03)),
            constant("x_zero_point", np.array(5).astype(TYPES[activations])),
        ]
        x = add(
            "DequantizeLinear", [add("QuantizeLinear", ["x", *grid], "x_codes"), *grid], "x_values"
        )
    numbers = constant("fc.weight_codes", random.integers(-2, 2, shape).astype(TYPES[codes]))
    axis = int(transposed)
    scales = (
        [32]
        if block is None
        else [
            -(-length // block) if place == axis else length for place, length in enumerate(shape)
        ]
    )
    where = {"axis": 1 - axis} if block is None else {"axis": axis, "block_size": block}
    of_weight = [constant("fc.weight_scale", random.random(scales, np.float32))]
    of_weight += (
        [constant("fc.weight_zero_point", np.zeros(scales, TYPES[codes]))] if zero_point else []
    )
    weight = add("DequantizeLinear", [numbers, *of_weight], "values", **where)
    biases = [constant("fc.bias", np.ones(32, np.float32))] if bias else []
    if product == "Gemm":
        y = add("Gemm", [x, weight, *biases], "fc", transB=int(transposed))
    else:
        y = add(
            "MatMul",
            [x, add("Transpose", [weight], "turned", perm=[1, 0]) if transposed else weight],
            "fc",
        )
        y = add("Add", [y, *biases], "sum") if bias else y
    add("Relu", [y], "y")
    ends = [
        helper.make_tensor_value_info(
            "x", TensorProto.FLOAT, ["batch", 17, inputs] if rank == 3 else ["batch", inputs]
        )
    ]
    graph = helper.make_graph(
        nodes, "g", ends, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors
    )
    return helper.make_model(graph, ir_version=13, opset_imports=[helper.make_opsetid("", 25)])


def examined_linear(tmp_path: Path, **form: Any) -> Examined:
    onnx.save(one_linear(**form), tmp_path / "one.onnx")
    return examine(tmp_path / "one.onnx", CPU)


@pytest.mark.parametrize(
    ("form", "nominal", "reason"),
    [
        (
            {"codes": "int4", "activations": "uint8"},
            "W4A8",
            "int4 codes go straight into DequantizeLinear, which is fused with 8-bit codes",
        ),
        (
            {"activations": "uint4"},
            "W8A4",
            "its activations are uint4 codes: integer kernels take 8 bits",
        ),
        (
            {"activations": "uint8", "rank": 2, "bias": True, "zero_point": True},
            "W8A8",
            "a product of two axes is run as Gemm, which has no integer kernel",
        ),
        (
            {"activations": "uint8", "block": 32, "transposed": True},
            "W8A8",
            "a scale for every 32 inputs, which no fused kernel takes",
        ),
        (
            {"codes": "int4", "product": "Gemm", "transposed": True, "rank": 2},
            "W4A16",
            "a Gemm with transB is not fused",
        ),
        (
            {"codes": "int4", "block": 32, "transposed": True},
            "W4A16",
            "a Transpose behind DequantizeLinear keeps it from being fused",
        ),
        (
            {"codes": "int4", "block": 48, "inputs": 96},
            "W4A16",
            "MatMulNBits takes blocks of 16, 32, 64, 128, 256",
        ),
    ],
)
def test_the_form_that_onnx_runtime_does_not_fuse_is_the_reason(
    form: dict[str, Any], nominal: str, reason: str, tmp_path: Path
):
    [row] = audit(examined_linear(tmp_path, **form))
    assert (row.linear, row.nominal) == ("fc", nominal)
    assert (row.weight, row.integer) == ("float32", False)
    assert reason in str(row.reason)


@pytest.mark.parametrize(
    ("form", "operator", "types"),
    [
        ({"activations": "uint8"}, "MatMulIntegerToFloat", ("int8", "uint8")),
        ({"activations": "uint8", "bias": True}, "MatMulIntegerToFloat", ("int8", "uint8")),
        (
            {
                "activations": "uint8",
                "rank": 2,
                "product": "Gemm",
                "transposed": True,
                "zero_point": True,
            },
            "QGemm",
            ("int8", "uint8"),
        ),
    ],
)
def test_a_form_that_it_does_fuse_is_no_alarm(
    form: dict[str, Any], operator: str, types: tuple[str, str], tmp_path: Path
):
    [row] = audit(examined_linear(tmp_path, **form))
    assert (row.operator, row.weight, row.activation) == (operator, *types)
    assert (row.integer, row.reason) == (True, None)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (
            {"codes": "int2", "block": 32, "inputs": 208},
            "int2 codes in blocks of 32 of 208 inputs: 32 does not divide 208",
        ),
        (
            {"activations": "uint8", "rank": 2, "product": "Gemm"},
            "a Gemm is fused only where its weight has a zero point",
        ),
    ],
)
def test_what_only_some_versions_fuse_is_told_where_they_do_not(
    form: dict[str, Any], reason: str, tmp_path: Path
):
    """A version that fuses nothing of it executes the graph as it stands in the file."""
    examined = examined_linear(tmp_path, **form)
    [row] = audit(examined)
    assert (row.reason is None) == (
        row.integer and row.activation == ("uint8" if "activations" in form else "float32")
    )
    unfused = Graph.load(tmp_path / "one.onnx")
    [row] = audit(
        replace(
            examined,
            optimized=unfused,
            linears=tuple(replace(each, kernel=each.product) for each in examined.linears),
        )
    )
    assert reason in str(row.reason)


def test_scales_of_blocks_that_their_fused_kernel_cannot_take_are_told_before_the_file_fails(
    tmp_path: Path,
):
    [row] = audit(examined_linear(tmp_path, activations="uint8", block=32))
    assert row.operator == "MatMulIntegerToFloat"
    assert "with which MatMulIntegerToFloat fails when it runs" in str(row.reason)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        str(tmp_path / "one.onnx"), options, providers=["CPUExecutionProvider"]
    )
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        session.run(None, {"x": np.ones((1, 17, 64), np.float32)})


class Noise(CalibrationDataReader):
    def __init__(self) -> None:
        self.batches = iter([{"pixels": noise(2).numpy()}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


@pytest.mark.slow
def test_files_of_other_tools_have_a_row_for_each_linear(tmp_path: Path):
    # What these tools are given as a rule: a graph as torch's exporter writes it.
    plain = ir.to_proto(trace(vit(), (3, 32, 32), OPSET))
    onnx.save(plain, tmp_path / "plain.onnx")
    for name, activations in (("static", QuantType.QUInt8), ("signed", QuantType.QInt8)):
        files = tmp_path / "plain.onnx", tmp_path / f"{name}.onnx"
        quantize_static(
            *files,
            Noise(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=activations,
        )
    weight_only = MatMulNBitsQuantizer(plain, block_size=32, is_symmetric=True)
    weight_only.process()
    weight_only.model.save_model_to_file(str(tmp_path / "nbits.onnx"))

    def seen(name: str) -> tuple[list[tuple[str, str, bool]], list[AuditRow]]:
        rows = audit(examine(tmp_path / f"{name}.onnx", CPU))
        return sorted({(row.nominal, row.operator, row.integer) for row in rows}), rows

    floats = [("float", "Conv", False), ("float", "Gemm", False)]
    assert seen("plain")[0] == [*floats, ("float", "MatMul", False)]
    assert seen("static")[0] == [
        ("W8A8", operator, True) for operator in ("QGemm", "QLinearConv", "QLinearMatMul")
    ]
    assert seen("nbits")[0] == sorted([("W4A16", "MatMulNBits", True), *floats])
    for name in ("plain", "static", "nbits"):
        _, rows = seen(name)
        assert len(rows) == 10
        assert alarms(rows) == {}
        assert {"patch_embed.proj", "head"} < {row.linear for row in rows}
    # QInt8 is the default of quantize_static
    assert alarms(seen("signed")[1]) == {
        "patch_embed.proj": "a convolution is fused with uint8 activations, and these are int8"
    }
    precision = measure_precision(examine(tmp_path / "nbits.onnx", CPU))
    assert (precision.nominal, precision.weight_bits, precision.container_bits) == ("W4A16", 4, 4)
    assert precision.bits_per_weight == 4 + 32 / 32  # no zero points


@pytest.mark.parametrize(
    ("flavor", "scheme", "method", "kernel", "container"),
    [
        ("integer", "W3A4", "rtn", (8, 8), 3),
        ("integer", "W4A8", "gptq,lowrank=serq:8", (8, 8), 4),
        ("qdq", "W3A16-sym", "rtn", (32, 32), 3),
        pytest.param("qdq", "W2A8", "gptq,lowrank=srr:4:int8", (8, 8), 2, marks=pytest.mark.slow),
        pytest.param("integer", "W4A8", "rtn", (8, 8), 4, marks=pytest.mark.slow),
        pytest.param("qdq", "W4A16-g16", "rtn", (32, 32), 4, marks=pytest.mark.slow),
        pytest.param("matmulnbits", "W3A16", "rtn", (4, 32), 4, marks=pytest.mark.slow),
    ],
)
def test_bits_are_counted_in_the_file_and_in_the_kernels(
    flavor: str, scheme: str, method: str, kernel: tuple[int, int], container: int, tmp_path: Path
):
    made = make("vit", scheme, method)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    examined = examine(tmp_path / "m.onnx", CPU)
    precision = measure_precision(examined)
    assert precision.nominal == scheme
    assert f"W{precision.weight_bits}A{precision.activation_bits}" == scheme.partition("-")[0]
    assert (precision.kernel_weight_bits, precision.kernel_activation_bits) == kernel
    assert precision.container_bits == container
    more = container - precision.weight_bits
    # constants that unpack 3-bit codes, and the factor of LayerScale, weigh something in a model of
    # this size
    assert precision.bits_per_weight == pytest.approx(bits_per_weight(made.module) + more, abs=0.3)
    assert examined.size_bytes == (tmp_path / "m.onnx").stat().st_size
    parts = {part.what: part for part in precision.float_remainder}
    assert parts["patch embedding"].why == "the scheme leaves the patch embedding in floating point"
    assert parts["head"].operator == "Gemm"
    assert {"attention products", "norms", "activation functions"} < set(parts)


def test_the_table_fits_100_columns_counts_what_agrees_and_singles_out_what_does_not(
    qdq_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = planted(qdq_file, tmp_path / "m.onnx", int4_straight_into_dq)
    assert main(["inspect", str(file), "--json", str(tmp_path / "i.json")]) == 0
    report = inspect_file(file, SessionSettings())
    assert json.loads((tmp_path / "i.json").read_text()) == report.to_json()
    assert len(report.audit) == 10
    console = Console(width=100)
    with console.capture() as captured:
        console.print(audit_table(report.audit))
        console.print(inspection_table(report))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    assert [
        "blocks.*.mlp.fc*",
        "3",
        "W4A8",
        "MatMulIntegerToFloat",
        "int8",
        "uint8",
        "yes",
    ] in cells
    assert [FAULTY, "1", "W4A8", "MatMul", "float32", "float32", "no"] in cells
    assert [
        "blocks.*.attn.qkv",
        "2",
        "W4A8",
        "3",
        "×",
        "MatMulIntegerToFloat",
        "int8",
        "uint8",
        "yes",
    ] in cells
    assert any(line.startswith("why not") and FAULTY in line for line in lines)
    assert FAULTY in capsys.readouterr().out


def test_the_bench_has_a_line_for_a_candidate_that_does_not_run_as_its_scheme_says(
    qdq_file: Path, tmp_path: Path
):
    file = planted(qdq_file, tmp_path / "m.onnx", int4_straight_into_dq)
    healthy, faulty = (tuple(audit(examine(path, CPU))) for path in (qdq_file, file))
    models = (
        replace(FP32, audit=faulty),
        replace(W4A8, name="good", audit=healthy),
        replace(W4A8, name="bad", audit=faulty),
    )
    [line] = shortfalls(replace(REPORT, models=models))
    assert line.startswith(f"bad: {FAULTY}, of 10: int4 codes go straight into DequantizeLinear")


def test_a_file_is_inspected_without_torch(qdq_file: Path):
    code = (
        f"import sys; from marrq.cli import main; main(['inspect', {str(qdq_file)!r}]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_what_is_about_files_is_refused_for_folders_and_the_other_way_round(
    qdq_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["inspect", str(tmp_path), "--strict"]) == 1
    assert "export" in capsys.readouterr().err
    assert main(["inspect", str(qdq_file), "--plot", str(tmp_path / "a.svg")]) == 1
    assert "give an artifact" in capsys.readouterr().err
    assert main(["inspect", str(qdq_file), "--optimization", "some"]) == 1
    assert "unknown graph optimization 'some'" in capsys.readouterr().err


def test_a_file_without_a_linear_is_refused(tmp_path: Path):
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 3]) for name in ("x", "y")
    ]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)]),
        tmp_path / "m.onnx",
    )
    with pytest.raises(BenchError, match="has no linear"):
        examine(tmp_path / "m.onnx", CPU)
