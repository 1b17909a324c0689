"""Placeholders in a float graph, so that it goes through the passes of a quantized one.

    take_linears    x W + b with constants  →  a placeholder; W and b are kept
    put_linears     a placeholder           →  MatMul, Add: its rows of W and b, times its γ

A baseline and the low-bit graphs of a model then differ in their linears alone.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.float16 import holds
from exporters.graph import add_constant, array_of, copy_type, only_consumer
from exporters.passes.products import is_vector
from exporters.trace import (
    OUTPUT_SCALE,
    PART,
    PARTS,
    PATH,
    PLACEHOLDER,
    PLACEHOLDER_DOMAIN,
    modules_of,
    placeholders,
)


@dataclass(frozen=True)
class FloatLinear:
    """x W + b. weight: float32 [in, out]; bias: float32 [out], or None."""

    weight: np.ndarray
    bias: np.ndarray | None


def take_linears(graph: ir.Graph) -> dict[str, FloatLinear]:
    """Put a placeholder in the place of each product with a constant matrix; the tensors by the
    placeholder's path."""
    linears: dict[str, FloatLinear] = {}
    for product in [node for node in graph if node.op_type == "MatMul"]:
        # The trace has W as [in, out]. The head's product, of rank 2, is a Gemm, and stays.
        weight = array_of(product.inputs[1])
        if weight is None or weight.ndim != 2:
            continue
        path = _unused(_module_of(product), linears)
        added, bias = _bias_behind(product, weight.shape[1])
        linears[path] = FloatLinear(weight, bias)
        # The placeholder stands for the Add too.
        last = product if added is None else added
        node = ir.node(
            PLACEHOLDER,
            product.inputs[:1],
            domain=PLACEHOLDER_DOMAIN,
            attributes={PATH: path},
            name=last.name,
        )
        copy_type(node.outputs[0], last.outputs[0])
        # From here on the graph looks like that of a quantized model.
        replaced = [product] if added is None else [added, product]
        ir.convenience.replace_nodes_and_values(
            graph, last, replaced, [node], last.outputs, node.outputs
        )
    return linears


def put_linears(graph: ir.Graph, linears: dict[str, FloatLinear]) -> None:
    """Replace each placeholder by products of the type that its output has."""
    for node in placeholders(graph):
        # A float16 graph has been made float16 by now, so the placeholder tells the type.
        new = _Products(graph, node)
        new.build(linears[node.attributes[PATH].as_string()])
        last = new.nodes[-1]
        copy_type(last.outputs[0], node.outputs[0])
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], new.nodes, node.outputs, last.outputs
        )


class _Products:
    """The nodes that replace a placeholder."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.nodes = graph, node, list[ir.Node]()
        part = f".{node.attributes[PART].as_string()}" if PART in node.attributes else ""
        self.name = f"{node.attributes[PATH].as_string()}{part}"
        dtype = node.outputs[0].dtype
        assert dtype is not None  # the tracer knows every type
        self.dtype = dtype.numpy()

    def build(self, linear: FloatLinear) -> None:
        """Make x W + b, each column of W and b times its γ."""
        attributes, columns = self.node.attributes, slice(None)
        if PART in attributes:
            # The columns of a fused linear are those of q, then k, then v.
            third = linear.weight.shape[1] // len(PARTS)
            start = PARTS.index(attributes[PART].as_string()) * third
            columns = slice(start, start + third)
        weight = linear.weight[:, columns]
        bias = None if linear.bias is None else linear.bias[columns]
        factor = (
            attributes[OUTPUT_SCALE].as_tensor().numpy() if OUTPUT_SCALE in attributes else None
        )
        # γ ∘ (x W + b) as one product, if the type can hold its weights.
        if factor is not None and holds(self.dtype, weight * factor):
            weight, bias, factor = weight * factor, None if bias is None else bias * factor, None
        self._add("MatMul", self.node.inputs[0], "weight_float", weight)
        for op_type, name, array in (("Add", "bias_float", bias), ("Mul", "scale_float", factor)):
            if array is not None:
                self._add(op_type, self.nodes[-1].outputs[0], name, array)

    def _add(self, op_type: str, x: ir.Value | None, name: str, array: np.ndarray) -> None:
        constant = add_constant(
            self.graph, f"{self.name}.{name}", array.astype(self.dtype, copy=False)
        )
        name = f"{self.name}/{op_type}"
        node = ir.node(op_type, [x, constant], name=name)
        node.outputs[0].name, node.outputs[0].type = name, self.node.outputs[0].type
        self.nodes.append(node)


def _bias_behind(product: ir.Node, length: int) -> tuple[ir.Node | None, np.ndarray | None]:
    """The Add of a constant [length] that alone reads the product, and the constant."""
    added = only_consumer(product, "Add")
    # The bias may stand on either side; a residual or a position embedding is no vector.
    for value in added.inputs if added is not None else ():
        if is_vector(value, length):
            return added, array_of(value)
    return None, None


def _module_of(node: ir.Node) -> str:
    """The path of the module that a node was traced in; its own name if the trace does not say."""
    # The last one is the innermost; the model itself has no path.
    modules = modules_of(node)
    return modules[-1] if modules and modules[-1] else str(node.name)


def _unused(path: str, linears: dict[str, FloatLinear]) -> str:
    """The path, with a number if the module has several products."""
    number = sum(name.partition("#")[0] == path for name in linears)
    return f"{path}#{number + 1}" if number else path
