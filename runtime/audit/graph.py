"""An ONNX graph, as far as the audit has to know it: which node makes a value, which values are
constant, and which nodes multiply.

Only shapes and types of tensors are read, never their numbers, so a file of any size is looked
through at once. Subgraphs of If and Loop are not looked into: no vision transformer has a linear
there.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx
from google.protobuf import message
from onnx import NodeProto, TensorProto, inliner

from runtime.audit.nodes import (
    BOOLEAN,
    FLOAT_PRODUCTS,
    Operands,
    attribute,
    bits_of_type,
    constant_tensor,
    operands,
    type_name,
)
from runtime.errors import BenchError
from runtime.metadata import Metadata

# These read of a value how large it is, and none of its numbers.
SIZE_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class Product:
    """A node that multiplies.

    activation: name of the operand that depends on the images.
    weight: name of the constant operand; None if both operands depend on the images.
    grid: names of the weight's scale and zero point, if the operator takes them.
    """

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
        # Constants that are written as nodes are initializers like the others.
        graph = self.model.graph
        tensors = {node.output[0]: constant_tensor(node) for node in graph.node if node.output}
        constants = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer} | constants
        self.nodes = [node for node in graph.node if node.output[0] not in constants]

    @classmethod
    def load(cls, file: Path) -> "Graph":
        """From a file; weights in files beside it stay there. Raises BenchError if the file is not
        a whole ONNX file."""
        try:
            model = onnx.load(file, format="protobuf", load_external_data=False)
        except message.DecodeError:
            # The same error as for an empty file comes below.
            model = onnx.ModelProto()
        # Protobuf reads an empty file as a model without a graph.
        if not model.HasField("graph"):
            raise BenchError(
                f"{str(file)!r} is no ONNX file, or not the whole of one: export or copy it again"
            )
        # Functions of the file's own are what their nodes are; ONNX's domain has two spellings.
        if model.functions:
            model = inliner.inline_local_functions(model)
        for named in (*model.graph.node, *model.opset_import):
            if named.domain == "ai.onnx":
                named.domain = ""
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
    def metadata(self) -> Metadata:
        """The file's own metadata."""
        return Metadata({entry.key: entry.value for entry in self.model.metadata_props})

    @cached_property
    def products(self) -> list[Product]:
        """All nodes that multiply something that depends on the images."""
        multiplying = ((node, places) for node in self.nodes if (places := operands(node)))
        found = (self._product(node, places) for node, places in multiplying)
        return [product for product in found if product is not None]

    def _product(self, node: NodeProto, places: Operands) -> Product | None:
        """A node that multiplies; None if both operands are constant."""
        # a: the operand that depends on the images; b: the weight.
        a, b = node.input[places.first], node.input[places.second]
        # MatMul takes its constant operand on either side.
        if b not in self._constants:
            a, b = b, a
        if a in self._constants:
            return None
        if b not in self._constants:
            return Product(node, b, None, ())
        there = (place for place in places.second_grid if place < len(node.input))
        return Product(node, a, b, tuple(node.input[place] for place in there if node.input[place]))

    @cached_property
    def depending_on_images(self) -> list[NodeProto]:
        """The nodes that read a number which was computed from the graph's input: neither constants
        nor arithmetic on shapes."""
        # Files of old opsets list initializers among the inputs.
        values = {value.name for value in self.model.graph.input} - set(self.initializers)
        found = []
        # Nodes are in the order of execution, so one pass finds all.
        for node in self.nodes:
            if node.op_type not in SIZE_READERS and not values.isdisjoint(node.input):
                found.append(node)
                values.update(filter(None, node.output))
        return found

    @cached_property
    def _constants(self) -> set[str]:
        """Values that depend on no input of the graph."""
        found = set(self.initializers)
        # Nodes are in the order of execution, so one pass finds all.
        for node in self.nodes:
            if node.input and found.issuperset(filter(None, node.input)):
                found.update(node.output)
        return found

    @cached_property
    def _described(self) -> dict[str, onnx.TypeProto.Tensor]:
        """Type and shape of the values for which the file says them."""
        graph = self.model.graph
        return {
            info.name: info.type.tensor_type
            for info in (*graph.value_info, *graph.input, *graph.output)
        }

    def type_of(self, value: str) -> str:
        """The type of a value's elements, as `int8` or `float32`; "unknown" if neither the file nor
        the operands of its node say it."""
        if value in self.initializers:
            return type_name(self.initializers[value].data_type)
        # Only some values have a type in the file; the others follow from their nodes.
        if value in self._described:
            return type_name(self._described[value].elem_type)
        node = self.producers.get(value)
        if node is None or (operands(node) and node.op_type not in FLOAT_PRODUCTS):
            return "unknown"
        if node.op_type in BOOLEAN:
            return "bool"
        if node.op_type == "DynamicQuantizeLinear":
            # Codes, scale and zero point.
            return "float32" if value == node.output[1] else "uint8"
        if node.op_type == "Cast":
            return type_name(attribute(node, "to"))
        if node.op_type == "QuantizeLinear":
            # The zero point has the type of the codes; without one an attribute may name the type.
            if len(node.input) > 2:
                return self.type_of(node.input[2])
            return type_name(attribute(node, "output_dtype", 0) or TensorProto.UINT8)
        # DequantizeLinear gives the type of its scale, Where that of what it chooses from; the
        # other operators leave the type.
        place = 1 if node.op_type in ("DequantizeLinear", "Where") else 0
        return self.type_of(node.input[place]) if len(node.input) > place else "unknown"

    def shape_of(self, value: str) -> list[int] | None:
        """The lengths of a value's axes, 0 for a free axis; None if the file does not say them."""
        if value in self.initializers:
            return list(self.initializers[value].dims)
        if value not in self._described or not self._described[value].HasField("shape"):
            return None
        # A free axis has a name and no length, which protobuf reads as 0.
        return [axis.dim_value for axis in self._described[value].shape.dim]

    def bits_of(self, initializer: str) -> int:
        """Bits that an initializer takes in the file."""
        return self.elements_of(initializer) * bits_of_type(self.type_of(initializer))

    def elements_of(self, initializer: str) -> int:
        """Number of elements of an initializer."""
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
        # Of codes, scales and zero points that make a weight, the codes are the largest.
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
        """The values and what they are made from, nearest first. inputs: the inputs of a node that
        are followed."""
        return _reached(
            values, lambda value: inputs(self.producers[value]) if value in self.producers else ()
        )

    def ahead(
        self, values: Iterable[str], outputs: Callable[[NodeProto], Iterable[str]]
    ) -> list[str]:
        """The values and what is made from them, nearest first. outputs: those outputs of a node
        that are followed."""
        return _reached(
            values,
            lambda value: [
                name for node in self.consumers.get(value, ()) for name in outputs(node)
            ],
        )


def size_bytes(path: Path) -> int:
    """The size of a model: of its file, and of the files beside it that hold its tensors."""
    # Several tensors share a file, which is counted once.
    tensors = Graph.load(path).initializers.values()
    beside = {
        entry.value
        for tensor in tensors
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(place.stat().st_size for place in (path, *(path.parent / name for name in beside)))


def _reached(values: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> list[str]:
    """All that can be reached, breadth first."""
    reached = dict.fromkeys(values)
    # The list grows while it is gone through.
    waiting = list(reached)
    for value in waiting:
        new = [name for name in neighbours(value) if name and name not in reached]
        reached.update(dict.fromkeys(new))
        waiting += dict.fromkeys(new)
    return waiting
