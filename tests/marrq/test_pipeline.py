"""The pipeline's two streams, its activation grids and its report, on a tiny model."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import noise, output_of, quantized, vision_model, vit
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.methods.registry import ALIASES
from marrq.methods.spec import parse_method
from marrq.models.blocks import Block
from marrq.pipeline.full_precision import FullPrecisionInputs, FullPrecisionKey
from marrq.pipeline.kept_outputs import KeptOutputs, room_on
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.quantizers.activations import (
    ACTIVATION_CLIP_FACTORS,
    TOKENS_PER_BATCH,
    ActivationQuantizer,
    RangeObserver,
)
from marrq.quantizers.affine import grid_from_range
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import ActivationSpec, ActivationStrategy, parse_scheme
from marrq.workflows.quantize import shortfalls

IMAGES = noise(24)
CPU = torch.device("cpu")
EVEN = "token-weights=off"
"""All tokens count alike."""
METHODS = [
    "rtn",
    "gptaq",
    "marr-rescomp",
    "marr-exact",
    "gptq,bias-correction=off",
    "marr-exact,lowrank=srr:4",
    "exact,lowrank=qera:4:int8",
]


@pytest.mark.parametrize(
    "strategy", ["per-tensor", pytest.param("per-token", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_j_is_the_square_error_of_the_outputs_between_the_two_streams(
    path: str, strategy: ActivationStrategy
):
    """The input of the last fc2 comes through everything quantized before it, its target through
    nothing."""
    model = quantized(vit(), IMAGES, "W4A8", f"marr-exact,{EVEN}", strategy=strategy)
    expected = output_of(vit(), path, IMAGES)
    error = float((output_of(model.module, path, IMAGES) - expected).double().square().sum())
    report = next(report for report in model.reports if report.path == path)
    assert report.error == pytest.approx(error, rel=1e-3)
    assert report.mse == pytest.approx(error / expected.numel(), rel=1e-3)
    power = (expected - expected.flatten(0, 1).mean(0)).double().square().sum()
    assert report.relative_error == pytest.approx(error / float(power), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_j_is_told_for_all_that_a_linear_becomes(method: str):
    path = "blocks.1.mlp.fc2"
    model = quantized(vit(), IMAGES, "W3A8", f"{method},{EVEN}")
    error = (
        (output_of(model.module, path, IMAGES) - output_of(vit(), path, IMAGES))
        .double()
        .square()
        .sum()
    )
    assert model.reports[-1].error == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_j_and_the_corrected_bias_weigh_the_tokens(path: str, monkeypatch: pytest.MonkeyPatch):
    weights = torch.linspace(0.2, 3, 17, dtype=torch.float64).mul(2**16).round().div(2**16)
    monkeypatch.setattr("marrq.pipeline.token_weights.weights_of", lambda energies: weights)
    model = quantized(vit(), IMAGES, "W4A8", "marr-exact")
    difference = output_of(model.module, path, IMAGES) - output_of(vit(), path, IMAGES)
    weighted = weights[:, None] * difference.double()  # [images, tokens, m]
    report = next(report for report in model.reports if report.path == path)
    assert report.error == pytest.approx(float((weighted * difference).sum()), rel=1e-3)
    mean = weighted.mean((0, 1)).abs().max()
    assert mean < 1e-5 < 1e-3 < difference.mean((0, 1)).abs().max()


def test_corrected_biases_leave_no_mean_error_even_where_there_was_no_bias():
    for arguments in ({}, {"qkv_bias": False}):
        drifts = {}
        for setting in ("on", "off"):
            model = quantized(
                vit(**arguments), IMAGES, "W3A8", f"gptq,{EVEN},bias-correction={setting}"
            ).module
            difference = output_of(model, "blocks.1.attn.qkv", IMAGES) - output_of(
                vit(**arguments), "blocks.1.attn.qkv", IMAGES
            )
            drifts[setting] = difference.flatten(0, 1).mean(0).abs().max()
        assert drifts["on"] < 1e-5 < 1e-3 < drifts["off"]


def test_eight_bits_lose_almost_nothing_and_fewer_bits_lose_more():
    with torch.no_grad():
        expected = vit()(IMAGES)
        schemes = ("W8A16", "W8A8", "W4A8", "W2A8")
        losses = [
            F.mse_loss(quantized(vit(), IMAGES, scheme, "gptq").module(IMAGES), expected).item()
            for scheme in schemes
        ]
    assert losses == sorted(losses)
    assert losses[0] < 1e-4 * expected.var().item()


def test_a_rotated_model_is_quantized_as_the_function_it_was():
    with torch.no_grad():
        expected = vit()(IMAGES)
        rotated = quantized(vit(), IMAGES, "W8A16", "gptq,rotate=0")
        assert F.mse_loss(rotated.module(IMAGES), expected) < 1e-3 * expected.var()
    plain = quantized(vit(), IMAGES, "W8A16", "gptq")
    assert (
        rotated.module.blocks[0].attn.qkv.weight - plain.module.blocks[0].attn.qkv.weight
    ).abs().max() > 0.1


def test_every_block_linear_is_replaced_and_nothing_else():
    model = quantized(vit(), IMAGES, "W2A8", "rtn")
    expected = [
        f"blocks.{i}.{name}"
        for i in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert (
        list(quantized_linears(model.module))
        == [report.path for report in model.reports]
        == expected
    )
    assert isinstance(model.module.get_submodule("head"), nn.Linear)
    for linear in quantized_linears(model.module).values():
        assert linear.codes.dtype == torch.int8
        assert linear.codes.min() >= -2
        assert linear.codes.max() <= 1


def test_the_report_says_how_each_linear_was_quantized():
    model = quantized(vit(), IMAGES, "W3A8", "marr")
    assert model.method.name == ALIASES["marr"]
    for report in model.reports:
        assert 0 < report.alpha <= 1.5
        assert {step.half for step in report.trajectory} == {0, 1}
        assert report.damping == 0.01
        assert 0 <= report.clipped < 0.1
        assert report.fallback is None


def test_the_clipped_share_is_that_of_what_was_rounded():
    reports = {
        branch: quantized(vit(), IMAGES, "W4A8", f"gptq,lowrank={branch}").reports
        for branch in ("srr:16", "qera:16")
    }
    kept, whole = ([report.clipped for report in found] for found in reports.values())
    # SRR keeps the largest part of a weight out of its grid, so less than before is cut off.
    assert sum(kept) < 1.5 * sum(whole)


def test_more_damping_than_asked_for_is_told_with_the_linears():
    # Four images have fewer tokens than fc2 has inputs.
    for damping, count in (("0", 1), ("0.01", 0)):
        made = quantized(vit(), noise(4), "W4A8", f"gptq,damping={damping}")
        told = [one for one in shortfalls(made) if "needed more damping than asked for" in one]
        assert len(told) == count
        assert all("blocks.0.mlp.fc2" in one for one in told)


def codes_of(module: nn.Module) -> dict[str, Tensor]:
    return {path: linear.codes for path, linear in quantized_linears(module).items()}


def assert_same_codes(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[path], second[path]) for path in first)


@pytest.mark.slow
def test_the_same_images_give_the_same_codes():
    first, second = (codes_of(quantized(vit(), IMAGES, "W3A8", "marr").module) for _ in range(2))
    assert_same_codes(first, second)


def settings_of(scheme: str, method: str, seed: int = 0) -> QuantizationSettings:
    calibration = CalibrationRecord("noise", len(IMAGES), seed, "")
    return QuantizationSettings(parse_scheme(scheme), parse_method(method), calibration)


def key_of(settings: QuantizationSettings) -> FullPrecisionKey:
    return FullPrecisionKey.of(vision_model(nn.Identity()), settings, CPU)


def test_runs_that_share_the_full_precision_tokens_give_what_each_gives_alone():
    shared, told = FullPrecisionInputs(key_of(settings_of("W3A8", "gptaq"))), []
    run = RunOptions(
        CPU,
        shared=shared,
        block_done=lambda done, count, reports: told.append((done, count, len(reports))),
    )
    for method in ("gptaq", "exact"):
        together = quantize(vision_model(vit()), IMAGES, settings_of("W3A8", method), run)
        assert_same_codes(
            codes_of(together.module), codes_of(quantized(vit(), IMAGES, "W3A8", method).module)
        )
    assert told == [(1, 2, 4), (2, 2, 4)] * 2


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (settings_of("W3A8", "gptq", seed=1), "calibration"),
        (settings_of("W3A8", "gptq,rotate=0"), "rotation"),
        (settings_of("W3A8-e8", "gptq"), "outer_layers"),
        (settings_of("W3A4", "gptq"), "balanced"),
    ],
)
def test_full_precision_tokens_of_another_path_are_refused(
    settings: QuantizationSettings, name: str
):
    run = RunOptions(CPU, shared=FullPrecisionInputs(key_of(settings_of("W3A8", "gptq"))))
    with pytest.raises(MarrqError, match=f"full-precision tokens are kept for {name}"):
        quantize(vision_model(vit()), IMAGES, settings, run)


def test_images_that_are_not_finite_are_an_error_that_names_the_layer():
    broken = IMAGES.clone()
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(
        MarrqError, match=r"blocks\.0\.attn\.qkv: the inputs of the linear are not finite"
    ):
        quantized(vit(), broken, "W4A16", "marr")


def test_one_image_is_too_few():
    with pytest.raises(MarrqError, match="at least 2 images: got 1"):
        quantized(vit(), IMAGES[:1], "W4A8", "marr")


def heavy_tailed_input_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS_PER_BATCH, 40, generator=generator) ** 3, torch.randn(
        6, 40, generator=generator
    )


@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_the_static_grid_is_the_clipped_range_that_harms_the_outputs_least(num_bits: int):
    (x, weight), spec = heavy_tailed_input_and_weight(), ActivationSpec(num_bits)
    observer = RangeObserver()
    observer.observe(x)
    quantizer = observer.quantizer(spec, weight)

    def harm(factor: float) -> Tensor:
        quantized_x = grid_from_range(x.min() * factor, x.max() * factor, spec.code_range).nearest(
            x
        )
        return ((quantized_x - x) @ weight.T).square().sum()

    best = min(ACTIVATION_CLIP_FACTORS, key=harm)
    assert quantizer.scale == grid_from_range(x.min() * best, x.max() * best, spec.code_range).scale
    assert (best < 1) == (num_bits < 8)


def test_a_symmetric_grid_is_searched_in_the_same_way_and_has_its_zero_at_code_0():
    (x, weight), spec = heavy_tailed_input_and_weight(), ActivationSpec(4, symmetric=True)
    observer = RangeObserver()
    observer.observe(x)
    quantizer = observer.quantizer(spec, weight)

    def rounded(scale: Tensor) -> Tensor:
        return (x / scale).round().clamp(-8, 7) * scale

    scales = [x.abs().max() * factor / 7 for factor in ACTIVATION_CLIP_FACTORS]
    best = min(scales, key=lambda scale: ((rounded(scale) - x) @ weight.T).square().sum())
    torch.testing.assert_close(quantizer.scale, best)
    assert quantizer.zero_point == 0
    torch.testing.assert_close(quantizer(x), rounded(best))


@pytest.mark.parametrize("num_bits", [3, 4])
def test_per_token_grids_are_the_tokens_ranges_clipped_by_one_factor(num_bits: int):
    (x, weight), spec = heavy_tailed_input_and_weight(), ActivationSpec(num_bits, "per-token")
    observer = RangeObserver()
    observer.observe(x)
    quantizer = observer.quantizer(spec, weight)
    errors = [
        ((ActivationQuantizer(spec, torch.tensor(factor))(x) - x) @ weight.T).square().sum()
        for factor in ACTIVATION_CLIP_FACTORS
    ]
    assert quantizer.clip == torch.tensor(
        ACTIVATION_CLIP_FACTORS[int(torch.stack(errors).argmin())]
    )
    token = x[5]
    grid = grid_from_range(
        token.min() * quantizer.clip, token.max() * quantizer.clip, spec.code_range
    )
    assert torch.equal(quantizer(x)[5], grid.nearest(token))


def test_the_observer_sees_the_exact_range_over_all_batches_whatever_it_samples():
    x = torch.randn(3, 500, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[1, 1, 7] = 5
    observer = RangeObserver()
    for batch in x:
        observer.observe(batch)
    quantizer = observer.quantizer(ActivationSpec(8), torch.eye(16))
    spans = [
        grid_from_range(x.min() * factor, x.max() * factor, (0, 255)).scale
        for factor in ACTIVATION_CLIP_FACTORS
    ]
    assert quantizer.scale in spans


@pytest.mark.parametrize("strategy", ["per-tensor", "per-token"])
def test_a_clip_factor_is_the_same_however_few_tokens_rule_candidates_out(
    strategy: ActivationStrategy, monkeypatch: pytest.MonkeyPatch
):
    x, found = noise(1)[0, 0].repeat(9, 1).exp() ** 2, []
    weight = noise(2)[0, :2].reshape(-1, x.shape[1])
    for first_tokens in (8, 32, 10**6):
        monkeypatch.setattr("marrq.quantizers.activations.FIRST_TOKENS", first_tokens)
        observer = RangeObserver()
        observer.observe(x)
        quantizer = observer.quantizer(ActivationSpec(4, strategy), weight)
        found.append(quantizer.scale if strategy == "per-tensor" else quantizer.clip)
    assert found[0] == found[1] == found[2]


class Counted(nn.Module):
    """Counts its runs; `inplace` changes what it was given."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.linear, self.runs, self.inplace = nn.Linear(4, 4), 0, inplace

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.linear(x.mul_(2) if self.inplace else x)


