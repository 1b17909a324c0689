"""The refinement: straight-through gradients, what is learned, what stays, and what is recorded."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from flavor_files import slow
from tiny_models import (
    hashed,
    noise,
    quantized,
    swin,
    transformers_vit,
    vision_model,
    vit,
    vit_with_layer_scale,
)
from torch import Tensor, nn

from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.artifact.folder import load, save
from marrq.errors import MarrqError
from marrq.methods.refinement_spec import RefinementSpec
from marrq.methods.spec import MethodSpec, parse_method
from marrq.models.images import find_images
from marrq.models.named_outputs import kinds_of_change
from marrq.quantized_model import QuantizedModel, RefinementRecord
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import quantized_linears
from marrq.refinement.learned import LearnedCodes, learn
from marrq.refinement.loss import distance
from marrq.refinement.refine import BETAS, _share_of_rate, batches, refine
from marrq.refinement.straight_through import nearest
from marrq.refinement.teacher import Teacher
from marrq.schemes import ActivationStrategy, parse_scheme
from marrq.workflows.quantize import Recipe, shortfalls

SPEC = RefinementSpec(on=True, images=48, batch=8, held_out=48)
RECORD = {
    "images": 48,
    "held_out": 48,
    "files_sha256": "hash",
    "steps": 6,
    "loss_before": 0.5,
    "loss_after": 0.4,
}


def reference_gradients(x: Tensor, scale: float, zero: int, low: int, high: int, g: Tensor):
    """∂⟨g, q(x)⟩ by x and by the scale, number by number."""
    by_x, by_scale = torch.zeros_like(x), 0.0
    for place, value in enumerate(x.tolist()):
        code = round(value / scale) + zero
        clamped = min(max(code, low), high)
        if code == clamped:
            by_x[place] = g[place]
            by_scale += float(g[place]) * (clamped - zero - value / scale)
        else:
            by_scale += float(g[place]) * (clamped - zero)
    return by_x, by_scale


@pytest.mark.parametrize(("low", "high", "zero"), [(0, 7, 3), (0, 255, 0), (-8, 7, 0)])
def test_the_gradients_of_rounding_are_those_of_a_straight_line(low: int, high: int, zero: int):
    x = torch.linspace(-3, 3, 41).requires_grad_()
    scale = torch.tensor(0.31, requires_grad=True)
    grid = Grid(scale, torch.tensor(float(zero)), low, high)
    weights = torch.cos(torch.arange(41.0))
    values = nearest(grid, x)
    with torch.no_grad():
        assert torch.equal(values, grid.nearest(x))
    (values * weights).sum().backward()
    by_x, by_scale = reference_gradients(x.detach(), 0.31, zero, low, high, weights)
    assert torch.equal(x.grad, by_x)
    assert math.isclose(float(scale.grad), by_scale, rel_tol=1e-4)
    # Some x are clipped and some are not, or the test would see one of the two rules.
    assert 0 < int((by_x == 0).sum()) < 41 or (low, high) == (0, 255)


def test_every_token_has_the_gradient_of_its_own_scale():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(2, 3, 1).add_(0.1).requires_grad_()
    zero = torch.full_like(scale, 2).detach()
    nearest(Grid(scale, zero, 0, 7), x).sum().backward()
    for image in range(2):
        for token in range(3):
            alone = scale.detach()[image, token].clone().requires_grad_()
            nearest(Grid(alone, zero[image, token], 0, 7), x[image, token]).sum().backward()
            assert torch.allclose(scale.grad[image, token], alone.grad)


def test_the_loss_is_the_divergence_of_classes_and_the_angle_of_features():
    found, wanted = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.eye(3, 5)
    temperature, divergences, angles = 3.0, [], []
    for z, t in zip(found.double().numpy(), wanted.double().numpy(), strict=True):
        p, q = np.exp(t / temperature), np.exp(z / temperature)
        p, q = p / p.sum(), q / q.sum()
        divergences.append(temperature**2 * (p * np.log(p / q)).sum())
        angles.append(1 - (z @ t) / np.linalg.norm(z) / np.linalg.norm(t))
    assert float(distance(found, wanted, "classes", temperature)) == pytest.approx(
        np.mean(divergences), rel=1e-5
    )
    assert float(distance(found, wanted, "features", temperature)) == pytest.approx(
        np.mean(angles), rel=1e-5
    )


@pytest.mark.parametrize(("shape", "labels"), [((3, 4, 2, 5), "ab"), ((3, 1), ""), ((3, 1), "a")])
def test_the_size_of_a_dense_output_and_of_one_number_counts_in_the_loss(
    shape: tuple[int, ...], labels: str
):
    [kind] = kinds_of_change([torch.zeros(shape)], ["logits"], labels)
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    expected = [
        0.5 * ((z - t) ** 2).sum() / (t**2).sum()
        for z, t in zip(found.double().numpy(), wanted.double().numpy(), strict=True)
    ]
    assert float(distance(found, wanted, kind, 4.0)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(distance(3 * wanted, wanted, kind, 4.0)) == pytest.approx(2.0, rel=1e-5)


class TwoOutputs(nn.Module):
    """Logits of classes, and the tokens that they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.vit(pixels), self.vit.forward_features(pixels)


