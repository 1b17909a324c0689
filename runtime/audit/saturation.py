"""Where integer products can be wrong: sums of two products that leave 16 bits.

On x86 without dot products of int8 (VNNI), ONNX Runtime's kernels for an int8 weight multiply with
vpmaddubsw: a · w + a' · w' of two neighbouring inputs is added in 16 bits and saturates, without a
word. a is an activation code in 0 … 2ᵇ - 1. Kernels for int8 activations move the codes up by 128
first, so the same holds for them. The sum fits for all activations if

    (2ᵇ - 1) (w⁺ + w'⁺) ≤ 2¹⁵ - 1   and   (2ᵇ - 1) (w⁻ + w'⁻) ≤ 2¹⁵

with the positive and negative parts of w. With 8-bit activations, codes in -64 … 63 fit always, so
that no weight of 4 bits or fewer can saturate on any processor.

With VNNI on x86, and with dot products on ARM (asimddp, i8mm), sums are added in 32 bits. uint8
weights run on other kernels, which are exact everywhere, and so does MatMulNBits, whose own codes
are not looked at here. ARM without dot products was not examined.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from runtime.audit.graph import Graph, Product
from runtime.environment import describe_machine, int8_dot_products

Saturates = Literal["here", "without VNNI"]
"""On which processors a sum can saturate: on this one, or on x86 without VNNI alone."""

LARGEST_SUM, SMALLEST_SUM = 2**15 - 1, -(2**15)

# Operators with kernels for int8 weights.
KERNELS = (
    "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm",
    "ConvInteger", "QLinearConv",
)  # fmt: skip


def can_saturate(optimized: Graph, kernel: Product, activation_bits: int) -> bool:
    """Whether a sum of two products of a kernel can leave 16 bits on x86 without VNNI.

    optimized: the graph that is executed, which has the kernel's codes. activation_bits: of the
    codes that the activations really have; 8 if that is not known.
    """
    if kernel.node.op_type not in KERNELS or kernel.weight is None:
        return False
    # uint8 weights have kernels of their own, which add in 32 bits.
    if optimized.type_of(kernel.weight) != "int8":
        return False
    codes = _codes(optimized, kernel)
    # Codes that cannot be read may be any.
    return True if codes is None else saturating_pairs(codes, activation_bits) > 0


def saturating_pairs(codes: NDArray[np.int8], activation_bits: int) -> int:
    """Number of pairs of neighbouring inputs whose sum saturates for some activations.

    codes: [inputs, outputs].
    """
    # An activation code is at most 2ᵇ - 1, in both neighbours at once.
    largest = 2**activation_bits - 1
    # The last of an odd number of inputs has no neighbour.
    padded = np.pad(codes.astype(np.int32), ((0, len(codes) % 2), (0, 0)))
    pairs = padded.reshape(-1, 2, padded.shape[1])
    highest = largest * pairs.clip(min=0).sum(1)
    lowest = largest * pairs.clip(max=0).sum(1)
    return int(((highest > LARGEST_SUM) | (lowest < SMALLEST_SUM)).sum())


def where_it_saturates() -> Saturates:
    """Where sums that can saturate do: here, if this is an x86 processor without VNNI."""
    flags = describe_machine().processor_flags
    # Only x86 has the flag avx. Without any flag nothing is known, and nothing is claimed.
    return "here" if "avx" in flags and not int8_dot_products(flags) else "without VNNI"


def _codes(optimized: Graph, kernel: Product) -> NDArray[np.int8] | None:
    """The codes of a kernel's weight: [inputs, outputs]; None if they are in a file that is not
    there."""
    assert kernel.weight is not None  # the caller checked it
    tensor = optimized.initializers.get(kernel.weight)
    if tensor is None:
        return None
    try:
        codes: NDArray[np.int8] = numpy_helper.to_array(tensor)
    except (OSError, ValueError):
        return None
    # The weight of a convolution is [out, in, …]; those of a batch of products are stacked.
    if kernel.node.op_type in ("ConvInteger", "QLinearConv"):
        codes = codes.reshape(len(codes), -1).T
    return codes.reshape(-1, codes.shape[-1])
