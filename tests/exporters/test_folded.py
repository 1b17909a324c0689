"""The folded flavour: codes in the file, float weights once ONNX Runtime has loaded it."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from flavor_files import agree, cosines, initializers, metadata, slow, traced, without_kernel
from onnx import numpy_helper
from tiny_models import noise, quantized, vit, vit_with_strong_channels

from exporters.metadata import FileMetadata
from exporters.onnx_file import Export, write
from exporters.trace import trace_quantized
from exporters.triton.card import _what
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import QuantLinear, quantized_linears
from marrq.quantizers.weights_only import weights_only
from marrq.workflows.parity import linear_errors
from runtime.audit.cuda_operators import has_kernel
from runtime.audit.linears import examine
from runtime.audit.rows import audit
from runtime.session import SessionSettings

ONE_THREAD = SessionSettings(threads=1)


def loaded(file: Path, tmp_path: Path) -> onnx.ModelProto:
    """The graph after constant folding alone."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "loaded.onnx")


def multiplied(linear: QuantLinear) -> np.ndarray:
    """(codes - zero point) · scale + L R, in plain NumPy: [out, in]."""
    codes, scale, zero_point = (
        tensor.numpy() for tensor in (linear.codes, linear.scale, linear.zero_point)
    )
    weight = np.zeros(codes.shape, np.float32)
    for group, columns in enumerate(np.split(np.arange(codes.shape[1]), scale.shape[1])):
        centered = codes[:, columns].astype(np.float32) - zero_point[:, group, None]
        weight[:, columns] = centered * scale[:, group, None]
    if linear.lowrank is not None:
        weight += linear.lowrank.left.values.numpy() @ linear.lowrank.right.values.numpy()
    return weight


def check_weights(made: QuantizedModel, file: Path, tmp_path: Path) -> None:
    """Every weight of the loaded graph is the artifact's, dequantized."""
    found = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in loaded(file, tmp_path).graph.initializer
    }
    props = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    parts = FileMetadata.from_metadata_props(props).linears
    assert parts is not None
    for path, linear in quantized_linears(made.module).items():
        weight = np.concatenate([found[str(part.weight)] for part in parts[path]], 1)
        assert all(part.scale is None for part in parts[path])
        np.testing.assert_allclose(weight.T, multiplied(linear), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank"),
    [
        ("vit", "W4A16", None),
        ("vit", "W3A16-g16-sym", None),
        ("vit", "W2A16-g16", "srr:4"),
        ("vit", "W3A16", "serq:8"),
        slow("vit", "W4A16-g16", "serq:64"),
        slow("swin", "W2A16", "serq:8"),
        slow("vit", "W8A16-g16", "lqer:4:int8"),
        slow("vit", "W4A16-mxint", None),
        slow("vit", "W8A16-e8", None),
        slow("swin", "W3A16-g8", None),
    ],
)
def test_nothing_of_the_codes_is_left_once_the_file_is_loaded(
    model: str, scheme: str, lowrank: str | None, tmp_path: Path
):
    trace, file = traced(model, scheme, lowrank), tmp_path / "m.onnx"
    write(trace, "folded", file, {"float32": True})
    assert agree(trace.model, file)
    check_weights(trace.model, file, tmp_path)
    # In float16, and as it is written for a GPU.
    write(trace, "folded", file, device="gpu")
    assert cosines(trace.model, file)[0] >= 0.9999
    graph = loaded(file, tmp_path).graph
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    narrow = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT4)
    assert not set(narrow) & set(constants.values())
    # A node whose inputs are all constants would run for every batch. The CPU provider's own way
    # to multiply float16 is such a Cast.
    left = [node for node in graph.node if not set(node.input) - {"", *constants}]
    assert {node.op_type for node in left} <= {"Cast"}
    assert {constants[name] for node in left for name in node.input} <= {onnx.TensorProto.FLOAT16}
    # The codes themselves are as narrow as in the artifact. Indices and shapes are int64 in a file,
    # which weighs as much as codes in so small a model: they are left out on both sides.
    stored = sum(
        array.nbytes if array.dtype.itemsize > 1 else onnx_bytes(array)
        for name, array in initializers(file).items()
        if (".weight_" in name or ".salient_" in name) and array.dtype != np.int64
    )
    assert stored * 8 == pytest.approx(grid_bits(trace.model), rel=0.05)


def test_a_low_rank_branch_under_a_layer_scale_is_in_the_float16_weight_too(tmp_path: Path):
    trace, file = traced("vit with LayerScale", "W2A16-g16", "srr:4"), tmp_path / "m.onnx"
    write(trace, "folded", file, device="gpu")
    assert cosines(trace.model, file)[0] >= 0.9999
    assert any("lowrank_left_output_scale" in name for name in initializers(file))


def onnx_bytes(array: np.ndarray) -> float:
    """Bytes of an array as ONNX packs it."""
    return array.size / 2 if str(array.dtype) == "int4" else array.nbytes


def grid_bits(made: QuantizedModel) -> int:
    """Bits of codes, zero points and scales, without indices. Scales of mxint are float32 in a
    file."""
    linears = quantized_linears(made.module).values()
    wider = 24 if made.scheme.weight.grid == "mxint" else 0
    return sum(
        linear.quantized_weight.stored_bits
        + wider * linear.scale.numel()
        - (0 if linear.salient_columns is None else 32 * len(linear.salient_columns))
        for linear in linears
    )


def smoothed_model(scheme: str) -> QuantizedModel:
    """Activations of few bits, and inputs that are multiplied by a smoothing."""
    method = "gptq,balance=off"
    return quantized(vit_with_strong_channels(), noise(8), scheme, method, strategy="per-token")


