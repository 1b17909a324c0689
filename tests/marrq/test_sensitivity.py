"""What a linear costs at a width is what it is said to be, sizes are those of the artifact, and a
budget is met by the best widths that fit."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import pytest
import torch
from tiny_models import noise, quantized, swin, transformers_vit, vision_model, vit
from torch import Tensor, nn

from marrq.artifact.tensors import tensors_of
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.pipeline.sensitivity import SensitivitySettings, measure_sensitivity
from marrq.quantized_model import CalibrationRecord, QuantizationSettings, QuantizedModel
from marrq.quantizers.linear import bits_per_weight, quantized_linears
from marrq.schemes import ActivationStrategy, parse_scheme
from marrq.sensitivity import (
    GroupSensitivity,
    Sensitivity,
    Width,
    sensitivity_from_json,
)

IMAGES = noise(32)
RUN = RunOptions(torch.device("cpu"))


def settings(
    scheme: str, method: str = "gptq", strategy: ActivationStrategy = "per-tensor"
) -> SensitivitySettings:
    record = CalibrationRecord("noise", len(IMAGES), 0, "")
    return SensitivitySettings(parse_scheme(scheme, strategy), parse_method(method), record)


def measured(
    module: nn.Module,
    scheme: str,
    method: str = "gptq",
    strategy: ActivationStrategy = "per-tensor",
    images: Tensor = IMAGES,
) -> Sensitivity:
    return measure_sensitivity(
        vision_model(module), images, settings(scheme, method, strategy), RUN
    )


@pytest.fixture(scope="module")
def tiny() -> Sensitivity:
    return measured(vit(), "WmixA8")


def planned(
    module: nn.Module,
    chosen: SensitivitySettings,
    widths: dict[str, int],
) -> QuantizedModel:
    given = QuantizationSettings(chosen.scheme, chosen.method, chosen.calibration, widths)
    return quantize(vision_model(module), IMAGES, given, RUN)


@pytest.mark.parametrize(
    ("build", "scheme", "strategy", "budget"),
    [
        (vit, "WmixA8", "per-tensor", 4.0),
        (vit, "WmixA4-e8", "per-token", 5.0),
        (transformers_vit, "WmixA16-g16-sym", "per-tensor", 5.5),
        (vit, "WmixA16-mxint", "per-tensor", 5.5),
        pytest.param(swin, "WmixA4", "per-tensor", 5.0, marks=pytest.mark.slow),
    ],
)
def test_a_model_within_a_budget_has_the_bits_and_the_tensors_that_its_plan_says(
    build: object, scheme: str, strategy: ActivationStrategy, budget: float
):
    module = build()  # type: ignore[operator]
    found = measured(copy.deepcopy(module), scheme, strategy=strategy)
    plan = found.within_bits(budget)
    model = planned(module, settings(scheme, strategy=strategy), dict(plan.widths))
    # Factors that smooth an input count as soon as they are possible, so a model may be smaller.
    exact = "A4" not in scheme
    assert bits_per_weight(model.module) <= plan.bits_per_weight <= budget
    stored = sum(
        tensor.numel() * tensor.element_size() for tensor in tensors_of(model.module).values()
    )
    assert stored <= plan.size_bytes
    if exact:
        assert bits_per_weight(model.module) == pytest.approx(plan.bits_per_weight, abs=1e-9)
        assert stored == plan.size_bytes


def test_a_budget_leaves_less_than_the_smallest_step_that_could_be_taken(tiny: Sensitivity):
    # Every step to more bits helps here, so that a step which fits would have been taken.
    assert all(
        a.divergence > b.divergence for group in tiny.groups for a, b in pairwise(group.widths)
    )
    for budget in (3.0, 3.3, 4.0, 5.1, 6.0):
        plan = tiny.within_bits(budget)
        steps = [
            b.stored_bits - a.stored_bits
            for group in tiny.groups
            for a, b in pairwise(group.widths)
            if plan.widths[group.paths[0]] == a.num_bits
        ]
        assert 0 <= (budget - plan.bits_per_weight) * tiny.weights < min(steps)


def test_a_larger_budget_never_diverges_more_and_no_widths_diverge_less(tiny: Sensitivity):
    every = []
    for chosen in product(*(group.widths for group in tiny.groups)):
        every.append((sum(w.stored_bits for w in chosen), sum(w.divergence for w in chosen)))
    before = float("inf")
    for tenths in range(30, 90, 4):
        plan = tiny.within_bits(tenths / 10)
        limit = tenths / 10 * tiny.weights
        best = min(cost for bits, cost in every if bits <= limit)
        assert plan.divergence == pytest.approx(best, rel=1e-12)
        assert plan.divergence <= before
        before = plan.divergence


def test_linears_that_share_an_input_have_one_width():
    found = measured(transformers_vit(), "WmixA8")
    shared = [group for group in found.groups if len(group.paths) == 3]
    assert len(shared) == 2
    plan = found.within_bits(5.0)
    for group in shared:
        assert len({plan.widths[path] for path in group.paths}) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_the_cost_of_a_linear_is_about_the_divergence_of_that_linear_alone(bits: int):
    """The oracle: a linear with its codes stands in the float model, and the divergence on the half
    of the images that judges is what it is. An error has directions, of which the estimate knows
    nothing: that leaves a factor."""
    # Enough images that codes from half of them do as well as codes from all.
    method, images = "gptq,equalize=off,token-weights=on", noise(256)
    costs = measured(vit(), "WmixA16", method, images=images)
    coded = quantized_linears(quantized(vit(), images, f"W{bits}A16", method).module)
    images = images[128:]
    wanted = vit()(images).log_softmax(1)
    ratios = []
    for group in costs.groups:
        [path] = group.paths
        alone = vit()
        alone.set_submodule(path, coded[path])
        found = alone(images).log_softmax(1)
        true = (wanted.exp() * (wanted - found)).sum(1).mean().item()
        [cost] = [width.divergence for width in group.widths if width.num_bits == bits]
        ratios.append(cost / true)
    assert 0.7 < median(ratios) < 1.5
    assert min(ratios) > 0.4
    assert max(ratios) < 2.5


@pytest.mark.parametrize("method", ["gptq,balance=on", "gptq,balance=on,rotate=0"])
def test_measuring_leaves_the_function_of_the_model(method: str):
    module = vit()
    with torch.no_grad():
        before = module(IMAGES[:2])
        weight = module.blocks[0].attn.qkv.weight.clone()
        measured(module, "WmixA4", method)
        torch.testing.assert_close(module(IMAGES[:2]), before, atol=1e-4, rtol=1e-4)
        assert not torch.equal(module.blocks[0].attn.qkv.weight, weight)


def test_the_same_model_and_images_have_the_same_costs(tiny: Sensitivity):
    assert measured(vit(), "WmixA8") == tiny


def test_a_balanced_block_is_judged_in_its_new_basis():
    module = vit()
    once = measured(module, "WmixA4", "gptq,equalize=off,balance=on")
    # The module is balanced now; its costs are those of a model that came so.
    again = measured(module, "WmixA4", "gptq,equalize=off,balance=off")
    for a, b in zip(once.groups, again.groups, strict=True):
        for width, other in zip(a.widths, b.widths, strict=True):
            assert width.divergence == pytest.approx(other.divergence, rel=1e-2)


def test_a_limit_that_no_model_meets_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
):
    def check(sizes: Sensitivity) -> None:
        sizes.within_bits(2.01)

    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("marrq.pipeline.sensitivity.fisher_energies", measure)
    with pytest.raises(MarrqError, match="is too small"):
        measure_sensitivity(vision_model(vit()), IMAGES, settings("WmixA8"), RUN, check)


def test_settings_that_the_pass_has_no_use_for_leave_no_trace_in_its_report(tiny: Sensitivity):
    method = "marr,alpha=grid,token-weights=off,target-damping=5,lowrank=srr:4"
    assert settings("WmixA8", method).about(vision_model(vit()))["method"] == tiny.about["method"]


@pytest.mark.parametrize(
    ("outputs", "unit"), [(("logits",), "nats"), (("features",), "1 - cosine")]
)
def test_a_report_names_the_unit_of_its_costs(outputs: tuple[str, ...], unit: str):
    labels = vision_model(vit()).labels if outputs == ("logits",) else ()
    model = replace(vision_model(vit()), outputs=outputs, labels=labels)
    found = measure_sensitivity(model, IMAGES, settings("WmixA8"), RUN)
    assert found.about["unit"] == unit


def test_linears_that_no_output_depends_on_are_refused_before_the_first_block():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = vit()

        def forward(self, pixels: Tensor) -> Tensor:
            found: list[Tensor] = []
            handle = self.inner.blocks[0].register_forward_hook(
                lambda module, arguments, output: found.append(output)
            )
            self.inner(pixels)
            handle.remove()
            return self.inner.head(found[0][:, 0])

    with pytest.raises(MarrqError, match=r"linear inner\.blocks\.1.*or no output depends on them"):
        measured(Cut(), "WmixA8")


def test_a_report_gives_the_same_plans_when_it_is_read_back(tiny: Sensitivity):
    read = sensitivity_from_json(json.loads(json.dumps(tiny.to_json())))
    assert read == tiny
    for plan in tiny.curve(20):
        assert read.within_bytes(plan.size_bytes) == plan
        assert read.within_bits(plan.bits_per_weight) == plan
    # Models of one width are never better than the best of their size.
    for bits in (2, 3, 4, 8):
        uniform = tiny.uniform(bits)
        best = tiny.within_bits(uniform.bits_per_weight)
        assert best.divergence <= uniform.divergence


@pytest.mark.parametrize(
    ("budget", "sentence"), [(2.0, "is too small: with the fewest bits"), (0.0, "is too small")]
)
def test_a_budget_that_nothing_fits_is_refused(tiny: Sensitivity, budget: float, sentence: str):
    with pytest.raises(MarrqError, match=sentence):
        tiny.within_bits(budget)
    with pytest.raises(MarrqError, match="float parts included"):
        tiny.within_bytes(1000)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "marrq.bench/2"},
        {"groups": []},
        {"groups": [{"paths": ["a"], "weights": 4, "widths": []}]},
        {"groups": "none"},
        {"other_bits": "many"},
        {"other_bits": math.inf},
        {"outer_bits": -1},
        {"outer_weights": 10**400},
        *(
            {
                "groups": [
                    {
                        "paths": ["a"],
                        "weights": weights,
                        "widths": [{"num_bits": 2, "stored_bits": 8, "divergence": 0.5}],
                    }
                ]
            }
            for weights in (0, -5)
        ),
        {
            "groups": [
                {
                    "paths": ["a"],
                    "weights": 4,
                    "widths": [{"num_bits": 2, "stored_bits": 8, "divergence": float("nan")}],
                }
            ]
        },
        {
            "groups": [
                {
                    "paths": ["a"],
                    "weights": 4,
                    "widths": [{"num_bits": 2, "stored_bits": 2**63, "divergence": 0.5}],
                }
            ]
        },
    ],
)
def test_a_file_that_is_no_sensitivity_is_refused(tiny: Sensitivity, change: dict[str, object]):
    with pytest.raises(MarrqError, match="the file is no sensitivity"):
        sensitivity_from_json({**tiny.to_json(), **change})


def test_the_bits_of_a_plan_buy_the_plan_however_they_are_rounded():
    for weights in (3995, 7, 110592, 1769472):
        sizes = tuple(Width(bits, weights * bits + 120, 1.0 / bits) for bits in (2, 3, 4, 8))
        group = Sensitivity({}, (GroupSensitivity(("a",), weights, sizes),))
        for bits in (2, 3, 4, 8):
            plan = group.uniform(bits)
            assert group.within_bits(plan.bits_per_weight) == plan


def test_a_first_layer_of_8_bits_counts_in_every_plan():
    widths = tuple(Width(bits, 100 * bits, 1.0 / bits) for bits in (2, 3, 4, 8))
    plain = Sensitivity({}, (GroupSensitivity(("a",), 100, widths),))
    outer = replace(plain, outer_weights=100, outer_bits=800)
    assert plain.within_bits(3.0).widths == {"a": 3}
    # (100 · 8 + 100 · 2) / 200 = 5
    assert outer.within_bits(5.0).widths == {"a": 2}
    with pytest.raises(MarrqError, match="too small"):
        outer.within_bits(4.9)


def test_a_measurement_is_written_and_read_by_its_own_schema(tiny: Sensitivity, tmp_path: Path):
    from runtime.report.sensitivity import plot_sensitivity
    from runtime.sensitivity import SensitivityReport

    report = SensitivityReport.read(json.loads(json.dumps(tiny.to_json())))
    assert [group.paths for group in report.groups] == [group.paths for group in tiny.groups]
    plot_sensitivity(report, tmp_path / "a.svg")
    plot_sensitivity(report, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