@torch.no_grad()
def test_several_outputs_are_learned_together():
    model = replace(vision_model(TwoOutputs()), outputs=("logits", "tokens"))
    images = noise(20)
    teacher = Teacher.of(model, images, "hash")
    assert teacher.kinds == ["classes", "dense"]
    assert [output.shape for output in teacher.outputs] == [(20, 5), (20, 17, 64)]
    assert abs(float(teacher.loss(model.module, slice(0, 20), 2.0))) < 1e-5
    model.module.vit.norm.bias += 0.5
    logits, tokens = model.module(images[4:8])
    wanted = [output[4:8] for output in teacher.outputs]
    expected = distance(logits, wanted[0], "classes", 2.0)
    expected = expected + distance(tokens, wanted[1], "dense", 2.0)
    assert float(teacher.loss(model.module, slice(4, 8), 2.0)) == pytest.approx(float(expected))
    # Without names of classes, the same numbers are features.
    unlabelled = Teacher.of(replace(model, labels=()), images, "hash")
    assert unlabelled.kinds == ["features", "dense"]


def prepared(
    build: Callable[[], nn.Module] = vit,
    scheme: str = "W3A4",
    strategy: ActivationStrategy = "per-tensor",
    method: str = "gptq",
    **changes: object,
) -> tuple[QuantizedModel, Teacher]:
    """A tiny model, quantized and not yet refined, and its teacher."""
    model, teacher = copy.deepcopy(_prepared(build, scheme, strategy, method))
    refinement = replace(SPEC, **changes)
    return replace(model, method=replace(model.method, refinement=refinement)), teacher


@cache
def _prepared(
    build: Callable[[], nn.Module], scheme: str, strategy: ActivationStrategy, method: str
) -> tuple[QuantizedModel, Teacher]:
    fresh = noise(SPEC.images + SPEC.held_out, seed=1)
    teacher = Teacher.of(vision_model(build()), fresh, "hash")
    return quantized(build(), noise(16), scheme, method, strategy=strategy), teacher


def judged_by_what_it_teaches(teacher: Teacher) -> Teacher:
    """The teacher with the images to learn from as held-out images: a right gradient always helps
    on them."""
    rows = slice(0, SPEC.images)
    return replace(
        teacher,
        images=teacher.images[rows].repeat(2, 1, 1, 1)[: len(teacher.images)],
        outputs=[output[rows].repeat(2, 1)[: len(output)] for output in teacher.outputs],
    )


CASES = [
    (vit, "W3A4", "per-token", "gptq"),
    slow(vit_with_layer_scale, "W3A8-e8", "per-tensor", "gptq"),
    slow(transformers_vit, "W4A16-g16", "per-tensor", "gptq"),
    slow(swin, "W4A8-sym", "per-tensor", "gptq"),
    slow(vit, "W4A16-mxint", "per-tensor", "gptq"),
    (vit, "W2A8", "per-tensor", "gptq,lowrank=srr:4"),
    slow(vit, "W2A8", "per-token", "gptq,lowrank=lqer:4:int8"),
]


@pytest.mark.parametrize(("build", "scheme", "strategy", "method"), CASES)
def test_what_is_not_learned_stays_and_nothing_learned_changes_no_byte(
    build: Callable[[], nn.Module], scheme: str, strategy: ActivationStrategy, method: str
):
    model, _ = prepared(build, scheme, strategy, method)
    before, pixels = hashed(model), noise(4, seed=2)
    expected = model.module(pixels)
    for learns_codes in (False, True):
        learned = learn(model.module, pixels[:1], learns_codes)
        # What is trained is what is stored, but for the order of floating-point sums.
        assert torch.allclose(model.module(pixels), expected, atol=1e-4)
        learned.store()
        assert hashed(model) == before


