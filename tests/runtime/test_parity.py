"""Parity tells the losses of quantization, export and preprocessing apart: each planted fault is
found, and named with its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from tiny_models import dinov2, noise, quantized, swin, vit, vit_with_layer_scale
from torch import nn

from exporters.onnx_file import write
from exporters.trace import TracedModel, trace, trace_quantized, with_placeholders
from marrq.artifact.folder import load
from marrq.cli import main
from marrq.models.images import ImageSet, find_images
from marrq.quantizers.linear import quantized_linears
from marrq.workflows.evaluate import watch_linears
from marrq.workflows.parity import linear_errors, measure_parity
from runtime.errors import BenchError
from runtime.measure.cosines import cosines
from runtime.measure.linears_alone import LinearsAlone, relative_error
from runtime.measure.parity import LINEAR_TOLERANCE, Parity, compare_stages
from runtime.measure.stages import ComparedOutput, StageOutput, compared, joined
from runtime.session import SessionSettings

MODELS = {"vit": vit, "vit with LayerScale": vit_with_layer_scale, "swin": swin, "dinov2": dinov2}
SESSION = SessionSettings(threads=1)
HEALTHY = 1e-5


def edited(file: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of a file with a fault in it."""
    graph, copy = onnx.load(file), file.with_name("faulty.onnx")
    change(graph)
    onnx.save(graph, copy)
    return copy


def initializer(graph: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.graph.initializer if tensor.name == name)


def wrong(errors: dict[str, float]) -> list[str]:
    return [path for path, error in errors.items() if not error <= LINEAR_TOLERANCE]


@pytest.mark.parametrize(
    ("model", "flavor", "scheme", "method", "strategy"),
    [
        ("vit with LayerScale", "qdq", "W3A8", "gptq,lowrank=srr:4", "per-token"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("vit with LayerScale", "integer", "W2A4", "gptq", "per-token"),
                ("vit with LayerScale", "integer", "W4A8-g64", "gptq,lowrank=srr:4", "per-tensor"),
                ("vit with LayerScale", "qdq", "W4A4", "gptq", "per-tensor"),
                (
                    "vit with LayerScale",
                    "matmulnbits",
                    "W4A16-g32",
                    "gptq,lowrank=lqer:4:int8",
                    "per-tensor",
                ),
                ("swin", "integer", "W3A8", "gptq", "per-token"),
                ("dinov2", "integer", "W4A8", "gptq", "per-tensor"),
                ("vit with LayerScale", "integer", "W4A8-e8", "gptq", "per-tensor"),
                ("vit with LayerScale", "qdq", "W4A8-e8", "gptq", "per-tensor"),
                ("vit with LayerScale", "matmulnbits", "W4A16-e8", "gptq", "per-tensor"),
            )
        ),
    ],
)
def test_each_linear_alone_gives_what_torch_gives_for_the_same_input(
    model: str, flavor: str, scheme: str, method: str, strategy: Any, tmp_path: Path
):
    """LayerScale inside, q, k and v apart, the last block's tokens dropped, patches flattened, as
    it comes."""
    made = quantized(MODELS[model](), noise(8), scheme, method, strategy=strategy)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    errors = linear_errors(made, tmp_path / "m.onnx", noise(2, seed=3), SESSION)
    assert list(errors) == list(quantized_linears(made.module))
    assert 0 < max(errors.values()) < HEALTHY


@pytest.mark.slow
def test_what_the_file_tells_of_its_linears_is_small(demo_file: Path):
    metadata = {entry.key: entry.value for entry in onnx.load(demo_file).metadata_props}
    assert len(json.loads(metadata["marrq.linears"])) == 16
    assert len(metadata["marrq.linears"]) < 0.003 * demo_file.stat().st_size


def test_a_file_that_does_not_tell_where_its_linears_are_is_refused(integer_file: Path):
    def forget(graph: onnx.ModelProto) -> None:
        del graph.metadata_props[:]

    with pytest.raises(
        BenchError, match="does not say where its linears are: export the artifact again"
    ):
        LinearsAlone(edited(integer_file, forget), SESSION)


def test_each_linear_is_seen_with_what_it_takes_and_gives(traced_vit: TracedModel):
    model = traced_vit.model.module
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    watch_linears(model, noise(2), lambda path, x, y: seen.update({path: (x, y)}))
    assert list(seen) == list(quantized_linears(model))
    for path, linear in quantized_linears(model).items():
        x, y = seen[path]
        assert torch.equal(linear(x), y)
        assert not linear._forward_hooks


