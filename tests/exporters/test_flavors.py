"""Every flavour holds the artifact's integers and gives torch's logits, whatever the scheme; what
it cannot express it refuses."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from tiny_models import noise, quantized, swin, vit, vit_with_layer_scale, vit_with_strong_channels

from exporters.flavors.matmulnbits import block_size
from exporters.onnx_file import FLAVORS, IR_VERSIONS, check_flavor, suitable_flavor, write
from exporters.trace import trace_quantized
from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import bits_per_weight, quantized_linears
from marrq.quantizers.packing import unpack
from marrq.schemes import parse_scheme
from runtime.session import SessionSettings, executed_operators

MODELS = {"vit": vit, "vit with LayerScale": vit_with_layer_scale, "swin": swin}
"""Swin has linears of 24 inputs, windows, and four axes; it takes longest to trace, so one scheme
or two have to do."""

SYMMETRIC = {"symmetric": True}


def make(
    model: str, scheme: str, lowrank: str | None = None, strategy: str = "per-tensor"
) -> QuantizedModel:
    method = "gptq" if lowrank is None else f"gptq,lowrank={lowrank}"
    return quantized(MODELS[model](), noise(8), scheme, method, strategy=strategy)  # type: ignore[arg-type]


def session(file: Path, level: str | None = None) -> ort.InferenceSession:
    """level: accuracy level of the MatMulNBits that ONNX Runtime makes of DequantizeLinear →
    MatMul."""
    options = ort.SessionOptions()
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def cosines(model: QuantizedModel, file: Path, level: str | None = None) -> np.ndarray:
    """Of torch's logits and ONNX Runtime's, for 32 images, ascending."""
    pixels = noise(32, seed=1)
    with torch.no_grad():
        a = model.module(pixels).numpy()
    b = session(file, level).run(None, {"pixels": pixels.numpy()})[0]
    return np.sort((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def agree(model: QuantizedModel, file: Path, level: str | None = None) -> bool:
    """Whether logits are the same. Where activations are quantized one that falls between two codes
    may go to either side, and torch does the same under a nudge of a millionth; that is allowed to
    be seen in two images of 32."""
    found = cosines(model, file, level)
    return bool(
        found[2 if model.scheme.activation else 0] >= 0.9999 and np.median(found) >= 0.99999
    )


def initializers(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer
    }


def metadata(file: Path) -> dict[str, str]:
    return {
        entry.key.removeprefix("marrq."): entry.value for entry in onnx.load(file).metadata_props
    }


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank", "strategy"),
    [
        ("vit with LayerScale", "W4A8", None, "per-token"),
        ("vit with LayerScale", "W4A4", None, "per-token"),
        ("vit with LayerScale", "W3A8", "srr:4", "per-token"),
        ("swin", "W3A8", "srr:4", "per-token"),
        ("vit with LayerScale", "W4A8", "srr:4", "per-tensor"),
        ("vit with LayerScale", "W2A8", "lqer:4:int8", "per-tensor"),
        ("swin", "W2A8", "lqer:4:int8", "per-tensor"),
        ("vit with LayerScale", "W8A8-sym", "qera:4:int8", "per-token"),
        ("vit with LayerScale", "W4A8-g64", None, "per-tensor"),
        ("vit with LayerScale", "W3A8-g64", None, "per-token"),
        ("vit with LayerScale", "W2A4-e8", None, "per-token"),
        ("swin", "W4A8-e8", None, "per-tensor"),
    ],
)
def test_the_integer_flavour_takes_tokens_with_their_own_grids_group_scales_and_lowrank_branches(
    model: str, scheme: str, lowrank: str | None, strategy: str, tmp_path: Path
):
    made = make(model, scheme, lowrank, strategy)
    write(trace_quantized(made, "hash"), "integer", tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    executed = executed_operators(tmp_path / "m.onnx", SessionSettings(), tmp_path)
    products = sum(
        3 if path.endswith("qkv") and "swin" not in model else 1
        for path in quantized_linears(made.module)
    )
    assert executed["MatMulIntegerToFloat"] >= products
    assert ("DequantizeLinear" in executed) == (lowrank is not None)


@pytest.mark.parametrize("flavor", ["integer", "qdq"])
@pytest.mark.parametrize("strategy", ["per-tensor", "per-token"])
def test_an_input_with_a_smoothing_is_multiplied_by_it_in_the_graph(
    strategy: str, flavor: str, tmp_path: Path
):
    made = quantized(vit_with_strong_channels(), noise(8), "W4A4", "gptq", strategy=strategy)  # type: ignore[arg-type]
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    linears = quantized_linears(made.module)
    smoothed = {
        f"{path}.input_smoothing": linear.input.smoothing
        for path, linear in linears.items()
        if linear.input.smoothing is not None
    }
    stored = {
        name: array
        for name, array in initializers(tmp_path / "m.onnx").items()
        if name.endswith("input_smoothing")
    }
    assert (
        set(stored)
        == set(smoothed)
        >= {f"blocks.{index}.mlp.fc2.input_smoothing" for index in range(2)}
    )
    assert all(np.array_equal(stored[name], smoothed[name]) for name in stored)
    assert float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) == pytest.approx(
        bits_per_weight(made.module), abs=0.05
    )


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W4A3"])
@pytest.mark.parametrize("flavor", ["integer", "qdq"])
def test_the_codes_of_every_token_are_torchs(flavor: str, scheme: str, tmp_path: Path):
    """The input of each linear as ONNX Runtime has it, quantized by torch, gives the graph's own
    codes: every one of them."""
    made = make("vit", scheme, strategy="per-token")
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    quantizing = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    clipped = {node.input[0]: node.output[0] for node in graph.graph.node if node.op_type == "Clip"}
    codes = [clipped.get(node.output[0], node.output[0]) for node in quantizing]
    for node, name in zip(quantizing, codes, strict=True):
        graph.graph.output.append(
            helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None)
        )
        graph.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    running = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    linears = quantized_linears(made.module)
    apart = (
        flavor == "integer"
    )  # attention is one operator there, and queries of the last block are those of the class token
    assert len(quantizing) == len(linears) + apart
    for node, name in zip(quantizing, codes, strict=True):
        x, found = running.run([node.input[0], name], {"pixels": noise(4, seed=2).numpy()})
        path = re.sub(r"\.[qkv]$", "", node.name.split("/")[0])
        quantizer = linears[path].input
        assert quantizer is not None
        x = torch.from_numpy(x)
        np.testing.assert_array_equal(found, quantizer.grid(x).quantize(x).numpy(), err_msg=path)


def test_a_token_of_zeros_gives_the_bias(tmp_path: Path):
    made = make("vit", "W4A8", strategy="per-token")
    write(trace_quantized(made, "hash"), "integer", tmp_path / "m.onnx")
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


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank", "strategy"),
    [
        ("vit with LayerScale", "W2A8", None, "per-tensor"),
        ("vit with LayerScale", "W3A8", "srr:4", "per-tensor"),
        ("vit with LayerScale", "W4A4", None, "per-tensor"),
        ("vit with LayerScale", "W8A8", None, "per-tensor"),
        ("vit with LayerScale", "W4A8", "srr:4:int8", "per-token"),
        ("vit with LayerScale", "W4A8-g8", None, "per-tensor"),
        ("swin", "W3A8-g24", None, "per-token"),
        ("vit with LayerScale", "W4A16", None, "per-tensor"),
        ("swin", "W4A16", None, "per-tensor"),
        ("vit with LayerScale", "W2A16-g8", "lqer:4", "per-tensor"),
        ("vit with LayerScale", "W3A16", None, "per-tensor"),
        ("vit with LayerScale", "W4A8-e8", "srr:4", "per-tensor"),
    ],
)
def test_the_qdq_flavour_takes_every_scheme_in_standard_operators(
    model: str, scheme: str, lowrank: str | None, strategy: str, tmp_path: Path
):
    made = make(model, scheme, lowrank, strategy)
    write(trace_quantized(made, "hash"), "qdq", tmp_path / "m.onnx")
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_qdq_flavour_holds_the_very_codes_scales_and_zero_points(bits: int, tmp_path: Path):
    for scheme, transposed in ((f"W{bits}A8", True), (f"W{bits}A16-g16", False)):
        made = make("vit", scheme)
        write(trace_quantized(made, "hash"), "qdq", tmp_path / "m.onnx")
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


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("vit with LayerScale", scheme)
        for scheme in ("W4A16-sym", "W4A16-g8-sym", "W3A16-g8-sym", "W2A16-sym", "W8A16-sym")
    ]
    + [("swin", "W4A16-g8-sym"), ("vit", "W8A16-sym-e8")],
)
def test_the_symmetric_form_is_what_tensorrt_takes(model: str, scheme: str, tmp_path: Path):
    made = make(model, scheme)
    write(trace_quantized(made, "hash"), "qdq", tmp_path / "m.onnx", SYMMETRIC)
    assert agree(made, tmp_path / "m.onnx", level="1")
    graph, found = onnx.load(tmp_path / "m.onnx"), initializers(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import} == {"": 21}
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
    wide = made.scheme.weight.num_bits == 8
    for node in weights:
        codes, scale = node.input  # no zero point
        assert types[codes] == (onnx.TensorProto.INT8 if wide else onnx.TensorProto.INT4)
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
    assert metadata(tmp_path / "m.onnx")["container_bits"] == ("8" if wide else "4")
    assert metadata(tmp_path / "m.onnx")["symmetric"] == "True"


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes of the last axis's bytes, lowest bits first."""
    parts = (packed[..., None] >> np.arange(0, 8, bits)) & (2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1).astype(np.int32)


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank"),
    [
        ("vit with LayerScale", "W2A16", None),
        ("vit with LayerScale", "W3A16", None),
        ("vit with LayerScale", "W8A16", None),
        ("vit with LayerScale", "W4A16-sym", "srr:4"),
        ("vit with LayerScale", "W4A16-g32", "lqer:4:int8"),
        ("vit with LayerScale", "W3A16-mxint", None),
        ("swin", "W4A16", None),
        ("vit", "W8A16-e8", None),
    ],
)
def test_matmulnbits_holds_the_weight_that_torch_multiplies_with(
    model: str, scheme: str, lowrank: str | None, tmp_path: Path
):
    made = make(model, scheme, lowrank)
    write(trace_quantized(made, "hash"), "matmulnbits", tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    found = initializers(tmp_path / "m.onnx")
    nodes = [
        node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "MatMulNBits"
    ]
    bits = {3: 4}.get(made.scheme.weight.num_bits, made.scheme.weight.num_bits)
    assert metadata(tmp_path / "m.onnx")["container_bits"] == str(bits)
    assert metadata(tmp_path / "m.onnx")["accuracy_level"] == "1"
    weights = {}
    for node in nodes:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert attributes["accuracy_level"] == 1
        assert attributes["bits"] == bits
        blocks, size = -(-attributes["K"] // attributes["block_size"]), attributes["block_size"]
        codes, scale, zero_point = (found[name] for name in node.input[1:4])
        codes = (
            unpacked(codes, bits).reshape(attributes["N"], blocks, size)
            - unpacked(zero_point, bits)[:, :blocks, None]
        )
        weights[node.input[1].removesuffix(".weight_codes")] = (
            codes.astype(np.float32) * scale[..., None]
        ).reshape(attributes["N"], -1)[:, : attributes["K"]]
    path = next(path for path in quantized_linears(made.module) if path.endswith("fc1"))
    np.testing.assert_array_equal(
        weights[path], quantized_linears(made.module)[path].weight.numpy()
    )


@pytest.mark.parametrize(
    ("group", "block"),
    [(384, 128), (192, 64), (96, 32), (48, 16), (24, 16), (1536, 128), (128, 128)],
)
def test_a_block_is_as_large_as_divides_the_group(group: int, block: int):
    assert block_size(group) == block


def test_accuracy_level_4_is_another_model_and_must_be_asked_for(tmp_path: Path):
    made = make("vit", "W4A16")
    write(trace_quantized(made, "hash"), "matmulnbits", tmp_path / "m.onnx", {"accuracy_level": 4})
    assert not agree(made, tmp_path / "m.onnx")
    assert metadata(tmp_path / "m.onnx")["accuracy_level"] == "4"
    with pytest.raises(
        MarrqError, match=r"accuracy level must be 1 \(float32\) or 4 \(int8\): got 2"
    ):
        check_flavor(made, "matmulnbits", {"accuracy_level": 2})


@pytest.mark.parametrize(
    ("flavor", "scheme", "strategy", "opset"),
    [
        ("integer", "W3A8", "per-tensor", 23),
        ("integer", "W2A8", "per-token", 25),
        ("qdq", "W8A8", "per-tensor", 20),
        ("qdq", "W8A16", "per-tensor", 21),
        ("qdq", "W2A8", "per-token", 25),
        ("matmulnbits", "W4A16", "per-tensor", 23),
    ],
)
def test_a_file_asks_for_no_more_than_it_needs_and_counts_its_own_bits(
    flavor: str, scheme: str, strategy: str, opset: int, tmp_path: Path
):
    made = make("vit", scheme, strategy="per-token")
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    assert graph.ir_version == IR_VERSIONS[opset]
    assert metadata(tmp_path / "m.onnx")["flavor"] == flavor
    assert float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) == pytest.approx(
        bits_per_weight(made.module), abs=0.05
    )


@pytest.mark.parametrize(
    ("flavor", "scheme", "strategy", "opset", "lowest"),
    [
        ("integer", "W3A8", "per-tensor", 20, "1.21.0"),
        ("integer", "W4A8", "per-token", 21, "1.23.0"),
        ("matmulnbits", "W4A16", "per-tensor", 20, "1.19.0"),
        ("matmulnbits", "W4A16-e8", "per-tensor", 20, "1.23.0"),
    ],
)
def test_without_fusion_a_file_asks_for_an_older_onnx_runtime_and_gives_the_same_logits(
    flavor: str, scheme: str, strategy: str, opset: int, lowest: str, tmp_path: Path
):
    made = make("vit", scheme, strategy=strategy)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx", {"fuse": False})
    graph = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    assert metadata(tmp_path / "m.onnx")["lowest_onnxruntime"] == lowest
    assert agree(made, tmp_path / "m.onnx")


def test_repeated_scales_and_wider_containers_show_in_the_bits_per_weight(tmp_path: Path):
    made = make("swin", "W3A16")
    write(trace_quantized(made, "hash"), "matmulnbits", tmp_path / "m.onnx")
    assert (
        float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) > bits_per_weight(made.module) + 1
    )