@pytest.mark.parametrize(("build", "scheme", "strategy", "method"), CASES)
def test_the_loss_falls_and_the_codes_stay(
    build: Callable[[], nn.Module], scheme: str, strategy: ActivationStrategy, method: str
):
    model, teacher = prepared(build, scheme, strategy, method, epochs=6, codes=False)
    integers = {
        path: (linear.codes.clone(), linear.zero_point.clone())
        for path, linear in quantized_linears(model.module).items()
    }
    rows = slice(0, SPEC.images)
    with torch.no_grad():
        before = float(teacher.loss(model.module, rows, SPEC.temperature))
        assert before > 0
    found = refine(model, judged_by_what_it_teaches(teacher))
    assert found.refinement is not None
    assert found.refinement.helped
    with torch.no_grad():
        assert float(teacher.loss(found.module, rows, SPEC.temperature)) < 0.95 * before
    for path, linear in quantized_linears(found.module).items():
        assert torch.equal(linear.codes, integers[path][0])
        assert torch.equal(linear.zero_point, integers[path][1])
    assert not any(parameter.requires_grad for parameter in found.module.parameters())


@pytest.mark.parametrize("branch", ["srr:4", "qera:4:int8"])
def test_both_factors_of_a_branch_are_learned_and_stay_what_the_artifact_stores(branch: str):
    model, teacher = prepared(
        vit, "W2A8", "per-tensor", f"gptq,lowrank={branch}", rate=10.0, codes=False
    )
    before = {path: one.lowrank for path, one in quantized_linears(model.module).items()}
    refine(model, judged_by_what_it_teaches(teacher))
    for path, linear in quantized_linears(model.module).items():
        for side in ("left", "right"):
            was, now = getattr(before[path], side), getattr(linear.lowrank, side)
            assert now.codes.dtype == was.codes.dtype
            assert not torch.equal(now.codes, was.codes)
            assert was.scale is None or torch.equal(now.scale, was.scale)


@pytest.mark.parametrize("method", ["gptq", "gptq,lowrank=serq:8", "gptq,lowrank=srr:4"])
def test_codes_move_by_one_step_within_their_grid_and_are_counted(method: str):
    model, teacher = prepared(vit, "W3A8", "per-tensor", method, batch=1)
    before = {p: one.quantized_weight for p, one in quantized_linears(model.module).items()}
    found = refine(model, judged_by_what_it_teaches(teacher))
    assert found.refinement is not None
    assert found.refinement.helped
    moved = 0
    for path, linear in quantized_linears(found.module).items():
        was, now = before[path], linear.quantized_weight
        assert torch.equal(was.zero_point, now.zero_point)
        unit, low, high = np.ones(was.codes.shape[1]), -4, 3
        if was.salient_columns is not None:
            # A column without second codes has every fourth joint code (quantizers/salient.py).
            unit *= 4
            low, high = np.full(len(unit), -16), np.full(len(unit), 12)
            chosen = was.salient_columns.numpy()
            unit[chosen], low[chosen], high[chosen] = 1, -32, 31
        steps = (now.codes.int() - was.codes.int()).numpy() / unit
        assert set(np.unique(steps)) <= {-1, 0, 1}
        assert ((low <= now.codes.numpy()) & (now.codes.numpy() <= high)).all()
        moved += int((steps != 0).sum())
    assert found.refinement.moved_codes == moved > 0


def test_a_code_has_the_gradient_of_its_weight_and_none_beyond_the_end_of_the_grid():
    model, _ = prepared(vit, "W4A16-g16", method="gptq,lowrank=serq:8")
    for linear in quantized_linears(model.module).values():
        weight = linear.quantized_weight
        codes = LearnedCodes(weight)
        towards = torch.randn(weight.codes.shape, generator=torch.Generator().manual_seed(0))
        codes.shift.data[:] = 0.6
        (codes() * towards).sum().backward()
        # A step is δ in a salient column and 4 δ in the others, with a scale δ for each group.
        is_salient = np.zeros(weight.codes.shape[1], bool)
        is_salient[linear.salient_columns.numpy()] = True
        step = np.repeat(linear.scale.numpy(), 16, axis=1) * np.where(is_salient, 1, 4)
        at_end = weight.codes.numpy() == np.where(is_salient, 63, 28)
        assert at_end.any()
        expected = np.where(at_end, 0, step * towards.numpy())
        assert np.allclose(codes.shift.grad.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [30, 300])
