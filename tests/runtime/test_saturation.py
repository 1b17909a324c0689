"""Where sums of two products leave 16 bits, on which processors, and who says so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_models import noise, quantized, vit

from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.cli import main
from marrq.quantizers.linear import quantized_linears
from marrq.quantizers.salient import joint_range
from runtime.audit import saturation
from runtime.audit.inspect import inspect_file
from runtime.audit.linears import examine
from runtime.audit.rows import audit
from runtime.audit.saturation import saturating_pairs, where_it_saturates
from runtime.environment import Machine
from runtime.session import SessionSettings


def linear(file: Path, codes: np.ndarray) -> Path:
    """QuantizeLinear, then MatMulIntegerToFloat: a linear as marrq's files have it."""
    names = ["a", "w", "x_scale", "w_scale", "x_zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["a"]),
        helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft"),
    ]
    arrays = {
        "w": codes,
        "x_scale": np.array(0.1, np.float32),
        "w_scale": np.ones(codes.shape[1], np.float32),
        "x_zero": np.array(128, np.uint8),
    }
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(codes)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", codes.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    return file


def on(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    machine = Machine("P", flags, 2, "S", "3.11")
    monkeypatch.setattr(saturation, "describe_machine", lambda: machine)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_pairs_are_those_that_a_sum_of_all_extreme_activations_finds(bits: int):
    generator = np.random.default_rng(0)
    codes = generator.integers(-128, 128, (9, 40)).astype(np.int8)
    largest, expected = 2**bits - 1, 0
    for column in codes.astype(np.int64).T:
        for start in range(0, 9, 2):
            pair = column[start : start + 2]
            sums = [
                int(np.dot(pair, activations[: len(pair)]))
                for activations in np.stack(np.meshgrid([0, largest], [0, largest])).reshape(2, 4).T
            ]
            expected += max(sums) > 32767 or min(sums) < -32768
    assert saturating_pairs(codes, bits) == expected
    assert (expected > 0) == (bits == 8)


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-64, 63)])
def test_no_code_of_four_bits_or_of_marrqs_eight_bit_range_can_saturate(low: int, high: int):
    codes = np.full((64, 8), low, np.int8)
    codes[:, ::2] = high
    assert saturating_pairs(codes, 8) == 0
    wide = codes.copy()
    wide[0:2] = 65
    assert saturating_pairs(wide, 8) == 8


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (("avx", "avx2"), "here"),
        (("avx", "avx2", "avx_vnni"), "without VNNI"),
        (("avx", "avx512f", "avx512_vnni"), "without VNNI"),
        (("asimd", "asimddp"), "without VNNI"),
        (("asimd",), "without VNNI"),
        ((), "without VNNI"),
    ],
)
def test_sums_saturate_on_x86_without_dot_products_alone(
    flags: tuple[str, ...], where: str, monkeypatch: pytest.MonkeyPatch
):
    on(monkeypatch, *flags)
    assert where_it_saturates() == where


def test_inspect_says_for_each_linear_whether_its_sums_can_saturate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    random = np.random.default_rng(0)
    wide = linear(tmp_path / "wide.onnx", random.integers(-128, 128, (32, 16)).astype(np.int8))
    narrow = linear(tmp_path / "narrow.onnx", random.integers(-64, 64, (32, 16)).astype(np.int8))
    unsigned = linear(tmp_path / "u8.onnx", random.integers(0, 256, (32, 16)).astype(np.uint8))
    on(monkeypatch, "avx", "avx2")
    for file, where in ((wide, "here"), (narrow, None), (unsigned, None)):
        [row] = audit(examine(file, SessionSettings()))
        assert row.saturates == where
    assert main(["inspect", str(wide), "--json", str(tmp_path / "i.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "sums of two products saturate on this processor, which has no VNNI" in out
    assert json.loads((tmp_path / "i.json").read_text())["audit"][0]["saturates"] == "here"
    assert main(["inspect", str(narrow)]) == 0
    assert "none: no sum of two products leaves 16 bits" in capsys.readouterr().out
    on(monkeypatch, "avx", "avx2", "avx_vnni")
    assert main(["inspect", str(wide)]) == 0
    assert "on x86 processors without VNNI" in " ".join(capsys.readouterr().out.split())
    assert inspect_file(wide, SessionSettings()).audit[0].saturates == "without VNNI"


@pytest.mark.parametrize("flavor", ["integer", pytest.param("qdq", marks=pytest.mark.slow)])
def test_salient_columns_with_the_extreme_codes_of_4_bit_weights_cannot_saturate(
    flavor: str, tmp_path: Path
):
    made = quantized(vit(depth=1), noise(4), "W4A8", "rtn,lowrank=serq:64")
    # Neighbours have the same extreme code: no other codes add up to more.
    for path in quantized_linears(made.module):
        codes = made.module.get_submodule(path).codes
        codes[::2], codes[1::2] = joint_range(4)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    rows = audit(examine(tmp_path / "m.onnx", SessionSettings(threads=1)))
    products = [row for row in rows if row.nominal == "W4A8"]
    assert {row.operator for row in products} == {"MatMulIntegerToFloat"}
    assert {row.saturates for row in products} == {None}