def two_parts(second_inplace: bool) -> Block:
    module = nn.Sequential(Counted(), Counted(second_inplace))
    return Block("b", module, (("0.linear",), ("1.linear",)), True, (), {})


@pytest.mark.parametrize("inplace", [False, True])
def test_a_finished_part_runs_once_a_batch_unless_its_output_was_changed_in_place(inplace: bool):
    block, x = two_parts(inplace), torch.randn(3, 4)
    expected = block(x)
    kept, runs = KeptOutputs(block, changes=False), block.module[0].runs
    for reading in ("0.other", "1.linear", "1.linear"):
        # The second part is watched, so that it always runs.
        with torch.no_grad(), kept.used(0, reading):
            assert torch.equal(block(x), expected)
    assert block.module[0].runs - runs == (3 if inplace else 1)
    assert "forward" not in vars(block.module[0])


@torch.no_grad()
def test_what_is_kept_depends_on_batch_and_memory_and_is_given_up_at_the_last_run(
    monkeypatch: pytest.MonkeyPatch,
):
    block, batches = two_parts(False), torch.randn(2, 3, 4)
    expected, runs = [block(x) for x in batches], block.module[0].runs
    # Room for the outputs of one batch alone: two parts, 3 · 4 numbers each.
    monkeypatch.setattr("marrq.pipeline.kept_outputs.KEPT_BYTES", {"cpu": 2 * 48})
    kept = KeptOutputs(block, changes=False)
    for reading in ("none", "none", None, None):
        for index, x in enumerate(batches):
            with kept.used(index, reading):
                assert torch.equal(block(x), expected[index])
    # Batch 0 runs first and, given up, last; batch 1 finds no room in the first two rounds.
    assert block.module[0].runs - runs == 2 + 4


