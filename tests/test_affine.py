"""Grids round as ONNX does, contain zero, and are chosen as the papers say."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from marrq.affine import Grid, grid_from_range, per_token_grid, search_tensor_grid, search_weight_grid

RANGES = [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 15), (0, 255)]


@pytest.mark.parametrize("code_range", RANGES)
@given(seed=st.integers(0, 2**20), scale=st.floats(1e-3, 1e3), shift=st.floats(-3, 3))
def test_codes_stay_in_range_and_quantizing_twice_changes_nothing(code_range: tuple[int, int], seed: int, scale: float, shift: float):
    x = scale * (torch.randn(3, 17, generator=torch.Generator().manual_seed(seed)) + shift)
    grid = search_weight_grid(x, code_range)
    codes = grid.quantize(x)
    assert codes.min() >= code_range[0]
    assert codes.max() <= code_range[1]
    assert torch.equal(codes, codes.round())
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize("code_range", RANGES)
def test_zero_is_on_every_grid(code_range: tuple[int, int]):
    for low, high in [(-1.0, 2.0), (0.3, 2.0), (-3.0, -1.0), (0.0, 0.0)]:
        grid = grid_from_range(torch.tensor(low), torch.tensor(high), code_range)
        assert grid.nearest(torch.tensor(0.0)) == 0


def test_an_unclipped_value_is_off_by_half_a_step_at_most():
    x = torch.randn(8, 100, dtype=torch.float64)
    grid = grid_from_range(x.amin(1, keepdim=True), x.amax(1, keepdim=True), (-8, 7))
    error = (grid.nearest(x) - x).abs()
    # Rounding the zero point moves the range by up to half a step; values beyond it are clipped by that much more.
    assert (error <= grid.scale * (1 + 1e-9)).all()
    inside = (x > grid.dequantize(torch.tensor(-8.0))) & (x < grid.dequantize(torch.tensor(7.0)))
    assert (error <= grid.scale / 2 * (1 + 1e-9))[inside].all()


def test_rounding_is_that_of_onnx_quantize_linear():
    scale, zero_point = np.float32(0.37), np.uint8(13)
    halves = (np.arange(-40, 600) - 0.5).astype(np.float32) * scale  # ties and their neighbours, and both ends of the range
    x = np.concatenate([halves, np.nextafter(halves, np.float32(-np.inf)), np.nextafter(halves, np.float32(np.inf))])
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    constants = [helper.make_tensor("s", TensorProto.FLOAT, [], [scale]), helper.make_tensor("z", TensorProto.UINT8, [], [zero_point])]
    inputs, outputs = ([helper.make_tensor_value_info(n, t, [None])] for n, t in (("x", TensorProto.FLOAT), ("y", TensorProto.UINT8)))
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs, constants), ir_version=9)
    model.opset_import[0].version = 19
    onnx.checker.check_model(model)
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    grid = Grid(torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255)
    assert np.array_equal(grid.quantize(torch.from_numpy(x)).numpy().astype(np.uint8), expected)


def numpy_weight_grid(row: np.ndarray, low: int, high: int) -> tuple[float, float]:
    """One row's scale and zero point by the definition, one candidate at a time."""
    best, chosen = np.inf, (0.0, 0.0)
    for i in range(80):
        minimum, maximum = min(row.min() * (1 - i / 100), 0), max(row.max() * (1 - i / 100), 0)
        scale = (maximum - minimum) / (high - low)
        zero_point = np.clip(np.rint(low - minimum / scale), low, high)
        value = (np.clip(np.rint(row / scale) + zero_point, low, high) - zero_point) * scale
        error = (np.abs(value - row) ** 2.4).sum()
        if error < best:
            best, chosen = error, (scale, zero_point)
    return chosen


@pytest.mark.parametrize("code_range", [(-2, 1), (-4, 3), (-8, 7)])
def test_the_weight_grid_is_the_best_of_eighty_clipped_ranges(code_range: tuple[int, int]):
    weight = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = search_weight_grid(weight, code_range)
    for row, scale, zero_point in zip(weight.numpy(), grid.scale, grid.zero_point, strict=True):
        assert (scale.item(), zero_point.item()) == pytest.approx(numpy_weight_grid(row, *code_range))


def test_a_row_of_zeros_stays_zero():
    grid = search_weight_grid(torch.zeros(2, 5), (-8, 7))
    assert torch.equal(grid.nearest(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_the_tensor_grid_clips_a_lone_outlier():
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0])])
    minimum, maximum = x.amin(), x.amax()
    chosen, seen = search_tensor_grid(minimum, maximum, x, (0, 15)), grid_from_range(minimum, maximum, (0, 15))
    assert chosen.scale < seen.scale
    assert (chosen.nearest(x) - x).square().sum() < (seen.nearest(x) - x).square().sum()


def test_per_token_grids_do_not_see_other_tokens():
    x = torch.randn(2, 5, 16)
    alone = per_token_grid(x[1, 3], (0, 15)).nearest(x[1, 3])
    assert torch.equal(per_token_grid(x, (0, 15)).nearest(x)[1, 3], alone)
