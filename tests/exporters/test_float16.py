"""A float32 graph in float16: every constant is rounded once."""

import numpy as np
import onnx_ir as ir
import pytest

from exporters.float16 import holds, to_float16
from exporters.lowering.floats import FloatLinear, put_linears

SCALED = """
<ir_version: 9, opset_import: ["" : 20, "marrq" : 1]>
scaled (float[n,4] x) => (float[n,3] y)
{
    y = marrq.QuantizedLinear <path = "fc", output_scale = float[3] {1e-5, 0.3, -0.7}> (x)
}
"""


def test_a_weight_and_its_layer_scale_are_multiplied_in_float32_and_rounded_once():
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    model = ir.from_onnx_text(SCALED)
    to_float16(model)
    put_linears(model.graph, {"fc": FloatLinear(weight, None)})
    [found] = [value.const_value for value in model.graph.initializers.values()]
    assert found is not None
    expected = (weight * np.array([1e-5, 0.3, -0.7], np.float32)).astype(np.float16)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("size", "held"), [(1.0, True), (1e-3, True), (1e-6, False), (1e5, False)])
def test_float16_holds_numbers_between_its_least_normal_and_its_largest(size: float, held: bool):
    numbers = (size * np.random.default_rng(0).uniform(0.5, 1, 100)).astype(np.float32)
    with np.errstate(over="ignore"):
        assert holds(np.dtype(np.float16), numbers) == held
    assert holds(np.dtype(np.float32), numbers)
