"""The artifact holds the very codes, is complete or absent, and is refused when it is not what it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from marrq.activations import ActivationQuantizer
from marrq.affine import Grid
from marrq.artifact import artifact_hash, load, read_config, save, tensors_of
from marrq.errors import MarrqError
from marrq.methods.problem import MethodSpec
from marrq.models import load_model
from marrq.modules import QuantLinear, quantized_linears
from marrq.pipeline import CalibrationSet, QuantizedModel, quantize
from marrq.schemes import ActivationSpec, WeightSpec, parse_scheme


def quantized(name: str, scheme: str, strategy: str = "per-tensor") -> QuantizedModel:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet("noise", 4, 0, "abc")
    return quantize(load_model(name), images, calibration, parse_scheme(scheme, strategy), MethodSpec(), torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "strategy"), [("W2A8", "per-tensor"), ("W3A4", "per-tensor"), ("W4A4", "per-token"), ("W8A16", "per-tensor")]
)
def test_a_loaded_artifact_is_the_model_that_was_saved(tiny: str, tmp_path: Path, scheme: str, strategy: str):
    model = quantized(tiny, scheme, strategy)
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    before, after = quantized_linears(model.module), quantized_linears(again.module)
    for path in before:
        assert torch.equal(before[path].codes, after[path].codes)
        assert torch.equal(before[path].scale, after[path].scale)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.module(pixels), model.module(pixels))
    assert (again.source, again.preprocessing, again.labels) == (model.source, model.preprocessing, model.labels)
    assert (again.scheme, again.method, again.calibration, again.reports) == (model.scheme, model.method, model.calibration, model.reports)


def test_the_tensors_of_a_linear_are_these_bytes():
    """Pins format version 1: change this test only together with FORMAT_VERSION."""
    spec = ActivationSpec(8)
    quantizer = ActivationQuantizer(spec, Grid(torch.tensor(0.5), torch.tensor(7.0), *spec.code_range))
    codes = torch.tensor([[3, -4, -1], [0, 1, 2]], dtype=torch.int8)
    zero_point = torch.tensor([[-1], [2]], dtype=torch.int8)
    linear = QuantLinear(WeightSpec(3), codes, torch.tensor([[1.0], [2.0]]), zero_point, torch.tensor([5.0, 6.0]), quantizer)
    tensors = tensors_of(torch.nn.ModuleDict({"fc": linear}))
    assert {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()} == {
        "fc.weight_packed": ("torch.uint8", [0b00_11_00_11, 0b10_01, 0b000110]),
        "fc.weight_scale": ("torch.float32", [1.0, 2.0]),
        "fc.weight_zero_point": ("torch.int8", [-1, 2]),
        "fc.weight_shape": ("torch.int64", [2, 3]),
        "fc.bias": ("torch.float32", [5.0, 6.0]),
        "fc.input_scale": ("torch.float32", 0.5),
        "fc.input_zero_point": ("torch.uint8", 7),
    }


def test_config_and_report_hold_what_the_format_promises(demo_artifact: Path):
    config = read_config(demo_artifact)
    assert config["format"] == "marrq.artifact"
    assert config["format_version"] == 1
    keys = {"format", "format_version", "model", "preprocessing", "labels", "scheme", "method", "calibration", "versions", "tensors_sha256"}
    assert set(config) == keys
    reports = json.loads((demo_artifact / "quantization.json").read_text())
    assert len(reports) == 16
    for report in reports:
        assert {step["half"] for step in report["trajectory"]} == {0, 1}
        assert 0 <= report["alpha"] <= 1.5
    with safe_open(demo_artifact / "model.safetensors", "pt") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118  (safe_open is no dict)
        assert "blocks.0.attn.qkv.weight" not in file.keys()  # noqa: SIM118


@pytest.fixture
def copied(demo_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_artifact, tmp_path / "artifact"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_tensors_are_refused(copied: Path, keep: float):
    file = copied / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(MarrqError, match="is damaged"):
        load(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "quantization.json"])
def test_a_missing_file_is_refused(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(MarrqError, match=r"is damaged|is no artifact"):
        load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3}'])
def test_a_config_that_is_none_is_refused(copied: Path, text: str):
    (copied / "config.json").write_text(text)
    with pytest.raises(MarrqError, match="is damaged"):
        load(copied)


def test_a_flipped_bit_is_noticed(copied: Path):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MarrqError, match="not what was saved"):
        load(copied)


def test_a_later_version_is_refused_with_what_to_do(copied: Path):
    edit_config(copied, format_version=2)
    with pytest.raises(MarrqError, match=r"format version 2, this marrq reads up to 1: upgrade marrq"):
        load(copied)


def test_an_existing_output_is_kept_unless_replacing_is_asked_for(tiny: str, tmp_path: Path):
    model, folder = quantized(tiny, "W4A8"), tmp_path / "a"
    save(model, folder)
    first = artifact_hash(folder)
    with pytest.raises(MarrqError, match="exists"):
        save(quantized(tiny, "W2A8"), folder)
    assert artifact_hash(folder) == first
    save(quantized(tiny, "W2A8"), folder, overwrite=True)
    assert artifact_hash(folder) != first
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_save_that_fails_leaves_nothing_behind(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("marrq.artifact._flush", full)
    with pytest.raises(OSError, match="No space left"):
        save(quantized(tiny, "W4A8"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_same_run_gives_the_same_hash(tiny: str, tmp_path: Path):
    for name in ("a", "b"):
        save(quantized(tiny, "W3A8"), tmp_path / name)
    assert artifact_hash(tmp_path / "a") == artifact_hash(tmp_path / "b")
