"""What a bench and an evaluation do when the float model, or its numbers, are not there."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import noise, quantized, vision_model, vit
from torch import nn

import marrq
from marrq.artifact.folder import artifact_hash
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.workflows.bench_options import BenchOptions
from marrq.workflows.provider import choose_provider
from runtime import session
from runtime.gpu import Gpu
from runtime.measure.memory import PeakMemory

QUICK = ["--rounds", "1", "--seconds", "0", "--batch", "1"]


@pytest.fixture(scope="module")
def made(tiny_folder: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model whose fc2 is too large for float16, its artifact, a file of that,
    and a float file of the model in carried/. The model is then moved to gone/."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_folder, folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"blocks.1.mlp.fc2.{part}"] *= 1e7
    save_file(weights, folder / "model" / "model.safetensors")
    artifact = str(folder / "artifact")
    (folder / "carried").mkdir()
    runs = (
        ["quantize", f"local-dir:{folder / 'model'}", "--data", str(image_folder), "--samples", "8",
         "--method", "rtn", "-o", artifact],
        ["export", artifact, "-o", str(folder / "carried" / "model.onnx")],
        ["export", artifact, "--flavor", "fp32", "-o", str(folder / "carried" / "fp32.onnx")],
    )  # fmt: skip
    assert [main(run) for run in runs] == [0, 0, 0]
    return folder


@pytest.fixture
def without_model(made: Path) -> Path:
    """The same folder, after the float model has gone."""
    if (made / "model").exists():
        (made / "model").rename(made / "gone")
    return made


def benched(
    path: Path, data: Path, folder: Path, *options: str
) -> tuple[int, dict[str, Any] | None]:
    """Exit code and report; None without a report."""
    report = folder / "bench.json"
    arguments = [str(path), "--data", str(data), *QUICK, "--json", str(report), *options]
    code = main(["bench", *arguments])
    return code, json.loads(report.read_text()) if report.exists() else None


def test_a_float16_file_that_overflows_is_told_when_written_and_is_a_row_when_benched(
    made: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    baseline = tmp_path / "fp16.onnx"
    assert main(["export", str(made / "artifact"), "--flavor", "fp16", "-o", str(baseline)]) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "on calibration images the MatMul of 'blocks.1.mlp.fc2' reaches" in warning
    assert warning.endswith("as --flavor fp32, or as --flavor folded --float32")
    file = made / "carried" / "model.onnx"
    code, report = benched(file, image_folder, tmp_path, "--baseline", str(baseline))
    assert code == 0
    assert report is not None
    rows = {model["name"]: model for model in report["models"]}
    assert rows["fp16"]["accuracy"] is None
    assert rows["fp16"]["not_finite"]["first"]["where"] == "blocks.1.mlp.fc2"
    assert rows["fp16"]["latency"][0]["p50_ms"] > 0
    assert rows["W4A8 rtn"]["accuracy"]["images"] == 24
    assert rows["W4A8 rtn"]["accuracy"]["against"] is None, "nothing is compared with no numbers"
    sentence = "fp16 gives NaN or infinite outputs for 24 images: MatMul of 'blocks.1.mlp.fc2'"
    printed = capsys.readouterr()
    assert sentence in printed.out
    assert f"warning: {sentence}" in printed.err.splitlines()[-1]


def test_the_form_for_tensorrt_is_in_float16_too_and_tells_if_it_overflows(tmp_path: Path):
    model = vit(depth=1)
    model.blocks[0].mlp.fc1.weight.data *= 3e3
    model.blocks[0].mlp.fc2.weight.data *= 3e2
    made, file = quantized(model, noise(4), "W8A8-sym", "rtn,equalize=off"), tmp_path / "m.onnx"
    found = marrq.export(made, file, "qdq", {"symmetric": True})
    assert found.warning is not None
    assert "gives NaN or infinity: on noise, black and white" in found.warning
    assert found.warning.endswith("; export it without --symmetric")


def test_nothing_is_written_into_the_artifact_that_is_exported(
    made: Path, capsys: pytest.CaptureFixture[str]
):
    artifact = made / "artifact"
    for inside in (["-o", str(artifact / "m.onnx")], ["--format", "triton", "-o", str(artifact)]):
        assert main(["export", str(artifact), *inside]) == 1
        assert "which ARTIFACT reads: choose another place" in capsys.readouterr().err
    assert len(list(artifact.iterdir())) == 4


def test_a_default_baseline_that_cannot_be_exported_or_run_is_left_out_and_told(
    made: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def cannot(model: object, flavor: str, file: Path, device: str) -> float:
        if flavor == "fp16":
            raise MarrqError("no such trace")
        file.write_bytes(b"")
        return 32.0

    monkeypatch.setattr("exporters.onnx_file.write_baseline", cannot)
    code, report = benched(made / "carried" / "model.onnx", image_folder, tmp_path)
    assert code == 0
    assert report is not None
    assert [model["name"] for model in report["models"]] == ["W4A8 rtn"]
    first, second = report["warnings"]
    assert first == "measured without the baseline fp16: no such trace"
    assert second.startswith("measured without the baseline fp32: ")


def test_a_file_is_benched_without_the_float_model_and_the_report_says_so(
    without_model: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = shutil.copy(without_model / "carried" / "model.onnx", tmp_path / "model.onnx")
    code, report = benched(Path(file), image_folder, tmp_path)
    assert code == 0
    assert report is not None
    [model] = report["models"]
    assert model["accuracy"]["against"] is None
    first, second = report["warnings"]
    assert first == "measured without the baseline fp16"
    assert second.startswith("measured without the baseline fp32; the float model is not at hand: ")
    told = capsys.readouterr().err.splitlines()
    assert [f"warning: {first}", f"warning: {second}"] == [
        line for line in told if line.startswith("warning")
    ]
    code, report = benched(Path(file), image_folder, tmp_path, "--baseline", "none")
    assert code == 0
    assert report is not None
    assert report["warnings"] == []


def test_what_was_asked_for_by_name_and_is_not_there_is_refused_with_the_way_out(
    without_model: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = Path(shutil.copy(without_model / "carried" / "model.onnx", tmp_path))
    twice = [str(without_model / "carried" / "fp32.onnx"), str(tmp_path / "copy.onnx")]
    shutil.copy(*twice)
    for options, told in (
        (["--baseline", "fp32"], "pass --baseline none, or --baseline FILE with an export of it"),
        (["--max-drop", "1"], "--max-drop compares with a baseline, and there is none"),
        (["--baseline", str(file)], "is no float model that marrq exported"),
        (["--baseline", twice[0], "--baseline", twice[1]], "two baselines are fp32: leave one"),
    ):
        assert benched(file, image_folder, tmp_path, *options) == (1, None)
        assert told in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("named", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_baseline_may_be_a_file_that_is_named_or_lies_beside_what_is_measured(
    without_model: Path, image_folder: Path, tmp_path: Path, named: bool
):
    carried = without_model / "carried"
    options = ["--baseline", str(carried / "fp32.onnx")] if named else []
    code, report = benched(carried / "model.onnx", image_folder, tmp_path, *options)
    assert code == 0
    assert report is not None
    names = [(model["name"], model["role"]) for model in report["models"]]
    assert names == [("fp32", "baseline"), ("W4A8 rtn", "candidate")]
    assert report["models"][1]["accuracy"]["against"]["baseline"] == "fp32"
    assert [warning.split(";")[0] for warning in report["warnings"]] == (
        [] if named else ["measured without the baseline fp16"]
    )


def test_a_file_beside_that_is_no_baseline_is_left_out_and_told(
    without_model: Path, image_folder: Path, tmp_path: Path
):
    carried = without_model / "carried"
    # A quantized model, and the float32 model under the name of the float16 one.
    for source, name in (("model", "model"), ("model", "fp32"), ("fp32", "fp16")):
        shutil.copy(carried / f"{source}.onnx", tmp_path / f"{name}.onnx")
    code, report = benched(tmp_path / "model.onnx", image_folder, tmp_path)
    assert code == 0
    assert report is not None
    assert [model["role"] for model in report["models"]] == ["candidate"]
    first, second = report["warnings"]
    assert first.endswith("fp16.onnx' is fp32")
    assert "fp32.onnx' is no float model that marrq exported" in second


@pytest.mark.slow
def test_an_artifact_is_evaluated_and_compared_with_its_file_without_the_float_model(
    without_model: Path, image_folder: Path, tmp_path: Path
):
    artifact, report = str(without_model / "artifact"), tmp_path / "e.json"
    assert main(["evaluate", artifact, "--data", str(image_folder), "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert (found["path"], found["artifact"]) == (artifact, artifact_hash(Path(artifact)))
    [accuracy] = found["models"].values()
    assert accuracy["agreement"] is accuracy["divergence"] is None
    assert found["warnings"][0].startswith("evaluated without the float model: ")
    file, parity = without_model / "carried" / "model.onnx", ["--parity", "--parity-images", "8"]
    code, bench = benched(file, image_folder, tmp_path, *parity, "--artifact", artifact)
    assert code == 0
    assert bench is not None
    stages = [stage["stage"] for stage in bench["models"][-1]["parity"]["stages"]]
    assert stages == ["export", "preprocessing"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"baselines": ("none", "fp32")}, "name it alone"),
        ({"baselines": ("missing.onnx",)}, "'missing.onnx' does not exist"),
        ({"baselines": ("fp8",)}, "unknown baseline 'fp8': choose one of fp32, fp16, none, or"),
        ({"baselines": ("none",), "max_drop": 1.0}, "leave out --baseline none"),
        ({"device": "cpu", "provider": "cuda"}, "--provider cuda runs on the gpu"),
        ({"device": "gpu", "provider": "cpu"}, "--provider cpu runs on the cpu"),
        ({"provider": "npu"}, "unknown provider 'npu'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"flavor": "integer", "device": "gpu"}, "integer is not for a GPU, because its kernels"),
        ({"cuda_graph": True}, "is of the CUDA provider, not of cpu: pass --device gpu"),
        ({"cuda_graph": True, "provider": "tensorrt"}, "not of tensorrt"),
        ({"flavor": "fp16"}, "fp16 is the float model, and no form of an artifact: pass --base"),
        ({"artifacts": (Path("a"),)}, "what --parity compares a file with: add --parity"),
        ({"batches": ()}, r"one batch size or more and one round or more: got batches=\(\)"),
        ({"batches": (0, 1)}, "one batch size or more"),
        ({"rounds": 0}, "one round or more: got .*rounds=0"),
        ({"max_drop": math.nan}, "points from 0 to 100: got nan"),
        ({"min_cosine": math.nan}, "a number from -1 to 1: got nan"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_at_once(options: dict[str, Any], told: str):
    with pytest.raises(MarrqError, match=told):
        BenchOptions(**options)


def test_nothing_to_measure_and_a_number_for_no_parity_are_refused(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(MarrqError, match="there is nothing to measure: give an artifact"):
        marrq.bench([])
    assert main(["bench", "model.onnx", "--parity-images", "8"]) == 1
    assert "--parity-images 8 is a number for --parity: add --parity" in capsys.readouterr().err


def test_the_device_and_the_provider_tell_each_other():
    chosen = {
        (device, provider): choose_provider(device, provider)
        for device in (None, "gpu")
        for provider in (None, "cuda", "tensorrt")
    }
    assert chosen == {
        (None, None): ("cpu", "cpu"),
        (None, "cuda"): ("gpu", "cuda"),
        (None, "tensorrt"): ("gpu", "tensorrt"),
        ("gpu", None): ("gpu", "cuda"),
        ("gpu", "cuda"): ("gpu", "cuda"),
        ("gpu", "tensorrt"): ("gpu", "tensorrt"),
    }


def test_noise_black_and_white_are_the_inputs_if_the_calibration_images_are_gone():
    from marrq.workflows.overflow import _images, _synthetic_images

    preprocessing = vision_model(nn.Identity()).preprocessing
    pixels = _synthetic_images(preprocessing)
    assert pixels.shape == (4, *preprocessing.input_size)
    assert (pixels[2] == -1).all()
    assert (pixels[3] == 1).all()
    back = _images(pixels, preprocessing)
    assert back.shape == (4, *preprocessing.input_size[1:], 3)
    np.testing.assert_allclose(back[0] / 255, (pixels[0].transpose(1, 2, 0) + 1) / 2, atol=1 / 500)


@pytest.mark.slow
def test_a_bench_for_a_gpu_runs_from_export_to_report_on_the_processors_kernels(
    made: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The processor in the place of CUDA: all steps but CUDA's own."""
    monkeypatch.setitem(session.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setitem(session.DEVICES, "cuda", "cpu")
    monkeypatch.setattr(session, "_records_graphs", lambda settings: False)
    asked = []

    def memory(files: list[Path], batch: int, settings: object) -> list[PeakMemory]:
        asked.append("memory")
        return [PeakMemory(1.0, 2.0)] * len(files)

    def clocks() -> Gpu:
        asked.append("clocks")
        return Gpu("G", "1", 1.0, "P0", 1.0, 1.0, 1.0, False)

    monkeypatch.setattr("runtime.measure.bench.measure_peak_memory", memory)
    monkeypatch.setattr("runtime.measure.bench.describe_gpu", clocks)
    options = ["--device", "gpu", "--weights-only", "--cuda-graph", "--baseline", "none"]
    code, report = benched(made / "artifact", image_folder, tmp_path, *options, "--batch", "2")
    assert code == 0
    assert report is not None
    [model] = report["models"]
    assert (model["flavor"], model["device"], model["scheme"]) == ("folded", "gpu", "W4A16")
    assert [row["batch"] for row in model["latency"]] == [1, 2]
    assert model["peak_gpu_memory_mb"] == 2
    assert asked == ["clocks", "memory"], "the runs of memory would let the clocks fall"
    assert report["environment"]["cuda_graph"]
    assert report["environment"]["gpu"]["name"] == "G"
    assert model["not_finite"]["images"] == 24, "fc2 is too large for float16"
    assert report["warnings"] == []
