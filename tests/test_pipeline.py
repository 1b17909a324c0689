"""The pipeline's two streams, its statistics and its report, on a tiny model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from marrq.activations import RangeObserver
from marrq.data import find_images
from marrq.errors import MarrqError
from marrq.methods.problem import MethodSpec
from marrq.models import load_model
from marrq.modules import quantized_linears
from marrq.pipeline import CalibrationSet, QuantizedModel, quantize
from marrq.schemes import ActivationSpec, parse_scheme

CPU = torch.device("cpu")


def run(name: str, images: torch.Tensor, scheme: str, method: str = "marr", strategy: str = "per-tensor") -> QuantizedModel:
    calibration = CalibrationSet("test", len(images), 0, "")
    return quantize(load_model(name), images, calibration, parse_scheme(scheme, strategy), MethodSpec(method), CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images(image_folder: Path, tiny: str) -> torch.Tensor:
    model = load_model(tiny)
    return find_images(str(image_folder), "train", model.labels).pixels(model.preprocessing)


@pytest.mark.parametrize("strategy", ["per-tensor", "per-token"])
def test_the_first_linears_j_is_the_error_of_its_outputs_on_the_calibration_images(tiny: str, images: torch.Tensor, strategy: str):
    original = load_model(tiny).module
    quantized = run(tiny, images, "W4A4", strategy=strategy)
    path = "blocks.0.attn.qkv"
    with torch.no_grad():
        block = original.get_submodule("blocks.0")
        x = block.norm1(original._pos_embed(original.patch_embed(images)))
        expected = original.get_submodule(path)(x)
        error = (quantized.module.get_submodule(path)(x) - expected).double().square().sum().item()
    report = quantized.reports[0]
    assert report.path == path
    assert report.error == pytest.approx(error, rel=1e-4)
    assert report.mse == pytest.approx(error / expected.numel(), rel=1e-4)


def test_the_last_linears_j_is_measured_between_the_two_streams(tiny: str, images: torch.Tensor):
    """fc2 of the last block: its quantized input comes through everything quantized before it, its target through nothing."""
    original, quantized = load_model(tiny).module, run(tiny, images, "W3A8")
    seen: dict[str, torch.Tensor] = {}
    path = "blocks.1.mlp.fc2"
    for name, module in (("float", original), ("quantized", quantized.module)):
        module.get_submodule(path).register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        original(images)
        quantized.module(images)
    error = (seen["quantized"] - seen["float"]).double().square().sum().item()
    assert quantized.reports[-1].path == path
    assert quantized.reports[-1].error == pytest.approx(error, rel=1e-3)


def test_eight_bits_lose_almost_nothing_and_fewer_bits_lose_more(tiny: str, images: torch.Tensor):
    with torch.no_grad():
        expected = load_model(tiny).module(images)
        losses = [F.mse_loss(run(tiny, images, scheme).module(images), expected).item() for scheme in ("W8A16", "W8A8", "W4A8", "W2A8")]
    assert losses == sorted(losses)
    assert losses[0] < 1e-4 * expected.var().item()


def test_every_block_linear_is_replaced_and_nothing_else(tiny: str, images: torch.Tensor):
    model = run(tiny, images, "W2A8", "rtn")
    expected = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(quantized_linears(model.module)) == [report.path for report in model.reports] == expected
    assert isinstance(model.module.get_submodule("head"), torch.nn.Linear)
    for linear in quantized_linears(model.module).values():
        assert linear.codes.dtype == torch.int8
        assert linear.codes.min() >= -2
        assert linear.codes.max() <= 1


def test_the_same_images_give_the_same_codes(tiny: str, images: torch.Tensor):
    first, second = (quantized_linears(run(tiny, images, "W3A8").module) for _ in range(2))
    assert all(torch.equal(first[path].codes, second[path].codes) for path in first)


def test_progress_is_told_block_by_block(tiny: str, images: torch.Tensor):
    told = []
    scheme, calibration = parse_scheme("W4A8"), CalibrationSet("test", 24, 0, "")
    quantize(
        load_model(tiny),
        images,
        calibration,
        scheme,
        MethodSpec(),
        CPU,
        lambda done, count, reports: told.append((done, count, len(reports))),
    )
    assert told == [(1, 2, 4), (2, 2, 4)]


def test_images_that_are_not_finite_are_an_error_that_names_the_layer(tiny: str, images: torch.Tensor):
    broken = images.clone()
    broken[3, 0, 0, 0] = torch.nan
    with pytest.raises(MarrqError, match=r"blocks\.0\.attn\.qkv: the inputs of the layer are not finite"):
        run(tiny, broken, "W4A16")


def test_one_image_is_too_few(tiny: str, images: torch.Tensor):
    with pytest.raises(MarrqError, match="at least 2 images: got 1"):
        run(tiny, images[:1], "W4A8")


def test_the_observer_sees_the_exact_range_whatever_it_samples():
    observer = RangeObserver()
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    observer.observe(x[:200])
    observer.observe(x[200:])
    grid = observer.grid(ActivationSpec(8))
    span = grid.dequantize(torch.tensor([0.0, 255.0]))
    assert span[0] <= -2.9
    assert span[1] >= 2.9
