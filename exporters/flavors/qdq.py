"""The qdq flavour: plain standard operators, for runtimes that have none of ONNX Runtime's own.

    x → QuantizeLinear(uint8) [→ Clip] → DequantizeLinear  ┐
    codes (INT4) → Cast(int8) → DequantizeLinear           ┴ MatMul → Add(bias)

It expresses every scheme. What ONNX Runtime makes of it depends on the form of the weight (seen
with 1.31.1 on the CPU):

    static activations, a scale per channel    [in, out], as above          an integer kernel, at rank 3; without the Cast, and at
                                                                            rank 2, where Gemm comes first, it computes in float
    anything else, group scales included       [out, in], then Transpose    float; the weight is dequantized at every run

The last form has a scale for each block of inputs (opset 21), a block being all of them where there
are no groups, and a Transpose behind. Without those two ONNX Runtime fuses weight and product to
its MatMulNBits with `accuracy_level` 4, which quantizes float activations to int8: a model whose
scheme says A16 would be run, and measured, as A8.

`symmetric` writes what TensorRT takes (documentation of its Dequantize and Quantize layers: INT4
and INT8, zero points 0, a scale per channel, or with INT4 per block of inputs):

    x, codes (INT4) → DequantizeLinear → MatMul → Add(bias)

without a Cast, without zero points, and with codes of 2 and 3 bits in INT4. It takes the artifact's
codes as they are, so their grid must be symmetric; and float activations, since those of marrq lie
on asymmetric uint8 grids. This form ONNX Runtime does run as W4A8, silently, unless the session
sets `session.qdq_matmulnbits_accuracy_level` to 1."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.flavors.lowering import (
    BLOCK_OPSET,
    WIDENED_ONNXRUNTIME,
    LinearLowering,
    int8_codes,
    lower,
    opset_of,
    with_bias,
    with_lowrank,
)
from exporters.trace import TracedModel
from marrq.schemes import Scheme


@dataclass(frozen=True)
class Qdq:
    """The flavour. symmetric: only what TensorRT takes."""

    symmetric: bool = False

    def objection(self, scheme: Scheme) -> str | None:
        """Why the flavour cannot express a scheme, or None."""
        if not self.symmetric:
            return None
        if scheme.weight.grid == "asymmetric" or scheme.activation is not None:
            return "with --symmetric needs weights with zero point 0 and float activations, --scheme W4A16-g128-sym"
        if scheme.weight.num_bits == 8 and scheme.weight.group_size is not None:
            return "with --symmetric has no group scales for 8-bit weights, --scheme W8A16-sym has none"
        return None

    def container_bits(self, scheme: Scheme) -> int:
        """Bits that a weight code takes in the file."""
        return max(scheme.weight.num_bits, 4) if self.symmetric else scheme.weight.num_bits

    def lowest_onnxruntime(self, scheme: Scheme) -> str:
        """First ONNX Runtime that was seen to load such a file and to give the same logits."""
        if self.symmetric:
            return "1.19.0"
        widened = WIDENED_ONNXRUNTIME[scheme.weight.num_bits]
        return widened if _fits_integer_kernel(scheme) else max(widened, "1.20.0")

    def lower(self, traced: TracedModel) -> ir.Model:
        """The graph of a quantized model in Q/DQ form."""
        if self.symmetric:
            return lower(traced, BLOCK_OPSET, _symmetric)
        opset = opset_of(traced.model.scheme)
        return lower(
            traced,
            opset if _fits_integer_kernel(traced.model.scheme) else max(opset, BLOCK_OPSET),
            _standard,
        )


def _fits_integer_kernel(scheme: Scheme) -> bool:
    """Whether an integer kernel can multiply: static activations, and a scale per channel."""
    return (
        scheme.weight.group_size is None
        and scheme.activation is not None
        and scheme.activation.is_static
    )


def _product(site: LinearLowering, weight: ir.Value) -> ir.Value:
    """weight: float [in, rows]."""
    return with_bias(site, with_lowrank(site, site.add("MatMul", [site.input_values(), weight])))


def _standard(site: LinearLowering) -> ir.Value:
    """Each linear by its own numbers: the edges of a model may have an integer kernel where its
    blocks have none."""
    fits = (
        site.quantizer is not None
        and site.quantizer.spec.is_static
        and site.rows.scale.shape[1] == 1
    )
    return _per_channel(site) if fits else _per_block(site)


def _per_channel(site: LinearLowering) -> ir.Value:
    """A product of two axes would become a Gemm in float: the classifier's has a third."""
    if site.x.shape is not None and len(site.x.shape) == 2:
        axis = site.constant("axis", np.array([1]))
        site.x = site.add("Unsqueeze", [site.x, axis])
        return site.add("Squeeze", [_per_channel(site), axis])
    codes = int8_codes(site, site.rows.codes.T.contiguous())
    scale = site.constant("weight_scale", site.rows.scale[:, 0].numpy())
    zero_point = site.constant("weight_zero_point", site.rows.zero_point[:, 0].contiguous().numpy())
    return _product(site, site.add("DequantizeLinear", [codes, scale, zero_point], axis=1))


def _per_block(site: LinearLowering) -> ir.Value:
    rows = site.rows
    codes = int8_codes(site, rows.codes)
    scale, zero_point = (
        site.constant("weight_scale", rows.scale.numpy()),
        site.constant("weight_zero_point", rows.zero_point.numpy()),
    )
    weight = site.add(
        "DequantizeLinear", [codes, scale, zero_point], axis=1, block_size=_block_size(site)
    )
    return _product(site, site.add("Transpose", [weight]))


def _symmetric(site: LinearLowering) -> ir.Value:
    rows = site.rows
    container = np.int8 if rows.num_bits == 8 else ml_dtypes.int4
    codes = site.constant("weight_codes", rows.codes.T.contiguous().numpy().astype(container))
    if rows.scale.shape[1] == 1:
        weight = site.add(
            "DequantizeLinear",
            [codes, site.constant("weight_scale", rows.scale[:, 0].numpy())],
            axis=1,
        )
    else:
        scale = site.constant("weight_scale", rows.scale.T.contiguous().numpy())
        weight = site.add("DequantizeLinear", [codes, scale], axis=0, block_size=_block_size(site))
    return _product(site, weight)


def _block_size(site: LinearLowering) -> int:
    return site.rows.codes.shape[1] // site.rows.scale.shape[1]
