"""The integer flavour: low-bit codes in the file, integer kernels at run time.

ONNX Runtime fuses MatMul between DequantizeLinear nodes to an integer kernel, but not when a weight
is INT4 or INT2 there: then it computes in float, slower than the float model. So the codes stay
packed in the file and pass through a Cast to int8, which is folded when the model is loaded, and
the graph names the kernel itself, with the bias in it, so that no fusion has to be hoped for:

    x → QuantizeLinear(uint8) [→ Clip(0, 15)]  ┐
    codes (INT4) → Cast(int8)                  ┴ MatMulIntegerToFloat(scales, zero points, bias)

The kernel is in ONNX Runtime's own domain `com.microsoft`; the operators around it are standard.
Written as DequantizeLinear → MatMul → Add it would run too, but with the bias as a pass of its own:
at batch 1 that costs a tenth of the whole forward of a ViT-S.

With per-token activations no kernel takes the scale s and the zero point z of each row. So the
kernel multiplies the codes q by the weight W alone, and one small float product adds what z and the
bias b come to:

    (s (q - z)) Wᵀ + b  =  s · (q Wᵀ)  +  [s z, 1] · [-W 1; b]        W 1: the sums of W's rows

Measured on one linear of 197 tokens, 384 → 1536 and 1536 → 384, one thread (ONNX Runtime 1.31.1,
AVX-512 VNNI): 0.39 and 0.41 of the float product's time, where static activations take 0.34 and
0.37. MatMulInteger with the corrections in int32 or in float takes 0.42 to 0.43; quantizing by Div,
Round, Add, Clip and Cast in place of QuantizeLinear 0.41 and 0.51.

With group scales each group of inputs is a kernel of its own, and their outputs are summed. On the
same linears, as a ratio to the float product's time: a scale per channel 0.31 and 0.29, groups of
128 inputs 0.45 and 0.51, of 64 0.67 and 0.76, of 32 1.44 and 1.72.

A quantized patch embedding, 16 × 16 pixels to 384 channels, takes 0.33 of the float convolution's
time at batch 1 and 0.18 at batch 8 (ONNX Runtime 1.32.0); ONNX Runtime itself moves QuantizeLinear
before the Transpose that makes patches. The head's product has rank 2, which the kernel takes when
it is named.

A low-rank branch reads the dequantized codes and runs in float beside the kernel.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.flavors.lowering import (
    ATTENTION_OPSET,
    BLOCK_OPSET,
    FUSED_ONNXRUNTIME,
    ONNXRUNTIME_DOMAIN,
    WIDENED_ONNXRUNTIME,
    InputCodes,
    LinearLowering,
    int8_codes,
    lower,
    opset_of,
    with_lowrank,
)
from exporters.trace import TracedModel
from marrq.schemes import Scheme

KERNEL = "MatMulIntegerToFloat"
LEAST_GROUP = 64


@dataclass(frozen=True)
class Integer:
    """The flavour. fuse: attention as one operator, which is faster and asks for a newer ONNX
    Runtime, otherwise as two products; files of 2-bit weights have two products with either, for
    their opset."""

    fuse: bool = True

    def objection(self, scheme: Scheme) -> str | None:
        """Why the flavour cannot express a scheme, or None."""
        if scheme.activation is None:
            return "needs quantized activations"
        if scheme.weight.group_size is not None and scheme.weight.group_size < LEAST_GROUP:
            return f"has no groups of less than {LEAST_GROUP} inputs, which would run slower than the float model"
        return None

    def container_bits(self, scheme: Scheme) -> int:
        """Bits that a weight code takes in the file."""
        return scheme.weight.num_bits

    def lowest_onnxruntime(self, scheme: Scheme) -> str:
        """First ONNX Runtime that was seen to load such a file, to run its linears on integer
        kernels, and to give the same logits."""
        if self.fuse:
            return FUSED_ONNXRUNTIME
        widened = WIDENED_ONNXRUNTIME[scheme.weight.num_bits]
        return max(widened, "1.19.0") if opset_of(scheme) >= BLOCK_OPSET else widened

    def lower(self, traced: TracedModel) -> ir.Model:
        """The graph of a quantized model on integer kernels."""
        opset = opset_of(traced.model.scheme)
        return lower(traced, max(opset, ATTENTION_OPSET) if self.fuse else opset, _product)


def _product(site: LinearLowering) -> ir.Value:
    x = site.input_codes()
    return with_lowrank(site, _per_token(site, x) if x.per_token else _per_tensor(site, x))


def _per_tensor(site: LinearLowering, x: InputCodes) -> ir.Value:
    bias = [] if site.rows.bias is None else [site.constant("bias", site.rows.bias.numpy())]
    return _kernel(site, x.codes, x.scale, x.zero_point, *bias)


def _per_token(site: LinearLowering, x: InputCodes) -> ir.Value:
    rows = site.rows
    one, none = (
        site.constant("unit_scale", np.array(1, np.float32)),
        site.constant("no_zero_point", np.array(0, np.uint8)),
    )
    scaled = site.add("Mul", [_kernel(site, x.codes, one, none), x.scale])
    shift = site.add("Mul", [site.add("Cast", [x.zero_point], to=int(ir.DataType.FLOAT)), x.scale])
    in_groups = rows.codes.int().reshape(*rows.scale.shape, -1) - rows.zero_point.int()[..., None]
    sums = (in_groups.sum(2) * rows.scale).sum(1).numpy()
    if rows.bias is None:
        return site.add(
            "Sub", [scaled, site.add("Mul", [shift, site.constant("weight_sums", sums)])]
        )
    ones = site.add(
        "Pad",
        [
            shift,
            site.constant("beside", np.array([0, 1])),
            one,
            site.constant("last_axis", np.array([-1])),
        ],
    )
    return site.add(
        "Add",
        [
            scaled,
            site.add(
                "MatMul",
                [ones, site.constant("bias_and_sums", np.stack([-sums, rows.bias.numpy()]))],
            ),
        ],
    )


def _kernel(
    site: LinearLowering, codes: ir.Value, scale: ir.Value, zero_point: ir.Value, *bias: ir.Value
) -> ir.Value:
    """The product with the whole weight: one kernel, or one for each group of inputs and the sum of
    them."""
    weight, groups = int8_codes(site, site.rows.codes.T.contiguous()), site.rows.scale.shape[1]
    if groups == 1:
        return _group_kernel(site, 0, "", codes, weight, scale, zero_point, *bias)
    pairs = zip(site.split(codes, -1, groups), site.split(weight, 0, groups), strict=True)
    products = [
        _group_kernel(
            site, group, f"_{group}", part, rows, scale, zero_point, *(bias if group == 0 else ())
        )
        for group, (part, rows) in enumerate(pairs)
    ]
    return site.add("Sum", products)


def _group_kernel(
    site: LinearLowering,
    group: int,
    suffix: str,
    codes: ir.Value,
    weight: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value,
    *bias: ir.Value,
) -> ir.Value:
    """The kernel takes its inputs in this order: codes, then scales, then zero points of input and
    weight; bias."""
    weight_scale = site.constant(
        f"weight_scale{suffix}", site.rows.scale[:, group].contiguous().numpy()
    )
    weight_zero_point = site.constant(
        f"weight_zero_point{suffix}", site.rows.zero_point[:, group].contiguous().numpy()
    )
    return site.add(
        KERNEL,
        [codes, weight, scale, weight_scale, zero_point, weight_zero_point, *bias],
        domain=ONNXRUNTIME_DOMAIN,
    )
