"""A model that a protobuf cannot hold is two files that go together, and are written, replaced and
counted together."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from tiny_models import noise, quantized, vit

import exporters.onnx_file
from exporters.external_data import external_data
from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.cli import main
from marrq.quantized_model import QuantizedModel
from runtime.audit.graph import size_bytes


@pytest.fixture(scope="module")
def model() -> QuantizedModel:
    return quantized(vit(), noise(8), "W4A8", "gptq")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", 10_000)


def logits(file: Path) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": noise(3, seed=1).numpy()})[0]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("flavor", ["integer", "qdq"])
def test_a_large_model_keeps_its_tensors_beside_it_and_loads_wherever_both_are(
    model: QuantizedModel, flavor: str, tmp_path: Path
):
    file, folder = tmp_path / "m.onnx", tmp_path / "elsewhere"
    write(trace_quantized(model, "hash"), flavor, file)
    assert {entry.name for entry in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    outside = [tensor for tensor in tensors if uses_external_data(tensor)]
    assert {ExternalDataInfo(tensor).location for tensor in outside} == {"m.onnx.data"}
    assert (
        sum(ExternalDataInfo(tensor).length or 0 for tensor in outside)
        > 0.9 * external_data(file).stat().st_size
    )
    onnx.checker.check_model(str(file), full_check=True)
    before = logits(file)
    folder.mkdir()
    for part in (file, external_data(file)):
        shutil.move(part, folder)
    np.testing.assert_array_equal(logits(folder / "m.onnx"), before)


def test_the_size_of_a_model_counts_the_data_beside_it(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(trace_quantized(model, "hash"), "integer", tmp_path / "one.onnx")
    external_data(tmp_path / "one.onnx").write_bytes(b"of another")
    monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", 10_000)
    write(trace_quantized(model, "hash"), "integer", tmp_path / "two.onnx")
    assert size_bytes(tmp_path / "one.onnx") == (tmp_path / "one.onnx").stat().st_size
    parts = [tmp_path / "two.onnx", external_data(tmp_path / "two.onnx")]
    assert size_bytes(tmp_path / "two.onnx") == sum(part.stat().st_size for part in parts)
    assert size_bytes(tmp_path / "two.onnx") == pytest.approx(
        size_bytes(tmp_path / "one.onnx"), rel=0.1
    )


def test_a_file_that_is_replaced_takes_its_data_with_it(
    model: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "m.onnx"
    limits = {"small": 10_000, "large": 2_000_000_000}
    sizes = {}
    for before in limits:
        for after in limits:
            for limit in (before, after):
                monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", limits[limit])
                write(trace_quantized(model, "hash"), "integer", file)
            assert external_data(file).exists() == (after == "small")
            sizes[before, after] = size_bytes(file)
            assert np.isfinite(logits(file)).all()
    assert len(set(sizes.values())) == 2


@pytest.mark.usefixtures("small_limit")
def test_export_replaces_neither_of_the_two_without_force_and_both_with_it(
    demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "m.onnx"
    external_data(file).write_text("mine")
    arguments = ["export", str(demo_artifact), "-o", str(file)]
    assert main(arguments) == 1
    assert "m.onnx.data' exists" in capsys.readouterr().err
    assert external_data(file).read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert f"{size_bytes(file) / 1e6:.2f} MB" in capsys.readouterr().err
    assert external_data(file).stat().st_size > 0.8 * size_bytes(file)
    assert len(list(tmp_path.iterdir())) == 2