REFUSALS = [
    (
        "integer",
        {},
        "W4A16",
        "per-tensor",
        "integer needs quantized activations: the artifact has W4A16; use --flavor matmulnbits or "
        "qdq",
    ),
    (
        "integer",
        {},
        "W4A8-g8",
        "per-token",
        "than the float model: the artifact has W4A8-g8 per-token; use --flavor qdq",
    ),
    (
        "matmulnbits",
        {},
        "W4A8",
        "per-tensor",
        "matmulnbits needs float activations: the artifact has W4A8 per-tensor; use --flavor "
        "integer",
    ),
    (
        "matmulnbits",
        {},
        "W4A16-g8",
        "per-tensor",
        "no group size that is no multiple of 16: the artifact has W4A16-g8; use --flavor qdq",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W4A16",
        "per-tensor",
        "needs weights with zero point 0 and float activations, --scheme W4A16-g128-sym",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W4A8-sym",
        "per-tensor",
        "needs weights with zero point 0 and float activations, --scheme W4A16-g128-sym",
    ),
    (
        "qdq",
        SYMMETRIC,
        "W8A16-g8-sym",
        "per-tensor",
        "no group scales for 8-bit weights, --scheme W8A16-sym has none",
    ),
    (
        "integer",
        SYMMETRIC,
        "W4A8",
        "per-tensor",
        "--symmetric is no option of 'integer': use it with --flavor qdq",
    ),
    (
        "fp32",
        {"accuracy_level": 1},
        "W4A8",
        "per-tensor",
        "--accuracy-level is no option of 'fp32': use it with --flavor matmulnbits",
    ),
    (
        "qdq",
        {"fuse": False},
        "W4A8",
        "per-tensor",
        "--no-fuse is no option of 'qdq': use it with --flavor integer or matmulnbits",
    ),
    (
        "int4",
        {},
        "W4A8",
        "per-tensor",
        "unknown flavor 'int4': choose one of integer, matmulnbits, qdq, fp32, fp16",
    ),
]


@pytest.mark.parametrize(("flavor", "options", "scheme", "strategy", "message"), REFUSALS)
def test_what_a_flavour_cannot_express_is_refused_with_the_flavour_that_can(
    flavor: str,
    options: dict[str, bool | int],
    scheme: str,
    strategy: str,
    message: str,
    tmp_path: Path,
):
    made = make("vit", scheme, strategy=strategy)
    with pytest.raises(MarrqError) as refused:
        write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx", options)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheme", "flavor"),
    [
        ("W4A8", "integer"),
        ("W3A16", "matmulnbits"),
        ("W4A16-g8", "qdq"),
        ("W4A8-g8", "qdq"),
        ("W2A16-mxint", "matmulnbits"),
    ],
)
def test_the_flavour_that_suits_a_scheme_is_found(scheme: str, flavor: str):
    assert suitable_flavor(make("vit", scheme)) == flavor


def test_the_qdq_flavour_can_express_every_scheme():
    for scheme in ("W2A3", "W3A8-g24-sym", "W4A16-mxint", "W8A16-g7"):
        assert FLAVORS["qdq"]().objection(parse_scheme(scheme, "per-token")) is None
