"""What stands behind a value of a lowered graph: x W + b.

The operators that ONNX Runtime has for GPUs take a bias, or a whole product, as inputs. A pass that
puts such an operator in the place of a node asks here what the node reads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from exporters.graph import ancestors, dimensions, producer


@dataclass(frozen=True)
class Product:
    """A value [..., n] as the sum of another value and a bias, and that value as a product.

    result: the value without the bias; the value itself if it has none.
    bias: constant [n], or None.
    x, weight: result = x W; None if it is no product with a constant W [k, n].
    """

    result: ir.Value
    bias: ir.Value | None = None
    x: ir.Value | None = None
    weight: ir.Value | None = None


def product_behind(value: ir.Value) -> Product:
    """Take a value apart. What another node reads too is not taken apart: it has to stay."""
    # From the value backwards: + b, then x W.
    result, bias = _without_bias(value)
    product = producer(result, "MatMul")
    if product is None or not _is_read_once(result):
        return Product(result, bias)
    x, weight = product.inputs
    # q kᵀ is a product too, of two values that depend on the images.
    if weight is None or not _is_constant_matrix(weight):
        return Product(result, bias)
    return Product(result, bias, x, weight)


def _without_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    added = producer(value, "Add")
    # If something else reads the sum, taking the bias out would compute the sum twice.
    if added is None or not _is_read_once(value):
        return value, None
    # The bias may stand on either side.
    for index, bias in enumerate(added.inputs):
        other = added.inputs[1 - index]
        if bias is not None and other is not None and is_vector(bias, dimensions(value)[-1]):
            return other, bias
    return value, None


def is_vector(value: ir.Value | None, length: object) -> bool:
    """Whether a value is a constant of that many numbers along one axis."""
    return (
        value is not None
        and value.const_value is not None
        and list(value.const_value.shape) == [length]
    )


def _is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is_constant_matrix(value: ir.Value) -> bool:
    """Whether a value is made from initializers alone. Codes are, and become constant when ONNX
    Runtime loads the file."""
    # What a flavour makes of codes has no stated shape, and is always a matrix.
    if value.shape is not None and len(value.shape) != 2:
        return False
    # An input of the graph has no producer either, but no tensor.
    return all(
        source.const_value is not None for source in ancestors([value]) if source.producer() is None
    )