@pytest.fixture(scope="module")
def demo_file(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("parity") / "m.onnx"
    assert main(["export", str(demo_artifact), "-o", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def images(demo_artifact: Path) -> ImageSet:
    return find_images("demo", "val", load(demo_artifact).labels).draw(24, 0)


def measured(artifact: Path, file: Path, images: ImageSet) -> Parity:
    return measure_parity(artifact, file, images, SESSION, lambda count: None)


@pytest.mark.slow
def test_a_healthy_export_loses_nothing(demo_artifact: Path, demo_file: Path, images: ImageSet):
    section = measured(demo_artifact, demo_file, images)
    assert section.first_loss is None
    assert [stage.loss for stage in section.stages] == [None] * 3
    assert section.images == 24
    assert section.stages[1].least_cosine >= 0.9999
    assert section.stages[2].least_cosine >= 0.9999999
    assert section.pixel_difference <= 1e-6
    assert len(section.linears) == 16
    assert all(row.relative_error < HEALTHY for row in section.linears)


def wrong_mean(graph: onnx.ModelProto) -> None:
    [entry] = [entry for entry in graph.metadata_props if entry.key == "marrq.preprocessing"]
    described = json.loads(entry.value)
    entry.value = json.dumps(described | {"mean": [value + 0.02 for value in described["mean"]]})


@pytest.mark.slow
def test_a_wrong_mean_in_the_file_is_a_loss_of_preprocessing(
    demo_artifact: Path, demo_file: Path, images: ImageSet
):
    section = measured(demo_artifact, edited(demo_file, wrong_mean), images)
    assert section.first_loss == "preprocessing"
    assert "pixels differ by up to 6.5e-02" in section.stages[2].loss  # 0.02 / 0.3081
    assert section.stages[1].loss is None


def scaled(path: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = initializer(graph, f"{path}.weight_scale")
        scales = numpy_helper.to_array(tensor).copy()
        scales[5] *= 1.1
        tensor.CopyFrom(numpy_helper.from_array(scales, tensor.name))

    return change


def flipped(path: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = initializer(graph, f"{path}.weight_codes")
        raw = bytearray(tensor.raw_data)
        raw[77] ^= 1  # the lowest bit of one code
        tensor.raw_data = bytes(raw)

    return change


def shifted(path: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = initializer(graph, f"{path}.input_zero_point")
        number = numpy_helper.to_array(tensor) + np.uint8(
            40
        )  # a few would go unseen: the codes shift with it until they are clipped
        tensor.CopyFrom(numpy_helper.from_array(number, tensor.name))

    return change


@pytest.mark.parametrize(
    ("fault", "path", "linear"),
    [
        (scaled, "blocks.1.mlp.fc1", "blocks.1.mlp.fc1"),
        # q of the last block, which the graph computes for one token
        (scaled, "blocks.1.attn.qkv.q", "blocks.1.attn.qkv"),
        (flipped, "blocks.0.attn.proj", "blocks.0.attn.proj"),
        (flipped, "blocks.0.attn.qkv.v", "blocks.0.attn.qkv"),
        (shifted, "blocks.0.mlp.fc2", "blocks.0.mlp.fc2"),
    ],
)
def test_a_wrong_scale_code_or_zero_point_is_found_in_its_own_linear_and_no_other(
    fault: Callable[[str], Callable[[onnx.ModelProto], None]],
    path: str,
    linear: str,
    traced_vit: TracedModel,
    integer_file: Path,
):
    model, pixels = traced_vit.model, noise(4, seed=3)
    assert wrong(linear_errors(model, integer_file, pixels, SESSION)) == []
    faulty = edited(integer_file, fault(path))
    assert wrong(linear_errors(model, faulty, pixels, SESSION)) == [linear]


@pytest.mark.slow
def test_a_wrong_scale_is_a_loss_of_export_and_its_linear_is_named(
    demo_artifact: Path, demo_file: Path, images: ImageSet
):
    section = measured(demo_artifact, edited(demo_file, scaled("blocks.1.mlp.fc1")), images)
    assert section.first_loss == "export"
    assert section.stages[1].loss.startswith(
        "blocks.1.mlp.fc1 differs by 9."
    )  # of 10 %, bias apart
    assert section.stages[0].loss is None


@pytest.mark.slow
def test_a_fault_between_the_linears_is_a_loss_of_export_too(
    demo_artifact: Path, demo_file: Path, images: ImageSet
):
    def detune(graph: onnx.ModelProto) -> None:
        tensor = initializer(graph, "norm.weight")
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name)
        )

    section = measured(demo_artifact, edited(demo_file, detune), images)
    assert section.first_loss == "export"
    assert "no linear is at fault" in section.stages[1].loss


@pytest.mark.slow
def test_accuracy_level_4_is_found_to_be_another_model(tmp_path: Path):
    made = quantized(vit(), noise(8), "W4A16", "gptq")
    write(trace_quantized(made, "hash"), "matmulnbits", tmp_path / "m.onnx", {"accuracy_level": 4})
    assert wrong(linear_errors(made, tmp_path / "m.onnx", noise(2), SESSION)) == list(
        quantized_linears(made.module)
    )


@torch.no_grad()
def with_equal_parameters() -> nn.Module:
    """A ViT whose LayerScale equals a LayerNorm's weight, and whose LayerNorms have the zero bias
    of the linears behind them."""
    model = vit(init_values=1.0)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "norm1.weight", "norm2.weight")):
            parameter.copy_(torch.linspace(0.5, 1.5, 64))
        elif name.endswith("bias"):
            parameter.zero_()
    return model


@pytest.mark.slow
def test_a_rewrite_leaves_an_initializer_as_it_was_for_its_other_users(tmp_path: Path):
    """The exporter of torch gives equal tensors one initializer. LayerScale is absorbed, and the
    biases of linears are corrected."""
    float_model = with_equal_parameters()
    made = quantized(with_equal_parameters(), noise(8), "W4A8", "gptq,equalize=off")
    users = [
        {node.op_type for node in value.consumers()}
        for value in trace(
            with_placeholders(made.module), (3, 32, 32), 20
        ).graph.initializers.values()
        if value.shape == ir.Shape([64])
    ]
    assert {"Mul", "LayerNormalization"} in users  # the plant: one value for LayerScale and norm
    assert all(
        linear.bias is not None and linear.bias.any()
        for linear in quantized_linears(made.module).values()
    )
    write(trace_quantized(made, "hash"), "integer", tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    expected = [module for module in float_model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == len(expected) == 5
    for node, module in zip(norms, expected, strict=True):
        np.testing.assert_array_equal(arrays[node.input[1]], module.weight.detach().numpy())
        np.testing.assert_array_equal(arrays[node.input[2]], module.bias.detach().numpy())
    assert wrong(linear_errors(made, tmp_path / "m.onnx", noise(2), SESSION)) == []


def distinct(images: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((images, 7)).astype(np.float32)


def sides(*logits: np.ndarray) -> dict[str, ComparedOutput]:
    """The logits of all sides, in two batches."""
    halves = [
        StageOutput(*(side[part] for side in logits)) for part in (slice(20), slice(20, None))
    ]
    return {"logits": joined([compared(half) for half in halves])}


def test_cosine_and_relative_error_are_their_definitions():
    a, b = distinct(5), distinct(5, 1)
    assert cosines(a, b)[3] == pytest.approx(a[3] @ b[3] / np.sqrt((a[3] @ a[3]) * (b[3] @ b[3])))
    tokens = distinct(20).reshape(4, 5, 7)
    off = tokens.copy()
    off[..., 2] *= 1.25
    assert relative_error(off, tokens) == pytest.approx(0.25)
    assert relative_error(tokens, tokens) == 0
    tokens[..., 2] = 0
    assert relative_error(tokens, tokens) == 0
    assert 0.1 < relative_error(off, tokens) < 10
    assert np.isnan(relative_error(np.full_like(off, np.nan), tokens))


def test_quantization_loses_when_chance_does_not_explain_the_images_it_gets_wrong():
    """Of 100 images that float has right some are lost by quantization, and as many or none are
    won."""
    targets = np.arange(100) % 7
    right = np.eye(7, dtype=np.float32)[targets]
    other = np.roll(right, 1, axis=1)

    def section(lost: int, won: int) -> Parity:
        original, simulated = right.copy(), right.copy()
        simulated[:lost], original[lost : lost + won] = other[:lost], other[lost : lost + won]
        return compare_stages(
            sides(original, simulated, simulated, simulated, simulated),
            targets,
            {"a": 1e-7},
            0.0,
        )

    assert [
        section(lost, won).first_loss
        for lost, won in ((0, 0), (0, 9), (9, 9), (2, 0), (12, 3), (40, 0))
    ] == [
        None,
        None,
        None,
        None,
        "quantization",
        "quantization",
    ]
    stage = section(12, 3).stages[0]
    assert (stage.agreement, stage.top1_source, stage.top1_target) == (0.85, 0.97, 0.88)
    assert stage.loss.startswith("12 images are right in float only, 3 when quantized only")


def test_export_may_move_the_logits_as_far_as_a_nudge_does_and_no_further():
    simulated = distinct(50)
    targets = simulated.argmax(1)

    def first_loss(moved: float, nudge: float, worst: float = 1e-7) -> str | None:
        nudged, exported = (simulated + size * distinct(50, 1) for size in (nudge, moved))
        return compare_stages(
            sides(simulated, simulated, nudged, exported, exported),
            targets,
            {"a": 1e-7, "b": worst},
            0.0,
        ).first_loss

    assert first_loss(0.1, 0.1) is None
    assert first_loss(0.1, 1e-6) == "export"
    assert first_loss(0.1, 0.1, worst=2e-3) == "export"
    assert first_loss(0.1, 0.1, worst=float("nan")) == "export"
    assert first_loss(1e-3, 0) is None


@pytest.mark.slow
def test_the_command_compares_a_file_with_its_own_artifact_and_refuses_another(
    demo_artifact: Path,
    demo_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    bench = ["bench", str(demo_file), "--parity", "--data", "demo", "--baseline", "fp32"]
    assert main(bench) == 1
    assert "name that by --artifact" in capsys.readouterr().err
    other = shutil.copytree(demo_artifact, tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert main([*bench, "--artifact", str(other)]) == 1
    assert "was not exported from 'other' as it is now" in capsys.readouterr().err.replace(
        f"{tmp_path}/", ""
    )
    assert main(["export", str(demo_artifact), "--flavor", "fp32", "-o", "fp32.onnx"]) == 0
    assert main(["bench", "fp32.onnx", "--parity", "--artifact", str(demo_artifact)]) == 1
    assert "bench it without --parity" in capsys.readouterr().err
    quick = [
        "--parity-images",
        "9",
        "--rounds",
        "1",
        "--seconds",
        "0",
        "--batch",
        "1",
        "--threads",
        "1",
        "--json",
        "b.json",
    ]
    assert main([*bench, "--artifact", str(other), "--artifact", str(demo_artifact), *quick]) == 0
    baseline, candidate = json.loads(Path("b.json").read_text())["models"]
    assert baseline["parity"] is None
    section = candidate["parity"]
    assert section["images"] == 9
    assert [stage["stage"] for stage in section["stages"]] == [
        "quantization",
        "export",
        "preprocessing",
    ]
    printed = capsys.readouterr().out
    assert "first stage that loses is none" in printed


def test_saturation_is_named_as_the_cause_where_it_is_one_and_float16_is_allowed_its_rounding():
    simulated = distinct(50)
    logits = sides(simulated, simulated, simulated, simulated, simulated)

    def loss(error: float, saturating: set[str], float16: bool = False) -> str | None:
        linears = {"a": error, "b": error, "c": 1e-7}
        targets = simulated.argmax(1)
        found = compare_stages(logits, targets, linears, 0.0, saturating, float16)
        return found.stages[1].loss

    assert "the sums of 2 of them can saturate on this processor" in str(loss(0.5, {"a", "b"}))
    assert "saturate" not in str(loss(0.5, {"c"}))
    assert loss(1e-7, {"a"}) is None
    assert loss(5e-3, set()) is not None
    assert loss(5e-3, set(), float16=True) is None
    assert loss(0.5, set(), float16=True) is not None


def test_every_output_is_compared_and_the_one_that_is_wrong_is_named():
    """Of two outputs the file gives the second one wrong; for another planted fault all of it."""
    classes, maps = distinct(24), np.random.default_rng(3).standard_normal((24, 3, 4, 5))
    right = StageOutput(classes, classes, classes, classes, classes)

    def found(given: np.ndarray, linear: float = 1e-7) -> Parity:
        moved = StageOutput(maps, maps, maps, given, given)
        both = {"logits": compared(right), "masks": compared(moved, "dense")}
        return compare_stages(both, classes.argmax(1), {"a": linear}, 0.0)

    same = found(maps)
    assert same.first_loss is None
    assert [(stage.stage, stage.output) for stage in same.stages] == [
        (stage, output)
        for stage in ("quantization", "export", "preprocessing")
        for output in ("logits", "masks")
    ]
    assert [stage.agreement for stage in same.stages] == [1.0, None] * 3
    assert [stage.top1_source for stage in same.stages] == [1.0, None] * 3
    losses = {(stage.stage, stage.output): stage.loss for stage in found(-maps).stages}
    assert "masks are 2.0e+00 from torch's" in str(losses.pop(("export", "masks")))
    assert set(losses.values()) == {None}
    # A linear that errs is told once.
    told = [stage.loss for stage in found(-maps, 1.0).stages if stage.loss]
    assert len(told) == 1
    assert "a differs by 1.0e+00" in told[0]
    broken = np.where(np.arange(24)[:, None, None, None] < 2, np.nan, maps)
    assert "NaN or infinite masks for 2 images" in str(found(broken).stages[3].loss)
