"""The doctor knows TensorRT's documented rules, and says which node breaks which."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from marrq.cli import main
from runtime.audit.graph import Graph
from runtime.doctor.file import WAY_TO_TENSORRT, examine_file
from runtime.doctor.tensorrt import RULES, broken_rules

INPUTS, OUTPUTS = 32, 6


class Built:
    """A linear x [n, 32] W [32, 6] in the form that TensorRT takes, which a test changes."""

    def __init__(self) -> None:
        self.opset = 21
        self.arrays: dict[str, Any] = {
            "x_scale": np.array(0.1, np.float16),
            "x_zero": np.array(0, np.int8),
            "codes": np.ones((INPUTS, OUTPUTS), np.int8),
            "w_scale": np.full(OUTPUTS, 0.01, np.float16),
        }
        self.nodes = {
            "quantize": helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
            "dequantize": helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["dq"]),
            "weight": helper.make_node("DequantizeLinear", ["codes", "w_scale"], ["w"], axis=1),
            "product": helper.make_node("MatMul", ["dq", "w"], ["y"]),
        }

    def put(self, name: str, operator: str, inputs: list[str], **attributes: Any) -> None:
        """Replace a node, or add one before the product; it makes what the old one made, or its
        own name."""
        made = list(self.nodes[name].output) if name in self.nodes else [name]
        node = helper.make_node(operator, inputs, made, **attributes)
        product = self.nodes.pop("product")
        self.nodes[name] = node
        # Nodes stand in the order of execution.
        self.nodes["product"] = self.nodes.pop("product", product)

    def graph(self) -> Graph:
        """The model; every node has the name under which the tests know it."""
        for name, node in self.nodes.items():
            node.name = name
        body = helper.make_graph(
            list(self.nodes.values()),
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", INPUTS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", OUTPUTS])],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        domains = {node.domain for node in self.nodes.values() if node.domain}
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(d, 1) for d in domains),
        ]
        return Graph(helper.make_model(body, opset_imports=opsets, ir_version=10))


def newer_opset(built: Built) -> None:
    built.opset = 26


def older_opset(built: Built) -> None:
    built.opset = 8


def late_opset(built: Built) -> None:
    built.opset = 23


def own_operator(built: Built) -> None:
    built.put("product", "MatMulNBits", ["dq", "w"], domain="com.microsoft", K=32, N=6)


def integer_product(built: Built) -> None:
    built.put("product", "MatMulInteger", ["q", "codes"])


def unsigned_activations(built: Built) -> None:
    built.arrays["x_zero"] = np.array(0, np.uint8)


def unsigned_by_default(built: Built) -> None:
    built.put("quantize", "QuantizeLinear", ["x", "x_scale"])
    built.put("dequantize", "DequantizeLinear", ["q", "x_scale"])


def two_bits(built: Built) -> None:
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int2)


def widened_codes(built: Built) -> None:
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int4)
    built.put("wide", "Cast", ["codes"], to=TensorProto.INT8)
    built.put("weight", "DequantizeLinear", ["wide", "w_scale"], axis=1)


def clipped_codes(built: Built) -> None:
    built.arrays |= {"low": np.array(-8, np.int8), "high": np.array(7, np.int8)}
    built.put("clip", "Clip", ["q", "low", "high"])
    built.put("dequantize", "DequantizeLinear", ["clip", "x_scale", "x_zero"])


def moved_zero(built: Built) -> None:
    built.arrays["x_zero"] = np.array(3, np.int8)


def zero_at_run_time(built: Built) -> None:
    built.put("zero", "Cast", ["x"], to=TensorProto.INT8)
    built.nodes = {"zero": built.nodes.pop("zero"), **built.nodes}
    built.nodes["quantize"].input[2] = "zero"


def scale_of_zero(built: Built) -> None:
    built.arrays["w_scale"][2] = 0


def negative_scale(built: Built) -> None:
    built.arrays["x_scale"] = np.array(-1, np.float16)


def scale_at_run_time(built: Built) -> None:
    built.put("found", "ReduceMax", ["x"], keepdims=0)
    built.nodes = {"found": built.nodes.pop("found"), **built.nodes}
    built.nodes["quantize"].input[1] = built.nodes["dequantize"].input[1] = "found"


def scales_of_inputs(built: Built) -> None:
    built.arrays["w_scale"] = np.full(INPUTS, 0.01, np.float16)
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0)


def scales_that_do_not_fit(built: Built) -> None:
    built.arrays["w_scale"] = np.full(5, 0.01, np.float16)


def scales_of_channels(built: Built) -> None:
    built.arrays["x_scale"] = np.full(INPUTS, 0.1, np.float16)
    built.arrays["x_zero"] = np.zeros(INPUTS, np.int8)


def blocks_on_two_axes(built: Built) -> None:
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int4)
    built.arrays["w_scale"] = np.full((2, 3), 0.01, np.float16)
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0, block_size=16)
    float_activations(built)


def ragged_blocks(built: Built) -> None:
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int4)
    built.arrays["w_scale"] = np.full((3, OUTPUTS), 0.01, np.float16)
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0, block_size=12)
    float_activations(built)


def blocks_of_int8(built: Built) -> None:
    built.arrays["w_scale"] = np.full((2, OUTPUTS), 0.01, np.float16)
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0, block_size=16)


def narrow_activations(built: Built) -> None:
    built.arrays["x_zero"] = np.array(0, ml_dtypes.int4)


def odd_codes(built: Built) -> None:
    built.arrays["codes"] = np.ones((INPUTS, 5), ml_dtypes.int4)
    built.arrays["w_scale"] = np.full(5, 0.01, np.float16)
    float_activations(built)


def float_activations(built: Built) -> None:
    del built.nodes["quantize"], built.nodes["dequantize"]
    built.put("product", "MatMul", ["x", "w"])


def scaled_weight(built: Built) -> None:
    built.arrays["half"] = np.array(0.5, np.float16)
    built.put("scaled", "Mul", ["w", "half"])
    built.put("product", "MatMul", ["dq", "scaled"])


def codes_of_two_types(built: Built) -> None:
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int4)


BROKEN: list[tuple[Callable[[Built], None], str, str, str, str]] = [
    (newer_opset, "opset", "problem", "", "opset 26 is not read"),
    (older_opset, "opset", "problem", "", "opset 8 is not read"),
    (late_opset, "opset", "warning", "", "parsers of TensorRT 10 end at 20 to 22"),
    (own_operator, "operator", "problem", "product", "MatMulNBits of com.microsoft is no standard"),
    (integer_product, "operator", "problem", "product", "MatMulInteger is not read"),
    (unsigned_activations, "type", "problem", "quantize", "uint8 codes are not taken"),
    (unsigned_by_default, "type", "problem", "quantize", "uint8 codes are not taken"),
    (two_bits, "type", "problem", "weight", "int2 codes are not taken"),
    (widened_codes, "codes", "problem", "wide", "Cast reads int4 codes"),
    (clipped_codes, "codes", "problem", "clip", "Clip reads int8 codes"),
    (moved_zero, "zero point", "problem", "quantize", "its zero point is 3, and has to be 0"),
    (zero_at_run_time, "zero point", "problem", "quantize", "found at run time, and has to be 0"),
    (scale_of_zero, "scale", "problem", "weight", "its scale has 0, and every scale has to be"),
    (negative_scale, "scale", "problem", "quantize", "its scale has -1"),
    (
        scale_at_run_time,
        "scale",
        "problem",
        "quantize",
        "found at run time, and has to be constant",
    ),
    (scales_of_inputs, "axis", "problem", "weight", "for each output, here axis 1"),
    (scales_that_do_not_fit, "axis", "problem", "weight", "its 5 scales do not fit axis 1"),
    (
        scales_of_channels,
        "axis",
        "problem",
        "quantize",
        "a scale for each channel, and may have one",
    ),
    (blocks_on_two_axes, "block", "problem", "weight", "block more than one axis"),
    (ragged_blocks, "block", "problem", "weight", "do not divide [32, 6] into whole blocks"),
    (blocks_of_int8, "block", "warning", "weight", "blocks for int4 alone"),
    (narrow_activations, "weight only", "problem", "quantize", "int4, which is for weights alone"),
    (odd_codes, "weight only", "problem", "weight", "the last axis of its int4 codes [32, 5]"),
    (scaled_weight, "between", "warning", "product", "Mul stands between DequantizeLinear"),
    (float_activations, "between", "warning", "product", "its activations are no codes"),
    (codes_of_two_types, "between", "warning", "product", "are int8 and its weight is int4"),
]


def test_the_form_that_tensorrt_documents_breaks_no_rule():
    assert broken_rules(Built().graph()) == []
    # INT4 weights beside float activations, in blocks.
    built = Built()
    built.arrays["codes"] = built.arrays["codes"].astype(ml_dtypes.int4)
    built.arrays["w_scale"] = np.full((2, OUTPUTS), 0.01, np.float16)
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0, block_size=16)
    float_activations(built)
    assert broken_rules(built.graph()) == []
    # A weight as nn.Linear has it, with its Transpose.
    built = Built()
    built.arrays["codes"] = built.arrays["codes"].T.copy()
    built.put("weight", "DequantizeLinear", ["codes", "w_scale"], axis=0)
    built.put("turned", "Transpose", ["w"])
    built.put("product", "MatMul", ["dq", "turned"])
    assert broken_rules(built.graph()) == []


@pytest.mark.parametrize(
    ("change", "rule", "level", "node", "sentence"), BROKEN, ids=[row[0].__name__ for row in BROKEN]
)
def test_a_broken_rule_is_told_with_its_node(
    change: Callable[[Built], None], rule: str, level: str, node: str, sentence: str
):
    built = Built()
    change(built)
    found = broken_rules(built.graph())
    # Some changes break a second rule too, behind their own.
    told = [(one.rule, one.level, one.node) for one in found if sentence in one.sentence]
    assert (rule, level, node) in told
    assert {one.rule for one in found} <= {rule, "type", "between", "axis"}


def test_every_rule_has_a_graph_that_breaks_it():
    assert {row[1] for row in BROKEN} == set(RULES)


def test_numbers_in_a_file_beside_the_model_are_read(tmp_path: Path):
    built = Built()
    moved_zero(built)
    onnx.save(
        built.graph().model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    found = broken_rules(Graph.load(tmp_path / "m.onnx"), tmp_path)
    assert {one.rule for one in found} == {"zero point"}


def test_a_rule_is_one_sentence_and_a_file_of_marrqs_has_one_way_out(
    integer_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["doctor", str(integer_file), "--tensorrt"]) == 3
    printed = capsys.readouterr()
    found = examine_file(integer_file, tensorrt=True)
    rules = {one.rule for one in found.tensorrt or () if one.level == "problem"}
    assert len(found.broken("problem")) == len(rules) > 1
    assert printed.err == f"marrq: {len(rules)} rules of TensorRT are broken, see above\n"
    assert WAY_TO_TENSORRT in " ".join(printed.out.split())


def test_the_doctor_says_which_rules_are_broken_and_exits_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    built, file, report = Built(), tmp_path / "m.onnx", tmp_path / "d.json"
    onnx.save(built.graph().model, file)
    assert main(["doctor", str(file), "--tensorrt", "--json", str(report)]) == 0
    assert "breaks none of the documented rules; it was not run" in capsys.readouterr().out
    assert json.loads(report.read_text())["files"][0]["tensorrt"] == []
    moved_zero(built)
    onnx.save(built.graph().model, file)
    assert main(["doctor", str(file), "--tensorrt", "--json", str(report)]) == 3
    printed = capsys.readouterr()
    assert "problems with zero point" in printed.out
    assert "for TensorRT" not in printed.out, "the way out is marrq's own"
    assert printed.err.splitlines()[-1] == "marrq: 1 rule of TensorRT is broken, see above"
    [problem] = json.loads(report.read_text())["problems"]
    assert problem.startswith("TensorRT, 'quantize' and 1 other: its zero point is ")
    broken = json.loads(report.read_text())["files"][0]["tensorrt"]
    assert [(one["node"], one["rule"], one["level"]) for one in broken] == [
        ("quantize", "zero point", "problem"),
        ("dequantize", "zero point", "problem"),
    ]
    assert main(["doctor", str(file), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["files"][0]["tensorrt"] is None
    assert main(["doctor", "--tensorrt"]) == 1
