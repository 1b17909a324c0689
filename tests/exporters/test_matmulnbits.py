"""The matmulnbits flavour holds the weight that torch multiplies with."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from flavor_files import agree, initializers, metadata, slow, traced

from exporters.flavors import check_flavor
from exporters.flavors.matmulnbits import block_size
from exporters.onnx_file import write
from marrq.errors import MarrqError
from marrq.quantizers.linear import bits_per_weight, quantized_linears


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes of the last axis's bytes, lowest bits first."""
    parts = (packed[..., None] >> np.arange(0, 8, bits)) & (2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1).astype(np.int32)


@pytest.mark.parametrize(
    ("model", "scheme", "lowrank"),
    [
        slow("vit with LayerScale", "W2A16", None),
        slow("vit with LayerScale", "W3A16", None),
        slow("vit with LayerScale", "W8A16", None),
        slow("vit with LayerScale", "W4A16-sym", "srr:4"),
        ("vit with LayerScale", "W4A16-g32", "lqer:4:int8"),
        ("vit with LayerScale", "W3A16-mxint", None),
        slow("swin", "W4A16", None),
        slow("vit", "W8A16-e8", None),
    ],
)
def test_matmulnbits_holds_the_weight_that_torch_multiplies_with(
    model: str, scheme: str, lowrank: str | None, tmp_path: Path
):
    trace = traced(model, scheme, lowrank)
    made = trace.model
    write(trace, "matmulnbits", tmp_path / "m.onnx")
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
    ("model", "scheme"),
    [
        ("vit with LayerScale", "W4A16"),
        slow("vit", "W2A16"),
        slow("vit", "W3A16-sym"),
        slow("swin", "W4A16"),
    ],
)
def test_salient_columns_are_a_second_node_on_their_inputs(model: str, scheme: str, tmp_path: Path):
    trace, file = traced(model, scheme, "serq:8"), tmp_path / "m.onnx"
    write(trace, "matmulnbits", file)
    assert agree(trace.model, file)
    nodes = [node for node in onnx.load(file).graph.node if node.op_type == "MatMulNBits"]
    depths = Counter(
        attribute.i for node in nodes for attribute in node.attribute if attribute.name == "K"
    )
    assert depths[8] == len(nodes) / 2
    gathers = [node for node in onnx.load(file).graph.node if "salient_columns" in str(node.input)]
    assert len(gathers) == depths[8]


def test_salient_columns_beside_group_scales_are_refused(tmp_path: Path):
    with pytest.raises(MarrqError, match=r"salient columns and group scales.* use --flavor qdq"):
        write(traced("vit", "W4A16-g16", "serq:8"), "matmulnbits", tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("group", "block"),
    [(384, 128), (192, 64), (96, 32), (48, 16), (24, 16), (1536, 128), (128, 128)],
)
def test_a_block_is_as_large_as_divides_the_group(group: int, block: int):
    assert block_size(group) == block


def test_accuracy_level_4_is_another_model_and_must_be_asked_for(tmp_path: Path):
    trace = traced("vit with LayerScale", "W3A16-mxint")
    made = trace.model
    write(trace, "matmulnbits", tmp_path / "m.onnx", {"accuracy_level": 4})
    assert not agree(made, tmp_path / "m.onnx")
    assert metadata(tmp_path / "m.onnx")["accuracy_level"] == "4"
    with pytest.raises(
        MarrqError, match=r"accuracy level must be 1 \(float32\) or 4 \(int8\): got 2"
    ):
        check_flavor(made.scheme, "matmulnbits", {"accuracy_level": 2})


@pytest.mark.slow
def test_repeated_scales_and_wider_containers_show_in_the_bits_per_weight(tmp_path: Path):
    trace = traced("swin", "W3A16")
    made = trace.model
    write(trace, "matmulnbits", tmp_path / "m.onnx")
    assert (
        float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) > bits_per_weight(made.module) + 1
    )