def test_gradients_that_are_noise_move_few_codes_whatever_the_number_of_steps(steps: int):
    spec = RefinementSpec(on=True, images=steps, batch=1)
    model, _ = prepared(vit, "W3A8")
    learned = learn(model.module, noise(1), True)
    shares = [_share_of_rate(step, spec.steps) for step in range(spec.steps)]
    groups = learned.groups(1.0, math.hypot(*shares))
    linear = next(iter(learned.linears.values()))
    [group] = [one for one in groups if any(p is linear.codes.shift for p in one["params"])]
    shift = nn.Parameter(torch.zeros(20_000))
    optimizer, generator = torch.optim.Adam([shift], betas=BETAS), torch.Generator().manual_seed(0)
    for share in shares:
        optimizer.param_groups[0]["lr"] = group["lr"] * share
        # Codes of the last half have a mean of a standard deviation.
        shift.grad = torch.randn(len(shift), generator=generator)
        shift.grad[len(shift) // 2 :] += 1
        optimizer.step()
    noise_alone, agreed = (shift.detach().abs() > 0.5).chunk(2)
    assert float(noise_alone.float().mean()) < 0.02
    assert float(agreed.float().mean()) > 0.6


def test_a_vector_of_zeros_is_learned_too():
    # Rotation leaves norms without biases.
    model, teacher = prepared(vit, "W3A8", method="gptq,rotate=0", epochs=2)
    norms = [one for one in model.module.modules() if isinstance(one, nn.LayerNorm)]
    assert all(bool((norm.bias == 0).all()) for norm in norms)
    refine(model, judged_by_what_it_teaches(teacher))
    assert all(bool((norm.bias != 0).any()) for norm in norms)


def test_linears_that_read_one_input_keep_one_grid():
    model, teacher = prepared(transformers_vit, "W3A4", "per-token", epochs=6)
    # As after a resumed run: equal quantizers, not one.
    for linear in quantized_linears(model.module).values():
        linear.input = copy.deepcopy(linear.input)
    refine(model, judged_by_what_it_teaches(teacher))
    linears = quantized_linears(model.module)
    clips = {path: float(linear.input.clip) for path, linear in linears.items()}
    for path, clip in clips.items():
        if path.endswith("q_proj"):
            assert clips[path.replace("q_proj", "k_proj")] == clip
            assert clips[path.replace("q_proj", "v_proj")] == clip
    assert len(set(clips.values())) == 8


def test_linears_that_read_one_tensor_by_grids_of_their_own_keep_them():
    model, _ = prepared(transformers_vit, "W3A4", "per-token")
    # The first linear is q of the first block: as if it had been calibrated apart from k and v.
    query = next(iter(quantized_linears(model.module).values()))
    query.input = copy.deepcopy(query.input)
    query.input.clip *= 0.5
    before, pixels = hashed(model), noise(1)
    learn(model.module, pixels, True).store()
    assert hashed(model) == before


@pytest.mark.slow
def test_a_refined_model_is_the_same_saved_loaded_and_exported(tmp_path: Path):
    model, teacher = prepared(vit, "W4A8", epochs=6)
    found, pixels = refine(model, teacher), noise(16, seed=2)
    assert found.refinement is not None
    assert found.refinement.helped
    save(found, tmp_path / "artifact")
    read = load(tmp_path / "artifact")
    assert (read.refinement, read.method) == (found.refinement, found.method)
    assert hashed(read) == hashed(found)
    assert "gptq refined" in (tmp_path / "artifact" / "README.md").read_text()
    file = tmp_path / "model.onnx"
    write(trace_quantized(read, "hash"), "integer", file)
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    with torch.no_grad():
        gaps = np.abs(logits - found.module(pixels).numpy()).max(1)  # [images]
    # In 2 to 3 of 100 images an activation lies so near the middle of two codes that the two
    # runtimes round it apart; all others agree to the last bits.
    assert (gaps < 1e-5).sum() >= 13
    assert gaps.max() < 0.05
    written = session.get_modelmeta().custom_metadata_map
    assert written["marrq.method"] == "gptq refined"
    assert json.loads(written["marrq.refinement"]) == asdict(found.refinement)


def test_the_same_seed_gives_the_same_bytes_and_another_order_others():
    hashes = []
    for seed in (0, 0, 1):
        model, teacher = prepared(epochs=2)
        model = replace(model, calibration=replace(model.calibration, seed=seed))
        hashes.append(hashed(refine(model, judged_by_what_it_teaches(teacher))))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_refinement_that_does_not_help_is_taken_back_and_recorded():
    model, teacher = prepared(rate=100.0)
    before = hashed(model)
    found = refine(model, teacher)
    assert found.refinement is not None
    assert not found.refinement.helped
    assert found.method_name == "gptq"
    assert found.refinement.loss_after > found.refinement.loss_before
    assert hashed(found) == before
    assert any("was taken back" in sentence for sentence in shortfalls(found))


def test_a_loss_that_is_not_finite_ends_with_the_way_out():
    with pytest.raises(MarrqError, match=r"loss is \w+ .*: lower refine\.rate, which is 100"):
        refine(*endless(prepared(epochs=3, rate=100.0)))
    model, teacher = prepared()
    model.module.head.bias.data[0] = math.inf
    with pytest.raises(MarrqError, match=r"loss is nan before its first step: .* overflow"):
        refine(model, teacher)


def endless(given: tuple[QuantizedModel, Teacher]) -> tuple[QuantizedModel, Teacher]:
    """A loss that is infinite as soon as anything has been learned."""
    model, teacher = given

    class Brittle(Teacher):
        steps = 0

        def loss(self, module: nn.Module, rows: slice, temperature: float) -> Tensor:
            found = super().loss(module, rows, temperature)
            Brittle.steps += found.requires_grad
            return found * (math.inf if Brittle.steps > 1 else 1)

    return model, Brittle(teacher.images, teacher.files_sha256, teacher.outputs, teacher.kinds)


def test_a_teacher_that_gives_no_numbers_is_told_before_anything_is_quantized():
    model = vision_model(vit())
    with torch.no_grad():
        model.module.head.bias[0] = math.inf
    with pytest.raises(MarrqError, match="full-precision model gives NaN or infinity"):
        Teacher.of(model, noise(4), "hash")


@pytest.mark.parametrize(("images", "batch", "epochs"), [(23, 12, 2), (24, 12, 1), (7, 7, 3)])
def test_every_image_is_learned_from_once_in_an_epoch(images: int, batch: int, epochs: int):
    spec = RefinementSpec(on=True, images=images, batch=batch, epochs=epochs)
    rows = list(batches(spec, 0))
    assert len(rows) == spec.steps
    seen = [row for one in rows for row in range(images)[one]]
    assert sorted(seen) == sorted(epochs * list(range(images)))
    assert max(len(range(images)[one]) for one in rows) <= batch


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gptq,refine.images=24", "'refine.images' is given and the refinement is off: add refine"),
        ("gptq,refine=on,refine.images=3", "takes 12 images and there are 3: lower refine.batch"),
        ("gptq,refine=maybe", "must be on or off"),
        ("gptq,refine=on,refine.rate=-1", "must be a number from 0 to 100"),
    ],
)
def test_wrong_choices_are_told_at_once(text: str, message: str):
    with pytest.raises(MarrqError, match=message):
        parse_method(text)


