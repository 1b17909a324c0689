"""Salient columns against their definition in NumPy: the two codes of a weight, the columns that
get them, the sweep that comes to them last, and what they are good for."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import reference
import torch
from method_cases import INPUTS, Case, constant, make_case
from tiny_models import noise, quantized, vit

from marrq.errors import MarrqError
from marrq.methods.factor import factorize
from marrq.methods.lowrank_spec import LowRankSpec, parse_lowrank
from marrq.methods.serq import salient_columns
from marrq.methods.solve import IMPLEMENTATIONS, solve
from marrq.methods.spec import Clip, MethodSpec
from marrq.quantizers.affine import Grid, search_weight_grid
from marrq.quantizers.linear import QuantizedWeight, QuantLinear, quantized_linears
from marrq.quantizers.packing import packed_size
from marrq.quantizers.salient import join_codes, split_codes
from marrq.schemes import WeightGrid, WeightSpec

RANK = 5
BITS = [2, 3, 4]
SECOND = {2: 2, 3: 3, 4: 3}


@dataclass(frozen=True)
class Wide(reference.Affine):
    """A b-bit grid whose salient columns have the grid of two codes, of b and e bits: steps 2^(e-1)
    times as fine over twice the range."""

    salient: tuple[int, ...] = ()
    num_bits: int = 0

    def column(self, j: int) -> reference.Affine:
        if j not in self.salient:
            return super().column(j)
        fine = 2 ** (SECOND[self.num_bits] - 1)
        end = fine * 2**self.num_bits
        return reference.Affine(self.scale[:, j] / fine, self.zero[:, j] * fine, -end, end - 1)

    def values(self, codes: np.ndarray) -> np.ndarray:
        columns = [self.column(j).value(codes[:, j]) for j in range(codes.shape[1])]
        return np.stack(columns, 1)

    def joint(self, codes: np.ndarray) -> np.ndarray:
        """Codes of single columns as marrq has them: all in steps of the salient columns."""
        others = [j for j in range(codes.shape[1]) if j not in self.salient]
        joint = codes.copy()
        joint[:, others] *= 2 ** (SECOND[self.num_bits] - 1)
        return joint


def expected(case: Case, spec: MethodSpec, kind: WeightSpec, alpha: float = 0) -> np.ndarray:
    """Joint codes of rtn, gptq, gptaq or exact, by the reference."""
    assert spec.lowrank is not None
    moments, weight = case.moments(spec.correct_bias), case.weight.numpy()
    strongest = np.argsort(-np.diag(moments.hessian), kind="stable")[: spec.lowrank.rank]
    salient = tuple(int(j) for j in strongest)
    order = np.array(sorted(moments.order(spec.act_order), key=lambda j: j in salient))
    if spec.name == "exact":
        wanted = case.wanted_moment(spec.correct_bias)
        weight = reference.target(weight, wanted, moments, alpha, spec.target_damping)
    laid = (weight, kind.num_bits, kind.group_size, kind.grid)
    shares = [(1 - 0.06 * i,) for i in range(12)] if spec.clip == "outputs" else []
    grids = [reference.weight_grid(*laid, share) for share in shares]
    grids.append(reference.weight_grid(*laid))
    wide = [Wide(g.scale, g.zero, g.low, g.high, salient, kind.num_bits) for g in grids]
    if spec.name == "rtn":
        codes = [wide[-1].column(j).codes(weight[:, j]) for j in range(INPUTS)]
        return wide[-1].joint(np.stack(codes, 1))
    none = (0.0, 0.0)
    errors = [g.values(reference.sweep(weight, g, moments, order, none)) - weight for g in wide]
    powers = np.stack([((e @ moments.hessian) * e).sum(1) for e in errors])
    # Each row on its own best grid.
    best = [wide[i] for i in powers.argmin(0)]
    scale = np.stack([g.scale[row] for row, g in enumerate(best)])
    zero = np.stack([g.zero[row] for row, g in enumerate(best)])
    grid = Wide(scale, zero, wide[0].low, wide[0].high, salient, kind.num_bits)
    alphas = (alpha, 0.0) if spec.name == "gptaq" else none
    return grid.joint(reference.sweep(weight, grid, moments, order, alphas))


@pytest.mark.parametrize(
    "kind", [WeightSpec(3), WeightSpec(2, 8), WeightSpec(4, None, "symmetric")]
)
@pytest.mark.parametrize("clip", ["weights", "outputs"])
@pytest.mark.parametrize(("name", "alpha"), [("rtn", 0), ("gptq", 0), ("gptaq", 0.5), ("exact", 1)])
def test_joint_codes_are_those_of_the_definition(
    name: str, alpha: float, clip: Clip, kind: WeightSpec
):
    case, spec = make_case(0), replace(MethodSpec(name), clip=clip, lowrank=parse_lowrank("serq:5"))
    if name in ("gptaq", "exact"):
        spec = constant(name, alpha, clip=clip, lowrank=spec.lowrank)
    rounding = IMPLEMENTATIONS[name](case.weight, case.problem(spec, kind), spec)
    assert np.array_equal(rounding.codes.numpy(), expected(case, spec, kind, alpha))


@pytest.mark.parametrize("num_bits", BITS)
def test_two_codes_are_one_integer_and_come_apart_again(num_bits: int):
    every = [range(-(2 ** (bits - 1)), 2 ** (bits - 1)) for bits in (num_bits, SECOND[num_bits])]
    pairs = np.array(list(itertools.product(*every)), np.int8)
    first = torch.from_numpy(np.stack([pairs[:, 0], pairs[:, 0]], 1))
    second = torch.from_numpy(pairs[:, 1:].copy())
    joint = join_codes(first, second, torch.tensor([1]), num_bits)
    half = 2 ** (SECOND[num_bits] - 1)
    wanted = [[half * r, 2 * half * r + s + half] for r, s in pairs.tolist()]
    assert joint.tolist() == wanted
    # Each code of the bits of both comes up once.
    end = 2 ** (num_bits - 1) * 2 * half
    assert sorted(joint[:, 1].tolist()) == list(range(-end, end))
    again = split_codes(joint, torch.tensor([1]), num_bits)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize(
    ("num_bits", "salient_ends", "other_ends"),
    [(2, (-8, 7), (-4, 2)), (3, (-32, 31), (-16, 12)), (4, (-64, 63), (-32, 28))],
)
def test_no_joint_code_leaves_the_range_in_which_sums_of_two_products_are_exact(
    num_bits: int, salient_ends: tuple[int, int], other_ends: tuple[int, int], kind: WeightGrid
):
    # Weights far beyond the grid on both sides get the extreme codes of their columns.
    weight = torch.tensor([[-1e3, -1e3], [1e3, 1e3]])
    low, high = WeightSpec(num_bits, None, kind).code_range
    zero = torch.full((2, 1), 0.0 if kind == "symmetric" else low)
    grid = Grid(torch.ones(2, 1), zero, low, high).with_salient(torch.tensor([0]))
    spec = WeightSpec(num_bits, None, kind)
    stored = QuantizedWeight.on_grid(spec, grid.codes(weight), grid)
    assert stored.codes.T.tolist() == [list(salient_ends), list(other_ends)]
    # A zero point is a code of the other columns.
    assert other_ends[0] <= int(stored.zero_point.min())
    # The largest activations beside two codes of either sign: uint8 times int8 in 16 bits.
    assert 2 * 255 * int(stored.codes.min()) >= -(2**15)
    assert 2 * 255 * int(stored.codes.max()) <= 2**15 - 1


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("num_bits", BITS)
def test_a_stored_weight_has_the_values_of_its_grid(num_bits: int, kind: str):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)) + 0.5
    spec, salient = WeightSpec(num_bits, 8, kind), torch.tensor([1, 3, 15])
    grid = search_weight_grid(weight, spec).with_salient(salient)
    stored = QuantizedWeight.on_grid(spec, grid.codes(weight), grid)
    assert torch.equal(stored.values, grid.values(grid.codes(weight)))
    # Elsewhere nothing has changed; a salient weight is off by half a fine step at most.
    plain = replace(grid, salient=None)
    others = [j for j in range(16) if j not in (1, 3, 15)]
    assert torch.equal(stored.values[:, others], plain.values(plain.codes(weight))[:, others])
    step = grid.spread(16).scale[:, salient] / 2 ** (SECOND[num_bits] - 1)
    lowest, highest = (end.repeat_interleave(8, 1)[:, salient] for end in grid.ends)
    near = weight[:, salient].clamp(lowest, highest)
    error = (stored.values[:, salient] - near).abs()
    assert bool((error <= step * 0.501)[near == weight[:, salient]].all())


def test_the_strongest_inputs_are_salient_and_the_first_of_equals():
    strengths = torch.tensor([3.0, 9, 1, 9, 9, 2], dtype=torch.float64)
    assert salient_columns(strengths.diag(), parse_lowrank("serq:2")).tolist() == [1, 3]
    assert salient_columns(strengths.diag(), parse_lowrank("serq:4")).tolist() == [0, 1, 3, 4]
    assert salient_columns(strengths.diag(), LowRankSpec("srr", 2)) is None
    assert salient_columns(strengths.diag(), None) is None


@pytest.mark.parametrize("act_order", [True, False])
def test_the_sweep_comes_to_salient_columns_last(act_order: bool):
    hessian = torch.tensor([3.0, 9, 1, 8, 7, 2], dtype=torch.float64).diag()
    order = factorize(hessian, 0.01, act_order, torch.tensor([1, 4])).order
    assert order.tolist() == ([3, 0, 5, 2, 1, 4] if act_order else [0, 2, 3, 5, 1, 4])


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptaq", "exact", "marr-exact"])
@pytest.mark.parametrize("num_bits", BITS)
def test_the_error_falls_with_the_rank_to_that_of_steps_as_fine_as_both_codes(
    name: str, num_bits: int
):
    errors = []
    for rank in (0, 4, 12, INPUTS):
        lowrank = parse_lowrank(f"serq:{rank}") if rank else None
        total = 0.0
        for seed in range(4):
            case, spec = make_case(seed, drift=0), MethodSpec(name, lowrank=lowrank)
            problem = case.problem(spec, WeightSpec(num_bits))
            total += solve(case.weight, problem, spec).error
        errors.append(total)
    assert all(after < before for before, after in itertools.pairwise(errors))
    # Steps 2^(e-1) times as fine: the square error falls as their square, up to clipping.
    assert errors[-1] < 4 * errors[0] / 4 ** (SECOND[num_bits] - 1)


def test_with_its_error_the_sweep_uses_what_salient_columns_can_take_up():
    """Salient columns last do better than the same columns in act order."""
    last = in_order = 0.0
    for seed in range(6):
        case, spec = make_case(seed), MethodSpec("gptq", lowrank=parse_lowrank("serq:6"))
        last += solve(case.weight, case.problem(spec), spec).error
        problem = case.problem(spec)
        hessian = problem.whole.statistics.hessian
        problem.whole.factors.__dict__["factor"] = factorize(hessian, spec.damping, True)
        in_order += solve(case.weight, problem, spec).error
    assert last < in_order


@pytest.mark.parametrize("num_bits", BITS)
def test_stored_bits_count_both_sets_and_the_indices(num_bits: int):
    spec, salient = WeightSpec(num_bits), torch.tensor([0, 7, 9], dtype=torch.int32)
    codes = torch.zeros(5, 11, dtype=torch.int8)
    plain = QuantizedWeight(spec, codes, torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int8))
    more = replace(plain, salient_columns=salient).stored_bits - plain.stored_bits
    assert more == 8 * packed_size(15, SECOND[num_bits]) + 3 * 32


def test_a_linear_computes_with_both_codes():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    spec = WeightSpec(3)
    grid = search_weight_grid(weight, spec).with_salient(torch.tensor([2, 5]))
    linear = QuantLinear(QuantizedWeight.on_grid(spec, grid.codes(weight), grid), None, None)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(3))
    first, second = split_codes(linear.codes, torch.tensor([2, 5]), 3)
    # y = Q x + R x_S: Q has the codes q and 2 r of the row's scale Δ, R the codes s.
    scale, zero = grid.scale.numpy(), grid.zero_point.numpy()
    q = first.numpy().astype(np.float64)
    q[:, [2, 5]] *= 2
    whole = (q - zero) * scale
    r = (second.numpy() + 4) * scale / 4
    y = x.numpy() @ whole.T + x.numpy()[:, [2, 5]] @ r.T
    np.testing.assert_allclose(linear(x).numpy(), y, rtol=1e-4, atol=1e-5)


def test_more_bits_than_fit_and_a_rank_beyond_the_inputs_are_refused():
    with pytest.raises(MarrqError, match=r"serq:4 needs weights of 4 bits or fewer.*: got 8"):
        quantized(vit(), noise(4), "W8A8", "gptq,lowrank=serq:4")
    grid = search_weight_grid(torch.eye(4), WeightSpec(8))
    with pytest.raises(MarrqError, match="weights of 4 bits or fewer: got codes -128 … 127"):
        grid.with_salient(torch.tensor([0]))
    with pytest.raises(MarrqError, match=r"serq:65 is larger than the 64 inputs .* use 64 or less"):
        quantized(vit(), noise(4), "W4A8", "gptq,lowrank=serq:65")


def test_first_and_last_layers_have_no_second_codes():
    model = quantized(vit(), noise(4), "W4A8-e8", "gptq,lowrank=serq:4")
    for report in model.reports:
        linear = quantized_linears(model.module)[report.path]
        assert (linear.salient_columns is None) == report.is_outer


def test_a_spec_is_read_back_from_its_text_and_takes_no_storage():
    spec = parse_lowrank("serq:32")
    assert (spec.kind, spec.rank, spec.num_bits, spec.is_branch) == ("serq", 32, None, False)
    assert parse_lowrank(str(spec)) == spec
    for text in ("serq:32:int8", "serq:32:fp16"):
        with pytest.raises(
            MarrqError, match="bits of a weight decide those of serq's second codes"
        ):
            parse_lowrank(text)
    for text in ("serq", "serq:", "serq:0"):
        with pytest.raises(MarrqError, match="low-rank branch"):
            parse_lowrank(text)


def test_a_grid_without_salient_columns_is_as_it_was():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    grid = search_weight_grid(weight, WeightSpec(4))
    same = grid.with_salient(None)
    assert isinstance(same, Grid)
    assert same.joint is same
    assert torch.equal(same.codes(weight), grid.codes(weight))


def test_weights_of_8_bits_in_a_mixed_scheme_have_no_second_codes():
    model = quantized(vit(), noise(4), "WmixA8", "gptq,lowrank=serq:4")
    linears = quantized_linears(model.module).values()
    assert {linear.spec.num_bits for linear in linears} > {8}
    for linear in linears:
        assert (linear.salient_columns is None) == (linear.spec.num_bits == 8)
