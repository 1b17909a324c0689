"""A model that a protobuf cannot hold is two files that go together, and are written, replaced and
counted together."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import timm
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from tiny_models import noise, quantized, vit

import exporters.onnx_file
import marrq
from exporters.external_data import external_data
from exporters.onnx_file import write
from exporters.replacing import check_model_file
from exporters.trace import SCOPES, TracedModel, trace_quantized
from marrq.artifact.folder import artifact_hash, save
from marrq.cli import main
from runtime.audit.graph import size_bytes


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    return trace_quantized(quantized(vit(), noise(8), "W4A8", "gptq"), "hash")


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", 10_000)


def logits(file: Path) -> np.ndarray:
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": noise(3, seed=1).numpy()})[0]


def test_every_flavour_lowers_the_same_trace_and_leaves_it_as_it_is(
    traced: TracedModel, tmp_path: Path
):
    write(traced, "integer", tmp_path / "first.onnx")
    write(traced, "qdq", tmp_path / "qdq.onnx")
    write(traced, "integer", tmp_path / "two products.onnx", {"fuse": False})
    write(traced, "integer", tmp_path / "again.onnx")
    first, again = (tmp_path / "first.onnx").read_bytes(), (tmp_path / "again.onnx").read_bytes()
    assert first == again
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 3


def test_a_file_names_modules_and_no_path_of_the_machine_that_wrote_it(
    traced: TracedModel, tmp_path: Path
):
    file = tmp_path / "m.onnx"
    write(traced, "integer", file)
    # The folder of the tests, that of the libraries and that of Python itself.
    folders = {str(Path(__file__).parents[2]), str(Path(timm.__file__).parents[1]), sys.prefix}
    written = file.read_bytes()
    assert [folder for folder in folders if folder.encode() in written] == []
    assert b"site-packages" not in written
    # A message about a node names its module: these are the notes that stay.
    graph = ir.load(file).graph
    assert {key for node in graph for key in node.metadata_props} == {SCOPES}
    assert any("'blocks.0.norm1'" in node.metadata_props.get(SCOPES, "") for node in graph)


def test_the_python_function_writes_the_file_of_the_artifact_that_the_model_would_be_saved_as(
    traced: TracedModel, tmp_path: Path
):
    save(traced.model, tmp_path / "artifact")
    done = marrq.export(traced.model, tmp_path / "a.onnx")
    assert (done.path, done.flavor) == (tmp_path / "a.onnx", "integer")
    assert done.size_bytes == (tmp_path / "a.onnx").stat().st_size
    write(traced, "integer", tmp_path / "b.onnx")
    np.testing.assert_array_equal(logits(tmp_path / "a.onnx"), logits(tmp_path / "b.onnx"))
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert entries["marrq.artifact"] == artifact_hash(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "-o", "m.onnx"], "'nowhere' does not exist"),
        (["nowhere", "-o", __file__], "exists"),
        (["nowhere", "-o", "m.onnx", "--flavor", "int4"], "unknown flavour 'int4'"),
        (["nowhere", "-o", "m.onnx", "--format", "tflite"], "unknown format 'tflite'"),
    ],
)
def test_a_mistake_is_told_before_torch_is_loaded(arguments: list[str], sentence: str):
    code = (
        "import sys; from marrq.cli import main; "
        f"code = main({['export', *arguments]!r}); print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sentence in done.stderr
    assert done.stdout.strip() == "1 False"


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("flavor", ["integer", "qdq"])
def test_a_large_model_keeps_its_tensors_beside_it_and_loads_wherever_both_are(
    traced: TracedModel, flavor: str, tmp_path: Path
):
    file, folder = tmp_path / "m.onnx", tmp_path / "elsewhere"
    write(traced, flavor, file)
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
    traced: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(traced, "integer", tmp_path / "one.onnx")
    external_data(tmp_path / "one.onnx").write_bytes(b"of another")
    monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", 10_000)
    write(traced, "integer", tmp_path / "two.onnx")
    assert size_bytes(tmp_path / "one.onnx") == (tmp_path / "one.onnx").stat().st_size
    parts = [tmp_path / "two.onnx", external_data(tmp_path / "two.onnx")]
    assert size_bytes(tmp_path / "two.onnx") == sum(part.stat().st_size for part in parts)
    assert size_bytes(tmp_path / "two.onnx") == pytest.approx(
        size_bytes(tmp_path / "one.onnx"), rel=0.1
    )


def test_a_file_that_is_replaced_takes_its_data_with_it(
    traced: TracedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "m.onnx"
    limits = {"small": 10_000, "large": 2_000_000_000}
    sizes = {}
    for before in limits:
        for after in limits:
            for limit in (before, after):
                monkeypatch.setattr(exporters.onnx_file, "INLINE_BYTES", limits[limit])
                write(traced, "integer", file)
            assert external_data(file).exists() == (after == "small")
            sizes[before, after] = size_bytes(file)
            assert np.isfinite(logits(file)).all()
    assert len(set(sizes.values())) == 2


@pytest.mark.usefixtures("small_limit")
def test_export_replaces_neither_of_the_two_without_force_and_only_its_own_with_it(
    traced: TracedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save(traced.model, tmp_path / "artifact")
    file = tmp_path / "m.onnx"
    external_data(file).write_text("mine")
    arguments = ["export", str(tmp_path / "artifact"), "-o", str(file)]
    assert main(arguments) == 1
    assert "m.onnx.data' exists" in capsys.readouterr().err
    # No model names that file.
    assert main([*arguments, "--force"]) == 1
    assert external_data(file).read_text() == "mine"
    external_data(file).unlink()
    assert main(arguments) == 0
    # What it has written it replaces, but not without being asked.
    assert main(arguments) == 1
    check_model_file(file, force=True)
    assert f"{size_bytes(file) / 1e6:.2f} MB" in capsys.readouterr().err
    assert external_data(file).stat().st_size > 0.5 * size_bytes(file)
    assert {entry.name for entry in tmp_path.iterdir()} == {"artifact", "m.onnx", "m.onnx.data"}
