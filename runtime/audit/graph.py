"""An ONNX graph, as far as one has to know it to tell what runs: who makes a value, what is
constant, and which nodes multiply.

Only the shapes and types of tensors are read, never their numbers, so a file of any size is looked
through at once. Subgraphs of If and Loop are not looked into: no vision transformer has a linear
there."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import message
from onnx import NodeProto, TensorProto, helper

from runtime.errors import BenchError


@dataclass(frozen=True)
class Operands:
    """Places among the inputs of an operator that multiplies: the first operand and the second one;
    the zero point of the first, and scale and zero point of the second, where the operator takes
    them."""

    first: int = 0
    second: int = 1
    first_zero_point: int | None = None
    second_grid: tuple[int, ...] = ()


PRODUCTS = {
    "MatMul": Operands(),
    "FusedMatMul": Operands(),
    "Gemm": Operands(),
    "FusedGemm": Operands(),
    "Conv": Operands(),
    "FusedConv": Operands(),
    "MatMulInteger": Operands(first_zero_point=2, second_grid=(3,)),
    "ConvInteger": Operands(first_zero_point=2, second_grid=(3,)),
    "DynamicQuantizeMatMul": Operands(second_grid=(2, 3)),
    "MatMulIntegerToFloat": Operands(first_zero_point=4, second_grid=(3, 5)),
    "MatMulNBits": Operands(second_grid=(2, 3, 4)),
    "QLinearMatMul": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
    "QLinearConv": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
    "QGemm": Operands(second=3, first_zero_point=2, second_grid=(4, 5)),
}
"""Operators that multiply two operands."""

MOVING = (
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Split",
    "Slice",
    "Gather",
    "Clip",
)
"""Operators that move numbers about, or cut them, and leave their type."""

TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Product:
    """A node that multiplies. activation: name of the operand that depends on the images; weight:
    of the constant one, None where both depend on the images; grid: names of the weight's scale and
    zero point, where the operator takes them."""

    node: NodeProto
    activation: str
    weight: str | None
    grid: tuple[str, ...]


@dataclass
class Graph:
    """The graph of a model whose tensors need not be loaded."""

    model: onnx.ModelProto
    nodes: list[NodeProto] = field(init=False)
    initializers: dict[str, TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        """Constants written as nodes are initializers like the others."""
        graph = self.model.graph
        constants = {
            node.output[0]: attribute(node, "value")
            for node in graph.node
            if node.op_type == "Constant" and attribute(node, "value")
        }
        self.initializers = {tensor.name: tensor for tensor in graph.initializer} | constants
        self.nodes = [node for node in graph.node if node.output[0] not in constants]

    @classmethod
    def load(cls, file: Path) -> "Graph":
        """From a file; weights in files beside it stay there. Raises BenchError for a file that is
        none."""
        try:
            model = onnx.load(file, format="protobuf", load_external_data=False)
        except message.DecodeError:
            model = onnx.ModelProto()
        if not model.HasField("graph"):  # as protobuf reads an empty file
            raise BenchError(
                f"{str(file)!r} is no ONNX file, or not the whole of one: export or copy it again"
            )
        return cls(model)

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        """The node that makes each value."""
        return {output: node for node in self.nodes for output in node.output if output}

    @cached_property
    def consumers(self) -> dict[str, list[NodeProto]]:
        """The nodes that use each value."""
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def products(self) -> list[Product]:
        """All nodes that multiply something that depends on the images."""
        found = []
        for node in self.nodes:
            if node.op_type in PRODUCTS:
                places = PRODUCTS[node.op_type]
                a, b = node.input[places.first], node.input[places.second]
                if b not in self._constants:
                    a, b = b, a
                if a not in self._constants:
                    grid = tuple(
                        node.input[place]
                        for place in places.second_grid
                        if place < len(node.input) and node.input[place]
                    )
                    found.append(
                        Product(node, a, b, grid)
                        if b in self._constants
                        else Product(node, b, None, ())
                    )
        return found

    @cached_property
    def _constants(self) -> set[str]:
        """Values that no input of the graph has a part in."""
        found = set(self.initializers)
        for node in self.nodes:  # which are in the order of execution
            if node.input and found.issuperset(filter(None, node.input)):
                found.update(node.output)
        return found

    @cached_property
    def _described(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Type and shape of values, where the file says them."""
        graph = self.model.graph
        return {
            info.name: info.type.tensor_type
            for info in (*graph.value_info, *graph.input, *graph.output)
        }

    def type_of(self, value: str) -> str:
        """The type of a value's elements as `int8` or `float32`, "unknown" where neither the file
        nor its operators say it."""
        if value in self.initializers:
            return type_name(self.initializers[value].data_type)
        if value in self._described:
            return type_name(self._described[value].elem_type)
        node = self.producers.get(value)
        if node is None or node.op_type in PRODUCTS:
            return "unknown"
        if node.op_type == "QuantizeLinear":
            return (
                self.type_of(node.input[2])
                if len(node.input) > 2
                else type_name(attribute(node, "output_dtype", 0) or TensorProto.UINT8)
            )
        if node.op_type == "DynamicQuantizeLinear":
            return "uint8"
        if node.op_type == "Cast":
            return type_name(attribute(node, "to"))
        return self.type_of(
            node.input[1 if node.op_type == "DequantizeLinear" else 0]
        )  # the others leave it as it is

    def shape_of(self, value: str) -> list[int] | None:
        """The lengths of a value's axes, 0 where one is free; None where the file does not say
        them."""
        if value in self.initializers:
            return list(self.initializers[value].dims)
        if value not in self._described or not self._described[value].HasField("shape"):
            return None
        return [axis.dim_value for axis in self._described[value].shape.dim]

    def bits_of(self, initializer: str) -> int:
        """What an initializer takes in the file."""
        return self.elements_of(initializer) * bits_of_type(self.type_of(initializer))

    def elements_of(self, initializer: str) -> int:
        """How many numbers it has."""
        return math.prod(self.initializers[initializer].dims)

    def origins(self, value: str) -> set[str]:
        """The initializers that a value is made from."""
        return {
            name
            for name in self.behind([value], lambda node: node.input)
            if name in self.initializers
        }

    def origin(self, constant: str) -> tuple[str, list[NodeProto]]:
        """The largest initializer that a constant is made from, and the nodes on the way back to
        it."""
        way = []
        while constant not in self.initializers:
            way.append(self.producers[constant])
            constant = max(
                filter(None, way[-1].input),
                key=lambda name: max(map(self.elements_of, self.origins(name)), default=0),
            )
        return constant, way

    def behind(
        self, values: Iterable[str], inputs: Callable[[NodeProto], Iterable[str]]
    ) -> list[str]:
        """The values and what they are made from, nearest first. inputs: of a node that are to be
        followed."""
        return _reached(
            values, lambda value: inputs(self.producers[value]) if value in self.producers else ()
        )

    def ahead(
        self, values: Iterable[str], outputs: Callable[[NodeProto], Iterable[str]]
    ) -> list[str]:
        """The values and what is made from them, nearest first. outputs: of a node that are to be
        followed."""
        return _reached(
            values,
            lambda value: [
                name for node in self.consumers.get(value, ()) for name in outputs(node)
            ],
        )


def size_bytes(path: Path) -> int:
    """The size of a model: its file, and those beside it that hold its tensors."""
    tensors = Graph.load(path).initializers.values()
    beside = {
        entry.value
        for tensor in tensors
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(place.stat().st_size for place in (path, *(path.parent / name for name in beside)))


def _reached(values: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> list[str]:
    """Breadth first."""
    reached = dict.fromkeys(values)
    waiting = list(reached)
    for value in waiting:  # grows as it is gone through
        new = [name for name in neighbours(value) if name and name not in reached]
        reached.update(dict.fromkeys(new))
        waiting += dict.fromkeys(new)
    return waiting


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    return next(
        (helper.get_attribute_value(found) for found in node.attribute if found.name == name),
        default,
    )


def type_name(number: int) -> str:
    """`float32`, `int4` and so on, of ONNX's number for a type."""
    name: str = TensorProto.DataType.Name(number).lower()
    return TYPES.get(name, name)


def bits_of_type(name: str) -> int:
    """Bits of a number of that type in a file."""
    match = re.search(r"\d+", name)
    return int(match[0]) if match else 8  # bool
