"""A model of two outputs, a detector's classes and boxes, in the commands that examine its file:
bench with parity, inspect and doctor name both."""

import json
from pathlib import Path

import pytest
import transformers
from tiny_models import randomized

from marrq.artifact.folder import load
from marrq.cli import main
from marrq.quantizers.linear import quantized_linears

OUTPUTS = ["logits", "pred_boxes"]
DETECTOR = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": [32, 32],
    "patch_size": 8,
    "num_labels": 5,
    "num_detection_tokens": 7,
}


@pytest.fixture(scope="module")
def images(image_folder: Path) -> str:
    """Eight images without classes."""
    return str(image_folder / "val" / "cat")


@pytest.fixture(scope="module")
def artifact(images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("detector")
    config = transformers.YolosConfig(**DETECTOR)
    randomized(transformers.YolosForObjectDetection(config)).save_pretrained(folder / "model")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder / "model")
    options = ["--samples", "8", "--method", "rtn", "--scheme", "W4A8"]
    made = str(folder / "artifact")
    assert main(["quantize", str(folder / "model"), "--data", images, *options, "-o", made]) == 0
    return made


@pytest.fixture(scope="module")
def file(artifact: str) -> str:
    made = f"{artifact}.onnx"
    assert main(["export", artifact, "-o", made]) == 0
    return made


@pytest.mark.slow
def test_a_bench_and_its_parity_have_rows_for_each_output(
    artifact: str, file: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--baseline", "fp32", "--rounds", "1", "--seconds", "0", "--batch", "1"]
    options += ["--parity", "--artifact", artifact, "--json", str(tmp_path / "bench.json")]
    capsys.readouterr()
    assert main(["bench", file, "--data", images, *options]) == 0
    printed = capsys.readouterr().out
    candidate = json.loads((tmp_path / "bench.json").read_text())["models"][-1]
    assert [row["output"] for row in candidate["outputs"]] == OUTPUTS
    # Seven boxes, each with six numbers: how often the largest is that of fp32.
    assert 0 <= candidate["outputs"][0]["agreement"] <= 1
    assert candidate["outputs"][1]["agreement"] is None
    assert [(stage["stage"], stage["output"]) for stage in candidate["parity"]["stages"]] == [
        (stage, output)
        for stage in ("quantization", "export", "preprocessing")
        for output in OUTPUTS
    ]
    assert candidate["parity"]["first_loss"] is None
    assert printed.count("pred_boxes") >= 4, "a row of the outputs, and one of each stage"


@pytest.mark.slow
def test_inspect_finds_every_linear_of_the_artifact_in_a_file_of_two_outputs(
    artifact: str, file: str, tmp_path: Path
):
    report = tmp_path / "inspect.json"
    assert main(["inspect", file, "--strict", "--json", str(report)]) == 0
    names = {row["linear"] for row in json.loads(report.read_text())["audit"]}
    # The file gives them by the name in the artifact, and the heads' own linears are in float.
    assert set(quantized_linears(load(Path(artifact)).module)) <= names
    assert main(["inspect", artifact]) == 0


@pytest.mark.slow
def test_doctor_holds_each_output_of_a_repository_against_the_file(
    artifact: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["doctor", file]) == 0
    repository = tmp_path / "repository"
    options = ["--format", "triton", "--name", "detector", "-o", str(repository)]
    assert main(["export", artifact, *options]) == 0
    assert main(["doctor", str(repository)]) == 0
    config = repository / "detector" / "config.pbtxt"
    text = config.read_text()
    assert [name for name in OUTPUTS if f'"{name}"' in text] == OUTPUTS
    config.write_text(text.replace('"pred_boxes"', '"boxes"'))
    capsys.readouterr()
    assert main(["doctor", str(repository)]) == 3
    said = capsys.readouterr()
    assert "pred_boxes" in said.out + said.err
