"""Grids round as ONNX does, contain zero, and are chosen as the papers say."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from marrq.errors import MarrqError
from marrq.quantizers.affine import Grid, grid_from_range, search_weight_grid
from marrq.schemes import WeightSpec

RANGES = [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 15), (0, 255)]
SPECS = [
    WeightSpec(num_bits, *laid)
    for num_bits in (2, 3, 4, 8)
    for laid in ((None,), (8,), (None, "symmetric"), (16, "symmetric"), (32, "mxint"))
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_codes_are_settled(grid: Grid, x: Tensor) -> None:
    codes = grid.quantize(x)
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    assert torch.equal(codes, codes.round())
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)


values = {"seed": st.integers(0, 2**20), "scale": st.floats(1e-3, 1e3), "shift": st.floats(-3, 3)}


@pytest.mark.parametrize("code_range", RANGES)
@settings(deadline=None, max_examples=25)
@given(**values)
def test_codes_stay_in_range_and_quantizing_twice_changes_nothing(
    code_range: tuple[int, int], seed: int, scale: float, shift: float
):
    x = scale * (normal(3, 17, seed=seed).float() + shift)
    assert_codes_are_settled(
        grid_from_range(x.amin(1, keepdim=True), x.amax(1, keepdim=True), code_range), x
    )


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=5)
@given(**values)
def test_codes_of_weights_stay_in_range_and_quantizing_twice_changes_nothing(
    spec: WeightSpec, seed: int, scale: float, shift: float
):
    x = scale * (normal(3, 64, seed=seed).float() + shift)
    grid = search_weight_grid(x, spec).spread(64)
    assert spec.code_range[0] <= grid.low
    assert grid.high <= spec.code_range[1]
    assert_codes_are_settled(grid, x)


@pytest.mark.parametrize("code_range", RANGES)
def test_zero_is_on_every_grid(code_range: tuple[int, int]):
    for low, high in [(-1.0, 2.0), (0.3, 2.0), (-3.0, -1.0), (0.0, 0.0)]:
        grid = grid_from_range(torch.tensor(low), torch.tensor(high), code_range)
        assert grid.nearest(torch.tensor(0.0)) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_zero_is_on_every_grid_of_weights(spec: WeightSpec):
    for shift in (-3, 0, 3):
        grid = search_weight_grid(normal(4, 64) + shift, spec).spread(64)
        assert not grid.nearest(torch.zeros(4, 64, dtype=torch.float64)).any()


def test_a_value_within_the_range_is_off_by_at_most_half_a_step():
    x = normal(8, 100)
    grid = grid_from_range(x.amin(1, keepdim=True), x.amax(1, keepdim=True), (-8, 7))
    error = (grid.nearest(x) - x).abs()
    # Rounding the zero point moves the range by up to half a step, so a value at its end may be
    # clipped by half a step more.
    assert (error <= grid.scale * (1 + 1e-9)).all()
    inside = (x > grid.dequantize(torch.tensor(-8.0))) & (x < grid.dequantize(torch.tensor(7.0)))
    assert (error <= grid.scale / 2 * (1 + 1e-9))[inside].all()


def test_rounding_is_that_of_onnx_quantize_linear():
    scale, zero_point = np.float32(0.37), np.uint8(13)
    # Ties and their neighbours, beyond both ends of the range.
    halves = (np.arange(-40, 600) - 0.5).astype(np.float32) * scale
    below, above = (np.nextafter(halves, np.float32(end)) for end in (-np.inf, np.inf))
    x = np.concatenate([halves, below, above])
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("z", TensorProto.UINT8, [], [zero_point]),
    ]
    inputs, outputs = (
        [helper.make_tensor_value_info(n, t, [None])]
        for n, t in (("x", TensorProto.FLOAT), ("y", TensorProto.UINT8))
    )
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs, constants), ir_version=9
    )
    model.opset_import[0].version = 19
    onnx.checker.check_model(model)
    (expected,) = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, {"x": x})
    grid = Grid(torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255)
    assert np.array_equal(grid.quantize(torch.from_numpy(x)).numpy().astype(np.uint8), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_the_grid_of_a_weight_is_that_of_the_definition(spec: WeightSpec):
    weight = normal(5, 64, seed=1) * torch.logspace(-2, 2, 5, dtype=torch.float64)[:, None]
    grid = search_weight_grid(weight, spec)
    assert grid.scale.shape == grid.zero_point.shape == (5, 64 // (spec.group_size or 64))
    expected = reference.weight_grid(weight.numpy(), spec.num_bits, spec.group_size, spec.grid)
    spread = grid.spread(64)
    np.testing.assert_allclose(spread.scale, expected.scale, rtol=1e-12)
    np.testing.assert_array_equal(spread.zero_point, expected.zero)
    np.testing.assert_array_equal(spread.quantize(weight), expected.codes(weight.numpy()))


@pytest.mark.parametrize("spec", SPECS)
def test_the_grid_of_a_weight_is_the_same_however_the_search_is_cut(
    spec: WeightSpec, monkeypatch: pytest.MonkeyPatch
):
    # One candidate at a time, so that the search ends early; or all of them, so that it cannot.
    weight = (normal(40, 64, seed=2) ** 3).float()
    grids = []
    for size in (1, 2**12, 2**24):
        monkeypatch.setattr("marrq.quantizers.chunks.CACHE_BYTES", size)
        grids.append(search_weight_grid(weight, spec))
    for grid in grids[:2]:
        assert torch.equal(grid.scale, grids[2].scale)
        assert torch.equal(grid.zero_point, grids[2].zero_point)


def test_a_search_does_not_end_before_a_zero_point_has_fallen_to_the_other_side(
    monkeypatch: pytest.MonkeyPatch,
):
    # As long as below 0 as above: min / scale is 3.5 for every clip factor, and float32 rounds it
    # to 3 or to 4. So a narrower range may reach further down than a wider one.
    end = 0.0005656361463479698
    below = [564, 564, 502, 550, 559, 518, 560, 547, 505, 562, 517, 546, 548]
    weight = torch.tensor([[end, -end, *(-step / 1e6 for step in below)]])
    monkeypatch.setattr("marrq.quantizers.affine.CHUNKS_BETWEEN_CHECKS", 1)
    scales = []
    for size in (1, 2**24):
        monkeypatch.setattr("marrq.quantizers.chunks.CACHE_BYTES", size)
        scales.append(search_weight_grid(weight, WeightSpec(3)).scale)
    assert torch.equal(*scales)


def test_a_search_on_a_cpu_ends_before_all_candidates_are_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("marrq.quantizers.chunks.CACHE_BYTES", 1)
    tried: list[int] = []
    nearest = Grid.nearest

    def counted(grid: Grid, x: Tensor, out: Tensor | None = None) -> Tensor:
        tried.append(len(grid.scale))
        return nearest(grid, x, out)

    monkeypatch.setattr(Grid, "nearest", counted)
    search_weight_grid(normal(1, 256).float(), WeightSpec(4))
    assert 16 <= sum(tried) < 80


def test_each_group_gets_the_grid_it_would_get_alone():
    weight = normal(6, 40)
    grid = search_weight_grid(weight, WeightSpec(3, 8))
    for group, part in enumerate(weight.split(8, 1)):
        alone = search_weight_grid(part.contiguous(), WeightSpec(3))
        assert torch.equal(grid.scale[:, group : group + 1], alone.scale)
        assert torch.equal(grid.zero_point[:, group : group + 1], alone.zero_point)


def test_spreading_repeats_a_group_for_its_columns():
    grid = Grid(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 0.0]]), -8, 7
    ).spread(6)
    assert grid.scale.tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert grid.zero_point.tolist() == [[5, 5, 5, 6, 6, 6], [7, 7, 7, 0, 0, 0]]


@pytest.mark.parametrize("spec", [WeightSpec(4, 16), WeightSpec(4, 32, "mxint")])
def test_groups_that_do_not_fill_a_row_are_refused(spec: WeightSpec):
    with pytest.raises(
        MarrqError,
        match=f"40 inputs are no multiple of the group size {spec.group_size}: choose another",
    ):
        search_weight_grid(normal(2, 40), spec)


def test_smaller_groups_and_free_zero_points_come_nearer_to_the_weights():
    weight = normal(8, 64) + 0.5

    def error(spec: WeightSpec) -> float:
        return float(
            (search_weight_grid(weight, spec).spread(64).nearest(weight) - weight).square().sum()
        )

    assert error(WeightSpec(3, 8)) < error(WeightSpec(3, 16)) < error(WeightSpec(3))
    assert error(WeightSpec(3)) < error(WeightSpec(3, None, "symmetric"))


@pytest.mark.parametrize("group_size", [None, 8])
def test_a_symmetric_grid_has_its_zero_at_code_0(group_size: int | None):
    grid = search_weight_grid(normal(4, 40) + 1, WeightSpec(4, group_size, "symmetric"))
    assert not grid.zero_point.any()


def blocks_of_all_magnitudes() -> Tensor:
    """One block of 32 a row in float32, their largest magnitudes within and at the ends of many
    octaves."""
    octaves = torch.cat(
        [1.999999 * 2.0 ** torch.arange(-100, 100.0), 2.0 ** torch.arange(-100, 100.0)]
    )
    block = normal(len(octaves), 32).float()
    return block / block.abs().amax(1, keepdim=True) * octaves[:, None]


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_the_mxint_scale_is_the_power_of_two_of_the_largest_magnitude(num_bits: int):
    blocks = blocks_of_all_magnitudes()
    grid = search_weight_grid(blocks, WeightSpec(num_bits, 32, "mxint"))
    mantissa, _ = torch.frexp(grid.scale)
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    assert torch.equal(grid.scale.to(torch.float8_e8m0fnu).float(), grid.scale)
    assert not grid.zero_point.any()
    steps = blocks.abs().amax(1, keepdim=True) / grid.scale
    assert (steps >= 2 ** (num_bits - 2)).all()
    assert (steps < 2 ** (num_bits - 1)).all()


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_mxint_is_off_by_less_than_one_step_and_within_its_range_by_half_a_step(
    num_bits: int,
):
    blocks = blocks_of_all_magnitudes()
    grid = search_weight_grid(blocks, WeightSpec(num_bits, 32, "mxint"))
    error = (grid.nearest(blocks) - blocks).abs() / grid.scale
    inside = blocks.abs() <= grid.high * grid.scale
    assert error.max() < 1
    assert (error[inside] <= 0.5).all()


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_of_zeros_stays_zero(spec: WeightSpec):
    weight = torch.zeros(2, 64)
    grid = search_weight_grid(weight, spec).spread(64)
    assert torch.equal(grid.nearest(weight), weight)
    assert (grid.scale > 0).all()
