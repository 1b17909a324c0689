"""Truth in precision: the bits that a scheme names, those that the file keeps, and those that the
kernels multiply with are three numbers.

A 4-bit code in an int8 kernel is multiplied as 8 bits; MatMulNBits at accuracy level 4 rounds float
activations to 8; a scale, a zero point and a low-rank branch take room beside the codes. All of it
is counted in the file and in the graph that is executed; of the metadata only the scheme is
believed. Where linears differ, the bits are those of most weights: the audit has a row for each.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from onnx import NodeProto

from runtime.audit.audit import (
    FLOAT,
    Examined,
    Linear,
    audit,
    kernel_types,
    nominal_bits,
    weights_of,
)
from runtime.audit.graph import PRODUCTS, Product, attribute, bits_of_type

ATTENTION = ("Attention", "MultiHeadAttention")
"""Operators that hold both products of attention."""

AROUND_PRODUCTS = {
    "norms": ("LayerNormalization", "SkipLayerNormalization", "BatchNormalization"),
    "activation functions": (
        "Gelu",
        "BiasGelu",
        "FastGelu",
        "QuickGelu",
        "Erf",
        "Sigmoid",
        "Tanh",
        "Relu",
    ),
    "softmax": ("Softmax",),
}
"""What stands between the products of a vision transformer, by the operators that do it; sums and
moves are left out."""


@dataclass(frozen=True)
class FloatPart:
    """Something that runs in floating point: `count` times `operator`, and why."""

    what: str
    operator: str
    count: int
    why: str


@dataclass(frozen=True)
class Precision:
    """Numbers of a file as it is executed. nominal: its scheme; weight_bits, activation_bits: what
    that says (16: float activations); kernel_*: of the operands as the kernels get them;
    container_bits: of a weight's code in the file; bits_per_weight: all that the file keeps for the
    quantized weights, over their number (of all linears' weights, where none is quantized)."""

    nominal: str
    weight_bits: int
    activation_bits: int
    kernel_weight_bits: int
    kernel_activation_bits: int
    container_bits: int
    bits_per_weight: float
    float_remainder: tuple[FloatPart, ...]


def measure_precision(examined: Examined) -> Precision:
    """Count the bits of a file and of the kernels that run it."""
    linears = [linear for linear in examined.linears if linear.nominal != FLOAT] or list(
        examined.linears
    )
    own = [linear for linear in linears if linear.role == "linear"]

    def of_most(bits: Callable[[Linear], int]) -> int:
        votes: Counter[int] = Counter()
        for linear in own:
            votes[bits(linear)] += weights_of(examined, linear)
        return votes.most_common(1)[0][0]

    nominal = (
        examined.file.metadata.get("marrq.scheme")
        or Counter(linear.nominal for linear in own).most_common(1)[0][0]
    )
    return Precision(
        nominal,
        of_most(lambda linear: _nominal_bits(examined, linear)[0]),
        of_most(lambda linear: _nominal_bits(examined, linear)[1]),
        of_most(lambda linear: _kernel_bits(examined, linear)[0]),
        of_most(lambda linear: _kernel_bits(examined, linear)[1]),
        of_most(lambda linear: _container_bits(examined, linear)),
        _stored_bits(examined, linears) / sum(weights_of(examined, linear) for linear in own),
        tuple(_float_remainder(examined)),
    )


def _nominal_bits(examined: Examined, linear: Linear) -> tuple[int, int]:
    stored = bits_of_type(examined.file.type_of(linear.origin))
    return (stored, stored) if linear.nominal == FLOAT else nominal_bits(linear.nominal)


def _kernel_bits(examined: Examined, linear: Linear) -> tuple[int, int]:
    if linear.kernel is None:
        return _nominal_bits(examined, linear)
    weight, activation = kernel_types(examined.optimized, linear.kernel)
    return bits_of_type(weight), bits_of_type(activation)


def _container_bits(examined: Examined, linear: Linear) -> int:
    """Bits of a code. 3-bit codes are two planes of bytes, whose bits add up; the constants that
    unpack them hardly count."""
    file, node = examined.file, linear.product.node
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "bits", 4))
    if linear.nominal == FLOAT:
        return bits_of_type(file.type_of(linear.origin))
    assert linear.product.weight is not None

    def made_of(node: NodeProto) -> list[str]:
        return list(node.input[:1] if node.op_type == "DequantizeLinear" else node.input)

    codes = [
        name for name in file.behind([linear.product.weight], made_of) if name in file.initializers
    ]
    narrow = [name for name in codes if bits_of_type(file.type_of(name)) <= 8]
    return round(sum(map(file.bits_of, narrow)) / weights_of(examined, linear))


def _stored_bits(examined: Examined, linears: list[Linear]) -> int:
    """Codes, scales, zero points, and the factors of low-rank branches."""
    kept: set[str] = set()
    for linear in linears:
        if linear.role != "correction":
            assert linear.product.weight is not None
            kept.update(*map(examined.file.origins, (linear.product.weight, *linear.product.grid)))
    return sum(map(examined.file.bits_of, kept))


def _float_remainder(examined: Examined) -> list[FloatPart]:
    """What runs in float, in the order of its first appearance, and what stands between the
    products last."""
    chooser = "the scheme" if "marrq.schemes" in examined.file.metadata else "the file"
    reasons = {
        row.linear: row.reason
        for row in audit(examined)
        if row.nominal != FLOAT and not row.integer
    }
    found: Counter[tuple[str, str, str]] = Counter()
    for linear in examined.linears:
        operator = linear.kernel.node.op_type if linear.kernel is not None else "none"
        reason = reasons.get(linear.path, reasons.get(linear.part))
        if linear.role == "low-rank branch":
            found[
                "low-rank branches", operator, f"{chooser} keeps their factors in floating point"
            ] += 1
        elif linear.role == "correction":
            found[
                "corrections for the tokens' zero points",
                operator,
                "two inputs each: no work for an integer kernel",
            ] += 1
        elif linear.nominal == FLOAT:
            what = _kind(examined, linear.product)
            found[what, operator, f"{chooser} leaves the {what} in floating point"] += 1
        elif reason is not None:
            found["quantized linears", operator, reason] += 1
    for product in examined.optimized.products:
        if product.weight is None and examined.optimized.type_of(product.activation).startswith(
            "float"
        ):
            found[
                "attention products",
                product.node.op_type,
                f"{chooser} leaves attention in floating point",
            ] += 1
    for node in examined.optimized.nodes:
        if node.op_type in ATTENTION:
            found[
                "attention products", node.op_type, f"{chooser} leaves attention in floating point"
            ] += 1
    for what, operators in AROUND_PRODUCTS.items():
        for node in examined.optimized.nodes:
            if node.op_type in operators:
                found[what, node.op_type, "only products are quantized"] += 1
    return [FloatPart(what, operator, count, why) for (what, operator, why), count in found.items()]


def _kind(examined: Examined, product: Product) -> str:
    """The place of a float linear in the model: a convolution whose patches do not overlap, a
    linear that no product comes after."""
    file = examined.file
    if product.node.op_type == "Conv":
        patches = attribute(product.node, "kernel_shape") == attribute(product.node, "strides")
        return "patch embedding" if patches else "convolutions"
    after = file.ahead(product.node.output, lambda node: node.output)
    consumers = {node.op_type for value in after for node in file.consumers.get(value, ())}
    return "linears" if consumers.intersection((*PRODUCTS, *ATTENTION)) else "head"