@pytest.mark.parametrize("scheme", ["W4A4", slow("W8A4-e8")])
def test_weights_only_is_the_model_without_its_activations_quantized(scheme: str, tmp_path: Path):
    trace = trace_quantized(smoothed_model(scheme), "hash")
    floats, file = weights_only(trace.model), tmp_path / "m.onnx"
    for options in ({"float32": True}, {}):
        write(trace, "folded", file, {"weights_only": True, **options}, device="gpu")
        # Half of an activation's step is far more than float16 rounds.
        assert cosines(floats, file)[0] >= 0.9999
        errors = linear_errors(floats, file, noise(8), ONE_THREAD)
        assert set(errors) == set(quantized_linears(floats.module))
        assert max(errors.values()) <= (1e-5 if options else 5e-3)
    told = metadata(file)
    assert (told["scheme"], told["device"]) == (scheme.replace("A4", "A16"), "gpu")
    assert all("A16" in name for name in json.loads(told["schemes"]))


@torch.no_grad()
def test_a_model_without_quantized_activations_keeps_what_its_weights_need():
    made = smoothed_model("W4A4")
    floats = weights_only(made)
    assert (str(made.scheme), str(floats.scheme)) == ("W4A4", "W4A16")
    assert any(linear.input is not None for linear in quantized_linears(floats.module).values())
    for path, linear in quantized_linears(floats.module).items():
        before = quantized_linears(made.module)[path]
        assert before.input is not None
        x = torch.randn(3, linear.codes.shape[1])
        smoothing = before.input.smoothing
        expected = torch.nn.functional.linear(
            x if smoothing is None else x * smoothing, before.weight, before.bias
        )
        assert torch.equal(linear(x), expected)
        # The original is as it was.
        assert not torch.equal(before(x), expected)


def test_a_model_on_a_server_is_described_by_what_its_file_holds():
    made = quantized(vit(depth=1), noise(2), "W3A8-g16", "rtn")
    export = Export(made, "hash", "folded", {"weights_only": True}, "gpu")
    assert _what(export) == "quantized to W3A16-g16 by rtn, as `folded` for a GPU"
    with pytest.raises(MarrqError, match="use --weights-only, which leaves the activations unq"):
        Export(made, "hash", "folded", device="gpu")


def test_the_device_chooses_the_flavour_on_the_command_line(
    demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "m.onnx"
    command = ["export", str(demo_artifact), "-o", str(file), "--device"]
    assert main([*command, "gpu"]) == 1
    error = capsys.readouterr().err
    assert "use --weights-only, which leaves the activations unquantized, or --flavor qdq" in error
    assert "takes about twice the time of float16 on a GPU" in error
    assert main([*command, "gpu", "--flavor", "integer"]) == 1
    assert "8 to 55 times as long as in float16: use --device cpu" in capsys.readouterr().err
    assert main([*command, "tpu"]) == 1
    assert "unknown device 'tpu': choose one of cpu, gpu" in capsys.readouterr().err
    assert not file.exists()
    assert main([*command, "gpu", "--weights-only"]) == 0
    assert "as W4A16 folded: " in capsys.readouterr().err
    # inspect says what runs: floats, as the file wants it.
    rows = [row for row in audit(examine(file, ONE_THREAD)) if row.nominal == "W4A16"]
    assert rows
    assert all(row.reason is None and row.weight.startswith("float") for row in rows)


def test_a_weight_that_is_not_folded_is_told(tmp_path: Path):
    write(traced("vit", "W4A16"), "folded", tmp_path / "m.onnx", {"float32": True})
    settings = SessionSettings(threads=1, optimization="none")
    rows = [row for row in audit(examine(tmp_path / "m.onnx", settings)) if row.nominal == "W4A16"]
    assert all("dequantized at every run" in str(row.reason) for row in rows)


def test_the_cuda_provider_has_a_kernel_for_every_node_of_a_file_for_gpus(tmp_path: Path):
    """tests/end_to_end/test_families.py asks the same of every family and of the baselines."""
    for options in ({}, {"float32": True}):
        write(traced("vit", "W4A16"), "folded", tmp_path / "m.onnx", options, device="gpu")
        assert without_kernel(tmp_path / "m.onnx") == []


@pytest.mark.parametrize(
    ("operator", "domain", "opset", "types", "has"),
    [
        ("Reshape", "", 23, ["float16", "int64"], True),
        # Kernels end with the definition that they are registered for.
        ("Reshape", "", 25, ["float16", "int64"], False),
        ("Conv", "", 21, ["float16", "float16"], True),
        ("Pad", "", 18, ["float16", "int64"], True),
        ("Pad", "", 20, ["float16", "int64"], False),
        ("Softmax", "", 21, ["int8"], False),
        ("Where", "", 21, ["bool", "float16", "float16"], True),
        ("BitShift", "", 21, ["uint8", "uint8"], False),
        ("SkipLayerNormalization", "com.microsoft", 21, ["float16"] * 4, True),
        ("SimplifiedLayerNormalization", "", 20, ["float16"] * 2, True),
        ("MatMulIntegerToFloat", "com.microsoft", 21, ["uint8", "int8"], False),
    ],
)
def test_a_kernel_is_found_by_domain_definition_and_type(
    operator: str, domain: str, opset: int, types: list[str], has: bool
):
    node = onnx.helper.make_node(operator, [], [], domain=domain)
    assert has_kernel(node, opset, types) == has