@pytest.mark.parametrize(("gigabytes", "room"), [(8, 2**30), (80, 2**32)])
def test_a_small_gpu_keeps_less(gigabytes: int, room: int, monkeypatch: pytest.MonkeyPatch):
    memory = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: memory)
    assert room_on(torch.device("cuda")) == room


@torch.no_grad()
def test_outputs_in_dictionaries_and_nested_tuples_count_for_the_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    block, x = two_parts(False), torch.randn(3, 4)
    run = Counted.forward
    monkeypatch.setattr(Counted, "forward", lambda part, x: {"a": (run(part, x), None)})
    monkeypatch.setattr(nn.Sequential, "forward", lambda whole, x: whole[0](x)["a"][0])
    monkeypatch.setattr("marrq.pipeline.kept_outputs.KEPT_BYTES", {"cpu": 47})
    kept, runs = KeptOutputs(block, changes=False), block.module[0].runs
    for _ in range(2):
        with kept.used(0, "none"):
            block(x)
    # 3 · 4 numbers have no room.
    assert block.module[0].runs - runs == 2


@torch.no_grad()
def test_a_linear_that_is_not_quantized_yet_is_never_kept():
    block, x = two_parts(False), torch.randn(3, 4)
    kept = KeptOutputs(block, changes=True)
    for _ in range(2):
        with kept.used(0, "1.linear"):
            block(x)
        block.linear("0.linear").weight.mul_(3)
    expected = block(x)
    with kept.used(0, "1.linear"):
        assert torch.equal(block(x), expected)
