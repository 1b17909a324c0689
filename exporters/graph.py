"""Questions about an ONNX graph, and the one way to add a constant to it.

A pass asks for a pattern with these functions. Each function answers None if the pattern is not
there, so that a chain of questions needs a single check at its end:

    matmul = producer(softmax.inputs[0], "MatMul")
    turned = producer(matmul.inputs[1], "Transpose") if matmul else None
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer, which nothing else uses.

    Constants are never shared: a rewrite of one reader would change the other reader's value.
    """
    # An initializer is a value that the graph owns and that has a constant tensor.
    tensor = ir.Tensor(array, name=name)
    # Shape and type are given, because later passes ask for them.
    value = ir.Value(
        name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def only_consumer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The only node that reads the output of `node`, if it has that type; else None."""
    # A second reader would still need the output that a pass is about to remove.
    consumers = node.outputs[0].consumers() if node is not None else ()
    return consumers[0] if len(consumers) == 1 and consumers[0].op_type == op_type else None


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it has that type; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def permutation(node: ir.Node | None) -> tuple[int, ...]:
    """The axes of a Transpose in their new order; () for None."""
    return tuple(node.attributes["perm"].as_ints()) if node is not None else ()


def dimensions(value: ir.Value) -> list[Any]:
    """The length of each axis: an integer, or a symbol for the batch."""
    assert value.shape is not None  # the tracer knows every shape
    return list(value.shape)


def output_shape(node: ir.Node) -> ir.Shape:
    """The shape of a node's first output."""
    shape = node.outputs[0].shape
    assert shape is not None  # the tracer knows every shape
    return shape


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant; None for a value that is not constant."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def integers_of(value: ir.Value | None) -> list[int] | None:
    """The elements of a constant of integers; None for a value that is not constant."""
    array = array_of(value)
    return None if array is None else [int(number) for number in array.reshape(-1)]


def ancestors(values: Iterable[ir.Value | None]) -> set[ir.Value]:
    """The values, and all values that they are computed from."""
    # Walk from the values towards the inputs; a value that was seen is not walked again.
    found, waiting = set[ir.Value](), list(values)
    while waiting:
        value = waiting.pop()
        if value is not None and value not in found:
            found.add(value)
            node = value.producer()
            waiting += node.inputs if node is not None else ()
    return found


def copy_type(target: ir.Value, source: ir.Value) -> None:
    """Give a new value the shape and the element type of the value that it replaces."""
    target.shape, target.type = source.shape, source.type
