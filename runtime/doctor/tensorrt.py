"""Whether TensorRT would take the quantized layers of an ONNX file, by its documented rules.

The rules are those of NVIDIA's documentation of autumn 2026 (Working with Quantized Types, Explicit
Quantization, the Quantize and Dequantize layers, ONNX Opset Guide of TensorRT 11) and of the checks
in its open ONNX parser (onnx-tensorrt). TensorRT itself is not asked, and was not at hand when this
was written: what breaks no rule here may still be refused there.

    problem    TensorRT refuses the file
    warning    it takes the file, but a product does not run on integers, or not in every release
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from runtime.audit.graph import Graph, Product
from runtime.audit.nodes import MOVING, PRODUCTS, attribute
from runtime.records import Record

Level = Literal["problem", "warning"]

OPSETS = (9, 25)
"""First and last opset that the parser of TensorRT 11 reads."""

OPSET_OF_10 = 22
"""Last opset that the documentation of a parser of TensorRT 10 names; 10.0 ends at 20."""

CODE_TYPES = ("int8", "int4", "float8e4m3fn", "float4e2m1")
"""Types that represent quantized numbers."""

QUANTIZED_TYPES = (*CODE_TYPES, "uint8", "uint4", "int2", "uint2", "int16", "uint16", "float8e5m2")
"""Types that other tools quantize to."""

WEIGHT_ONLY = ("int4",)
"""Types that activations cannot have."""

UNSUPPORTED = (
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "ConvInteger",
    "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
)  # fmt: skip
"""Standard operators of quantized graphs that the parser does not read."""

PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class BrokenRule(Record):
    """A node that breaks a rule, in a sentence. rule: a key of RULES; node: the node's name, or the
    name of what it makes; "" if the whole file breaks the rule."""

    node: str
    rule: str
    level: Level
    sentence: str


Found = tuple[NodeProto | None, Level, str]
"""A node, or None for the whole file; how much it matters; what is wrong."""


def broken_rules(graph: Graph, folder: Path = Path()) -> list[BrokenRule]:
    """What TensorRT would not take, in the order of RULES. folder: where tensors lie that are in
    files beside the model."""
    file = _File(graph, folder)
    return [
        BrokenRule("" if node is None else name_of(node), rule, level, sentence)
        for rule, look in RULES.items()
        for node, level, sentence in look(file)
    ]


def name_of(node: NodeProto) -> str:
    """What a node is called."""
    return node.name or node.output[0]


@dataclass
class _File:
    """A graph, and the numbers of its small tensors."""

    graph: Graph
    folder: Path

    @cached_property
    def pairs(self) -> list[NodeProto]:
        """All QuantizeLinear and DequantizeLinear."""
        return [node for node in self.graph.nodes if node.op_type in PAIR and not node.domain]

    @cached_property
    def constants(self) -> set[str]:
        """Values that depend on no input of the graph."""
        found = set(self.graph.initializers)
        for node in self.graph.nodes:
            if found.issuperset(filter(None, node.input)):
                found.update(node.output)
        return found

    def numbers(self, name: str) -> NDArray[np.generic] | None:
        """The numbers of an initializer; None if it is none, or if its file is missing."""
        tensor = self.graph.initializers.get(name)
        if tensor is None:
            return None
        try:
            return numpy_helper.to_array(tensor, str(self.folder))
        except (OSError, ValueError):
            return None

    def code_type(self, node: NodeProto) -> str:
        """The type of the codes that a node of a pair makes or takes."""
        # The type of the zero point, if there is one, is that of the codes.
        codes = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
        return self.graph.type_of(codes)

    def grid(self, node: NodeProto) -> tuple[str, str | None]:
        """Names of scale and zero point."""
        # An optional input that is left out may still have a place.
        zero_point = node.input[2] if len(node.input) > 2 else ""
        return node.input[1], zero_point or None

    def codes_shape(self, node: NodeProto) -> list[int] | None:
        """Lengths of the axes of what a node of a pair quantizes; None if the file does not say."""
        return self.graph.shape_of(node.input[0]) or self.graph.shape_of(node.output[0])

    def is_weight(self, node: NodeProto) -> bool:
        """Whether a node of a pair works on a constant."""
        return node.input[0] in self.constants

    def scales(self, node: NodeProto) -> list[int]:
        """Lengths of the axes of a scale; [] for a single number, and for one that is not known."""
        shape = self.graph.shape_of(node.input[1])
        # A single number may be written as a list of one.
        return [] if shape is None or shape == [1] else shape


def _opset(file: _File) -> Iterator[Found]:
    # A file that names no opset is of opset 1.
    stated = [entry.version for entry in file.graph.model.opset_import if not entry.domain]
    opset, (first, last) = max(stated, default=1), OPSETS
    if not first <= opset <= last:
        yield None, "problem", f"opset {opset} is not read: TensorRT 11 reads {first} to {last}"
    elif opset > OPSET_OF_10:
        sentence = f"opset {opset} is read by TensorRT 11; parsers of TensorRT 10 end at 20 to 22"
        yield None, "warning", sentence


def _operators(file: _File) -> Iterator[Found]:
    for node in file.graph.nodes:
        if node.domain:
            yield node, "problem", f"{node.op_type} of {node.domain} is no standard operator"
        elif node.op_type in UNSUPPORTED:
            yield node, "problem", f"{node.op_type} is not read: write Q/DQ pairs around a MatMul"


def _types(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        code_type = file.code_type(node)
        # A bias of int32 is dequantized by some tools.
        if code_type not in CODE_TYPES and code_type != "unknown":
            yield node, "problem", f"{code_type} codes are not taken: quantize to int8 or int4"


def _codes(file: _File) -> Iterator[Found]:
    for node in file.graph.nodes:
        # What moves codes about can change places with the pair; arithmetic cannot.
        if node.op_type in PAIR or (node.op_type in MOVING and node.op_type != "Clip"):
            continue
        # An operator that is not read at all is told by its own rule.
        if node.domain or node.op_type in UNSUPPORTED:
            continue
        # Zero points and codes are the only narrow inputs; images of uint8 may be cast.
        narrow = [name for name in node.input if name and _is_narrow(file, name)]
        if narrow:
            code_type = file.graph.type_of(narrow[0])
            yield (
                node,
                "problem",
                f"{node.op_type} reads {code_type} codes, which only DequantizeLinear may",
            )


def _is_narrow(file: _File, name: str) -> bool:
    # uint8 is a type of images too, as what comes in.
    images = {value.name for value in file.graph.model.graph.input}
    return name not in images and file.graph.type_of(name) in QUANTIZED_TYPES


def _zero_points(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        _, zero_point = file.grid(node)
        if zero_point is None:
            continue
        # Zero points that cannot be read here, because their file is missing, are not judged.
        numbers = file.numbers(zero_point)
        if zero_point not in file.constants:
            yield node, "problem", "its zero point is found at run time, and has to be 0"
        elif numbers is not None and bool(np.any(numbers.astype(np.float32))):
            first = numbers.astype(np.float32).reshape(-1)
            wrong = first[np.flatnonzero(first)[0]]
            yield node, "problem", f"its zero point is {wrong:g}, and has to be 0: use -sym schemes"


def _scales(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        scale, _ = file.grid(node)
        # A scale of 0 divides by 0, and a negative one turns codes around.
        numbers = file.numbers(scale)
        if scale not in file.constants:
            yield node, "problem", "its scale is found at run time, and has to be constant"
        elif numbers is not None and not bool(np.all(numbers.astype(np.float32) > 0)):
            least = float(numbers.astype(np.float32).min())
            yield node, "problem", f"its scale has {least:g}, and every scale has to be positive"


def _axes(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        scales, shape = file.scales(node), file.codes_shape(node)
        if len(scales) != 1 or shape is None:
            continue
        # ONNX's default axis, for DequantizeLinear too.
        axis = attribute(node, "axis", 1)
        if not file.is_weight(node):
            yield node, "problem", "its activations have a scale for each channel, and may have one"
        elif not -len(shape) <= axis < len(shape) or shape[axis] != scales[0]:
            yield node, "problem", f"its {scales[0]} scales do not fit axis {axis} of {shape}"
        else:
            yield from _output_channels(file, node, axis % len(shape), shape)


def _output_channels(file: _File, node: NodeProto, axis: int, shape: list[int]) -> Iterator[Found]:
    """A scale for each input channel cannot leave the sum of a product."""
    for product, turned in _products_behind(file, node):
        # The weight of Conv is [out, in, …]; that of MatMul and Gemm is [in, out] unless turned.
        out = 0 if product.node.op_type == "Conv" or turned else len(shape) - 1
        if axis != out:
            yield (
                node,
                "problem",
                f"its scales lie along axis {axis}, the inputs of {name_of(product.node)!r}: a "
                f"weight has a scale for each output, here axis {out}",
            )


def _blocks(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        scales, shape = file.scales(node), file.codes_shape(node)
        if len(scales) < 2 or shape is None or len(shape) != len(scales):
            continue
        code_type = file.code_type(node)
        # Along every other axis each element has its own scale.
        blocked = [axis for axis in range(len(shape)) if shape[axis] != scales[axis]]
        if len(blocked) != 1 or blocked[0] < len(shape) - 2:
            yield node, "problem", f"its scales {scales} block more than one axis of {shape}"
        elif shape[blocked[0]] % scales[blocked[0]]:
            yield node, "problem", f"its scales {scales} do not divide {shape} into whole blocks"
        elif code_type == "int8":
            yield node, "warning", "TensorRT 10 has blocks for int4 alone, and these are int8"


def _weight_only(file: _File) -> Iterator[Found]:
    for node in file.pairs:
        code_type, shape = file.code_type(node), file.codes_shape(node)
        if code_type not in WEIGHT_ONLY:
            continue
        # Two codes share a byte, along the last axis.
        if not file.is_weight(node):
            yield node, "problem", f"its activations are {code_type}, which is for weights alone"
        elif shape and shape[-1] % 2:
            yield node, "problem", f"the last axis of its {code_type} codes {shape} has to be even"


def _between(file: _File) -> Iterator[Found]:
    for product in file.graph.products:
        if product.weight is None or product.node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        _, way = file.graph.origin(product.weight)
        # The way leads back from the product: what comes before the pair in it runs after.
        place = next((at for at, node in enumerate(way) if node.op_type == PAIR[1]), None)
        if place is None:
            continue
        between = [node.op_type for node in way[:place] if node.op_type != "Transpose"]
        if between:
            yield (
                product.node,
                "warning",
                f"{', '.join(between)} stands between DequantizeLinear and its weight: the product "
                "runs in float",
            )
        yield from _operands(file, product, way[place])


def _operands(file: _File, product: Product, weight: NodeProto) -> Iterator[Found]:
    """Both operands of an integer product are codes of one type."""
    code_type = file.code_type(weight)
    made_by = file.graph.producers.get(product.activation)
    # TensorRT fuses both pairs and the product to one integer product.
    quantized = made_by is not None and made_by.op_type == PAIR[1]
    if quantized and made_by is not None and file.code_type(made_by) != code_type:
        yield (
            product.node,
            "warning",
            f"its activations are {file.code_type(made_by)} and its weight is {code_type}: the "
            "product runs in float",
        )
    elif not quantized and code_type not in WEIGHT_ONLY:
        yield (
            product.node,
            "warning",
            f"its weight is {code_type} and its activations are no codes: the product runs in "
            "float, and only int4 weights stay small in the engine",
        )


def _products_behind(file: _File, node: NodeProto) -> Iterator[tuple[Product, bool]]:
    """Products that read what DequantizeLinear makes, and whether it is turned on the way."""
    turned, value = False, node.output[0]
    # A weight of nn.Linear is [out, in], and a Transpose makes [in, out] of it.
    while True:
        readers = file.graph.consumers.get(value, [])
        if len(readers) != 1 or readers[0].op_type != "Transpose":
            break
        turned, value = not turned, readers[0].output[0]
    for product in file.graph.products:
        # The weight is the second operand of the operators that are looked at.
        if product.weight == value and product.node.op_type in PRODUCTS:
            yield product, turned != bool(attribute(product.node, "transB", 0))


RULES: dict[str, Callable[[_File], Iterator[Found]]] = {
    "opset": _opset,
    "operator": _operators,
    "type": _types,
    "codes": _codes,
    "zero point": _zero_points,
    "scale": _scales,
    "axis": _axes,
    "block": _blocks,
    "weight only": _weight_only,
    "between": _between,
}
"""What is looked at, each rule in a function of its own."""
