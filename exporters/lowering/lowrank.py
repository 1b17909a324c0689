"""The low-rank branch, in float32: beside the codes as y + L (R x), or added to a float weight.

x is the dequantized input, as in the torch simulation (marrq/quantizers/linear.py). Beside integer
codes the branch costs r (in + out) float products for each token; in a weight that ONNX Runtime
folds it costs none.
"""

import onnx_ir as ir
from torch import Tensor

from exporters.lowering.inputs import input_values
from exporters.lowering.linear import LinearLowering
from marrq.quantizers.linear import StoredFactor


def with_lowrank(linear: LinearLowering, x: ir.Value, y: ir.Value) -> ir.Value:
    """The output y + L (R x); y itself if the linear has no low-rank branch."""
    rows = linear.slice
    if rows.left is None or rows.right is None:
        return y
    # MatMul multiplies from the right, so both factors are stored transposed.
    left = _factor(linear, "lowrank_left", rows.left, rows.left_scale)
    # R first: r is much smaller than the widths of the linear.
    components = _components(linear, x, rows.right)
    return linear.add("Add", [y, linear.add("MatMul", [components, left])])


def plus_lowrank(linear: LinearLowering, weight: ir.Value) -> ir.Value:
    """The weight (W + L R)ᵀ [in, rows] in float32; the weight itself if there is no branch."""
    rows = linear.slice
    if rows.left is None or rows.right is None:
        return weight
    left = _factor(linear, "lowrank_left", rows.left, rows.left_scale)
    made = linear.shared.right_factors
    # q, k and v have the same R, which is stored once.
    if linear.path not in made:
        made[linear.path] = _factor(linear, "lowrank_right", rows.right, None)
    # (L R)ᵀ = Rᵀ Lᵀ, and both factors are stored transposed.
    return linear.add("Add", [weight, linear.add("MatMul", [made[linear.path], left])])


def _components(linear: LinearLowering, x: ir.Value, right: StoredFactor) -> ir.Value:
    """R x [..., r], made once for all parts of a linear that read the same tokens."""
    made = linear.shared.components
    # The part is not in the key: q, k and v have the same R.
    if (linear.path, x) not in made:
        transposed = _factor(linear, "lowrank_right", right, None)
        made[linear.path, x] = linear.add("MatMul", [input_values(linear, x), transposed])
    return made[linear.path, x]


def _factor(
    linear: LinearLowering, name: str, factor: StoredFactor, output_scale: Tensor | None
) -> ir.Value:
    """A factor, transposed, in float32. ONNX Runtime folds the nodes when it loads the file.

    output_scale: float32 [rows], multiplies the rows of L.
    """
    stored = linear.weight_constant(name, factor.codes.T.contiguous().numpy())
    values = linear.add("Cast", [stored], to=int(ir.DataType.FLOAT))
    # int8 codes have a scale for each of the r components; float16 values have none.
    if factor.scale is not None:
        scale = linear.weight_constant(f"{name}_scale", factor.scale.T.contiguous().numpy())
        values = linear.add("Mul", [values, scale])
    # γ of LayerScale: γ ∘ (L R x). The stored L stays the artifact's.
    if output_scale is not None:
        layer_scale = linear.weight_constant(f"{name}_output_scale", output_scale.numpy())
        values = linear.add("Mul", [values, layer_scale])
    return values
