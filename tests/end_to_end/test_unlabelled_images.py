"""Images without classes: everything but accuracy is measured, and why it is not is said."""

import json
from pathlib import Path

import pytest
from PIL import Image

from marrq.cli import main


@pytest.mark.slow
def test_a_bench_on_images_without_classes_measures_everything_else(
    tmp_path: Path, tiny: str, image_folder: Path, capsys: pytest.CaptureFixture[str]
):
    images = tmp_path / "images"
    images.mkdir()
    for number, file in enumerate(sorted(image_folder.glob("val/*/*.png"))):
        exif = Image.Exif()
        exif[274] = 6 if number < 2 else 1
        Image.open(file).save(images / f"{number}.jpg", exif=exif)
    artifact, report = tmp_path / "artifact", tmp_path / "bench.json"
    data = ["--data", str(images)]
    options = ["--samples", "8", "--method", "rtn", "--scheme", "W8A16"]
    assert main(["quantize", tiny, *data, *options, "-o", str(artifact)]) == 0
    quick = ["--baseline", "fp32", "--rounds", "1", "--seconds", "0", "--batch", "1"]
    assert main(["bench", str(artifact), *data, *quick, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    for model in found["models"]:
        assert model["accuracy"] is None
        assert model["agreement"]["images"] == 24
        assert model["agreement"]["agreement"] >= 0.9
        assert model["latency"][0]["p50_ms"] > 0
    both, why, noted = found["warnings"]
    assert both.startswith(f"'{artifact}': 8 of the 24 images that judge have calibrated too, so")
    assert why.startswith("accuracy is not measured: the images in")
    assert (
        noted == "2 of the 24 images that were read have an EXIF orientation, which is not applied"
    )
    # What counts right answers is refused before anything is exported or measured.
    capsys.readouterr()
    assert main(["bench", str(artifact), *data, *quick, "--max-drop", "1"]) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith("marrq: accuracy cannot be measured: the images in")
    # Flavours are ranked by how they agree with fp32, and stages by how near their logits are.
    others = ["--recommend", "--parity", "--parity-images", "8"]
    assert main(["bench", str(artifact), *data, *quick, *others, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert "same class as fp32" in found["recommendation"]["accuracy"]["sentence"]
    for stage in found["models"][-1]["parity"]["stages"]:
        assert stage["top1_source"] is stage["top1_target"] is None
        assert stage["agreement"] >= 0.5
