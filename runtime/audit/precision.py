"""Truth in precision: the bits that a scheme names, the bits that the file keeps, and the bits that
the kernels multiply with are three numbers.

A 4-bit code in an int8 kernel is multiplied as 8 bits. MatMulNBits at accuracy level 4 rounds float
activations to 8 bits. A scale, a zero point and a low-rank branch take room beside the codes. All
of it is counted in the file and in the graph that is executed; of the metadata only the scheme is
believed. If linears differ, the bits are those of most weights: the audit has a row for each.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import NodeProto

from runtime.audit.graph import Product
from runtime.audit.linears import (
    FLOAT,
    Examined,
    Linear,
    kernel_types,
    nominal_bits,
    weights_of,
)
from runtime.audit.nodes import PRODUCTS, attribute, bits_of_type
from runtime.audit.rows import audit
from runtime.records import Record

# Operators that hold both products of attention.
ATTENTION = ("Attention", "MultiHeadAttention")

# Operators whose first input has the codes of a weight, and the others what goes with them.
ON_A_GRID = ("DequantizeLinear", "Sub", "Mul", "Add", "ScatterND")

# What stands between the products of a vision transformer, by the operators that compute it. Sums
# and moves are left out.
# fmt: off
AROUND_PRODUCTS = {
    "norms": ("LayerNormalization", "SkipLayerNormalization", "BatchNormalization"),
    "activation functions": (
        "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Sigmoid", "Tanh", "Relu",
    ),
    "softmax": ("Softmax",),
}
# fmt: on


@dataclass(frozen=True)
class FloatPart(Record):
    """Something that runs in floating point: `count` times `operator`, and why."""

    what: str
    operator: str
    count: int
    why: str


@dataclass(frozen=True)
class Precision(Record):
    """Bits of a file as it is executed."""

    # The scheme, as `W4A8`.
    nominal: str
    # What the scheme says; 16 stands for float activations.
    weight_bits: int
    activation_bits: int
    # Of the operands as the kernels get them.
    kernel_weight_bits: int
    kernel_activation_bits: int
    # Of a weight's code in the file.
    container_bits: int
    # All that the file keeps for the quantized weights, over their number. If no linear is
    # quantized, all linears are counted.
    bits_per_weight: float
    # What runs in floating point nevertheless.
    float_remainder: tuple[FloatPart, ...]


def measure_precision(examined: Examined) -> Precision:
    """Count the bits of a file, and of the kernels that run it."""
    # A float file has bits too: then all of its linears are counted.
    quantized = [linear for linear in examined.linears if linear.nominal != FLOAT]
    counted = quantized or list(examined.linears)
    own = [linear for linear in counted if linear.role == "linear"]

    def of_most(bits: Callable[[Linear], int]) -> int:
        # Each weight has a vote: a small head in 8 bits does not outvote blocks in 4.
        votes: Counter[int] = Counter()
        for linear in own:
            votes[bits(linear)] += weights_of(examined, linear)
        return votes.most_common(1)[0][0]

    most_common = Counter(linear.nominal for linear in own).most_common(1)[0][0]
    stored = _stored_bits(examined, counted)
    return Precision(
        nominal=examined.file.metadata.scheme or most_common,
        weight_bits=of_most(lambda linear: _nominal_bits(examined, linear)[0]),
        activation_bits=of_most(lambda linear: _nominal_bits(examined, linear)[1]),
        kernel_weight_bits=of_most(lambda linear: _kernel_bits(examined, linear)[0]),
        kernel_activation_bits=of_most(lambda linear: _kernel_bits(examined, linear)[1]),
        container_bits=of_most(lambda linear: _container_bits(examined, linear)),
        bits_per_weight=stored / sum(weights_of(examined, linear) for linear in own),
        float_remainder=tuple(_float_remainder(examined)),
    )


def _nominal_bits(examined: Examined, linear: Linear) -> tuple[int, int]:
    # A float linear has no scheme: the type of its weight counts.
    stored = bits_of_type(examined.file.type_of(linear.origin))
    return (stored, stored) if linear.nominal == FLOAT else nominal_bits(linear.nominal)


def _kernel_bits(examined: Examined, linear: Linear) -> tuple[int, int]:
    # A linear that was merged into another operator is taken to run as the scheme says.
    if linear.kernel is None:
        return _nominal_bits(examined, linear)
    weight, activation = kernel_types(examined.optimized, linear.kernel)
    return bits_of_type(weight), bits_of_type(activation)


def _container_bits(examined: Examined, linear: Linear) -> int:
    """Bits of a code in the file."""
    file, node = examined.file, linear.product.node
    # Its codes are packed into bytes; an attribute has their bits.
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "bits", 4))
    if linear.nominal == FLOAT:
        return bits_of_type(file.type_of(linear.origin))
    assert linear.product.weight is not None

    # The constants that the weight is made from, without its scales: 3-bit codes are two planes of
    # bytes, whose bits add up. The constants that unpack them hardly count.
    # What is subtracted and multiplied is grid, what is added a branch, and what is scattered the
    # second codes of some columns.
    def made_of(node: NodeProto) -> list[str]:
        return list(node.input[:1] if node.op_type in ON_A_GRID else node.input)

    codes = [
        name for name in file.behind([linear.product.weight], made_of) if name in file.initializers
    ]
    # Wider constants are no codes.
    narrow = [name for name in codes if bits_of_type(file.type_of(name)) <= 8]
    return round(sum(map(file.bits_of, narrow)) / weights_of(examined, linear))


def _stored_bits(examined: Examined, linears: list[Linear]) -> int:
    """Bits of codes, scales, zero points, and the factors of low-rank branches."""
    # A set: q, k and v may share a constant, which the file keeps once.
    kept: set[str] = set()
    for linear in linears:
        # Corrections belong to the activations and not to the weights.
        if linear.role != "correction":
            assert linear.product.weight is not None
            kept.update(*map(examined.file.origins, (linear.product.weight, *linear.product.grid)))
    return sum(map(examined.file.bits_of, kept))


def _float_remainder(examined: Examined) -> list[FloatPart]:
    """What runs in float, in the order of its first appearance; what stands between the products
    last."""
    found = Counter((*_floats_of_linears(examined), *_floats_around(examined)))
    return [FloatPart(what, operator, count, why) for (what, operator, why), count in found.items()]


def _chooser(examined: Examined) -> str:
    """Who decided what is quantized."""
    return "the scheme" if examined.file.metadata.tells_schemes else "the file"


def _floats_of_linears(examined: Examined) -> Iterator[tuple[str, str, str]]:
    """What, operator and why of each linear that runs in float."""
    chooser = _chooser(examined)
    reasons = {
        row.linear: row.reason
        for row in audit(examined)
        if row.nominal != FLOAT and not row.integer
    }
    for linear in examined.linears:
        operator = linear.kernel.node.op_type if linear.kernel is not None else "none"
        # A third of a linear has a row of its own if the thirds do not run alike.
        reason = reasons.get(linear.path, reasons.get(linear.part))
        if linear.role == "low-rank branch":
            why = f"{chooser} keeps their factors in floating point"
            yield "low-rank branches", operator, why
        elif linear.role == "correction":
            why = "two inputs each: no work for an integer kernel"
            yield "corrections for the tokens' zero points", operator, why
        elif linear.nominal == FLOAT:
            what = _kind(examined, linear.product)
            yield what, operator, f"{chooser} leaves the {what} in floating point"
        elif reason is not None:
            yield "quantized linears", operator, reason


def _floats_around(examined: Examined) -> Iterator[tuple[str, str, str]]:
    """What, operator and why of attention's products, and of what stands between products."""
    optimized = examined.optimized
    attention = f"{_chooser(examined)} leaves attention in floating point"
    # Products of two operands that both depend on the images: Q Kᵀ and the product with V.
    for product in optimized.products:
        if product.weight is None and optimized.type_of(product.activation).startswith("float"):
            yield "attention products", product.node.op_type, attention
    for node in optimized.nodes:
        if node.op_type in ATTENTION:
            yield "attention products", node.op_type, attention
    for what, operators in AROUND_PRODUCTS.items():
        for node in optimized.nodes:
            if node.op_type in operators:
                yield what, node.op_type, "only products are quantized"


def _kind(examined: Examined, product: Product) -> str:
    """The place of a float linear in the model."""
    file = examined.file
    if product.node.op_type == "Conv":
        # Patches that do not overlap are those of an embedding.
        patches = attribute(product.node, "kernel_shape") == attribute(product.node, "strides")
        return "patch embedding" if patches else "convolutions"
    # No product comes after the head.
    after = file.ahead(product.node.output, lambda node: node.output)
    # Attention counts as a product: q, k and v end there.
    consumers = {node.op_type for value in after for node in file.consumers.get(value, ())}
    return "linears" if consumers.intersection((*PRODUCTS, *ATTENTION)) else "head"