def test_its_images_are_those_that_calibration_has_not_drawn(image_folder: Path):
    images = find_images(str(image_folder), "train")
    few = replace(SPEC, images=8, held_out=len(images) - 16)
    recipe = Recipe(parse_scheme("W4A8"), MethodSpec("gptq", refinement=few), samples=8, seed=3)
    fresh = recipe.fresh(images)
    assert sorted((*images.draw(8, 3).paths, *fresh.paths)) == sorted(images.paths)
    short = replace(recipe, samples=9)
    with pytest.raises(MarrqError, match=r"together by 1, or add images"):
        short.fresh(images)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, _ = prepared()
    folder = tmp_path_factory.mktemp("refined") / "artifact"
    save(replace(model, refinement=RefinementRecord(**RECORD)), folder)
    return folder


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {"images": 3},
        {**RECORD, "steps": "many"},
        {**RECORD, "loss_after": math.nan},
        {**RECORD, "files_sha256": 3},
        {**RECORD, "more": 1},
        {**RECORD, "moved_codes": -1},
        {**RECORD, "moved_codes": True},
    ],
    ids=str,
)
def test_a_damaged_record_is_refused(damaged: object, artifact: Path):
    config = artifact / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "refinement": damaged}))
    try:
        with pytest.raises(MarrqError, match="is damaged"):
            load(artifact)
    finally:
        config.write_text(whole)
    assert load(artifact).refinement == RefinementRecord(**RECORD)
