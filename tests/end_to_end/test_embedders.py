"""A model that gives embeddings from the checkpoint to the verdict: bench, evaluate, compare and
parity on images with classes, and on images without."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from marrq.cli import main
from marrq.errors import MarrqError
from marrq.models.images import ImageSet
from marrq.models.images.gallery import MeasuredSets, find_measured
from marrq.workflows.evaluate import judge
from runtime.measure.embedded import Embedded

QUICK = ["--baseline", "fp32", "--rounds", "1", "--seconds", "0", "--batch", "1"]


@pytest.fixture(scope="module")
def artifact(embedder: str, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("embedded") / "artifact"
    options = ["--samples", "8", "--method", "rtn", "--scheme", "W3A8", "-o", str(folder)]
    assert main(["quantize", embedder, "--data", str(image_folder), *options]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def flat(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The images of val/ beside each other."""
    folder = tmp_path_factory.mktemp("flat")
    for number, file in enumerate(sorted(image_folder.glob("val/*/*.png"))):
        Image.open(file).save(folder / f"{number}.png")
    return str(folder)


def benched(artifact: str, data: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    report = tmp_path / "bench.json"
    command = ["bench", artifact, "--data", data, *QUICK, *options, "--json", str(report)]
    assert main(command) in (0, 3)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.mark.slow
def test_a_bench_with_classes_judges_neighbours_among_the_images_of_train(
    artifact: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = benched(artifact, str(image_folder), tmp_path, "--max-drop", "99", "--recommend")
    assert found["gallery"]["images"] == 24
    fp32, *candidates = found["models"]
    assert len(candidates) > 1, "every flavour is measured"
    for model in found["models"]:
        assert model["accuracy"] is model["agreement"] is None
        section = model["embedding"]["retrieval"]
        assert (section["gallery"], section["leave_one_out"], section["classes"]) == (24, False, 3)
        assert section["recall1"]["queries"] == section["mean_average_precision"]["queries"] == 24
    for model in candidates:
        assert model["embedding"]["retrieval"]["knn20"]["against"]["baseline"] == "fp32"
        assert 0.5 < model["embedding"]["likeness"]["cosine"] < 1
        assert model["embedding"]["likeness"]["divergence"] > 0
    assert fp32["embedding"]["likeness"]["cosine"] == pytest.approx(1)
    assert fp32["embedding"]["retrieval"]["knn1"]["against"] is None
    assert {verdict["demand"] for verdict in found["gate"]["models"]} == {"max_drop"}
    assert "k-NN top-1" in found["recommendation"]["accuracy"]["sentence"]
    printed = capsys.readouterr().out
    assert "k-NN %" in printed
    assert "recall@1" in printed


@pytest.mark.slow
def test_a_bench_without_classes_judges_the_likeness_alone(
    artifact: str, flat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "page.html"
    options = ["--min-cosine", "0.1", "--recommend", "--parity", "--report", str(page)]
    found = benched(artifact, flat, tmp_path, *options)
    assert found["gallery"] is None
    candidate = found["models"][-1]
    assert candidate["embedding"]["retrieval"] is None
    assert candidate["embedding"]["likeness"]["images"] == 24
    assert {verdict["verdict"] for verdict in found["gate"]["models"]} == {"held"}
    assert "cosine with fp32" in found["recommendation"]["accuracy"]["sentence"]
    assert any("k-NN and retrieval are not measured: " in text for text in found["warnings"])
    stages = candidate["parity"]["stages"]
    assert [stage["stage"] for stage in stages] == ["quantization", "export", "preprocessing"]
    assert all(stage["top1_source"] is stage["agreement"] is None for stage in stages)
    assert candidate["parity"]["first_loss"] is None
    assert "what quantization loses cannot be told without classes" in capsys.readouterr().out
    assert "Embeddings" in page.read_text()


@pytest.mark.slow
def test_a_gate_that_fails_ends_with_3_and_an_undecided_one_says_how_many_images_would_tell(
    artifact: str, flat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bench = ["bench", artifact, "--data", flat, *QUICK]
    assert main([*bench, "--min-cosine", "0.99999"]) == 3
    assert "is below a mean cosine of 0.99999 against fp32" in capsys.readouterr().err
    likeness = benched(artifact, flat, tmp_path)["models"][-1]["embedding"]["likeness"]
    # Between the mean and the lower end.
    limit = likeness["cosine"] - 0.3 * (likeness["cosine"] - likeness["cosine_low"])
    capsys.readouterr()
    assert main([*bench, "--min-cosine", str(limit)]) == 0
    said = re.search(r"about (\d+) would tell", capsys.readouterr().out)
    assert said is not None
    # 24 images times (1 / 0.3)², rounded upwards.
    assert 260 <= int(said[1]) <= 280


@pytest.mark.slow
def test_what_cannot_be_judged_is_told_before_anything_is_measured(
    artifact: str, flat: str, demo_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", artifact, "--data", flat, *QUICK, "--max-drop", "1"]) == 1
    [sentence] = capsys.readouterr().err.splitlines()
    assert "in no class folder" in sentence
    assert sentence.endswith("or pass --min-cosine")
    assert main(["bench", str(demo_artifact), *QUICK, "--min-cosine", "0.9"]) == 1
    assert "pass --max-drop" in capsys.readouterr().err


@pytest.mark.slow
def test_dense_outputs_are_rows_of_a_bench_and_may_be_held_to_a_cosine(
    embedder: str, flat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "artifact"
    options = ["--samples", "8", "--method", "rtn", "--scheme", "W3A8", "-o", str(folder)]
    both = ["--outputs", "features,tokens"]
    assert main(["quantize", embedder, "--data", flat, *both, *options]) == 0
    found = benched(str(folder), flat, tmp_path, "--min-cosine", "0.1")
    fp32, candidate = found["models"]
    # The embedding is judged as one, and the tokens beside it.
    assert candidate["embedding"]["likeness"]["images"] == 24
    [row] = candidate["outputs"]
    assert (row["output"], row["images"], row["agreement"]) == ("tokens", 24, None)
    assert 0.5 < row["cosine"] < 1
    assert 0 < row["relative_error"] < 1
    assert fp32["outputs"] == []
    first, second = found["gate"]["models"]
    assert "in embedding" in first["sentence"]
    assert "in tokens" in second["sentence"]
    assert "outputs beside fp32's" in capsys.readouterr().out
    assert main(["bench", str(folder), "--data", flat, *QUICK, "--min-cosine", "0.9999"]) == 3


@pytest.mark.slow
def test_an_evaluation_and_a_comparison_know_embeddings(
    artifact: str,
    embedder: str,
    image_folder: Path,
    flat: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    report = tmp_path / "evaluation.json"
    data = ["--data", str(image_folder)]
    assert main(["evaluate", artifact, *data, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["gallery"]["images"] == 24
    first, second = found["models"].values()
    assert first["retrieval"]["knn20"]["against"] is None
    assert 0.5 < second["likeness"]["cosine"] < 1
    assert "mAP" in capsys.readouterr().out
    # The float model alone, without classes: there is nothing to be said of it.
    assert main(["evaluate", embedder, "--data", flat]) == 1
    assert "one folder for each class" in capsys.readouterr().err
    for name, images, heading in (
        ("classes", str(image_folder), "k-NN %"),
        ("none", flat, "cosine %"),
    ):
        file, plot = tmp_path / f"{name}.json", tmp_path / f"{name}.svg"
        few = ["--samples", "8", "--seeds", "1", "--scheme", "W3A8", "--method", "rtn"]
        command = ["compare", embedder, "--data", images, *few, "-o", str(file)]
        assert main([*command, "--plot", str(plot)]) == 0
        [run] = json.loads(file.read_text())["runs"]
        assert (run["embedding"]["retrieval"] is None) == (name == "none")
        assert heading in capsys.readouterr().out
        assert heading in plot.read_text()


@pytest.mark.slow
def test_a_classifier_on_images_without_classes_is_compared_by_its_answers(
    demo_artifact: Path, tiny: str, flat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "evaluation.json"
    assert main(["evaluate", str(demo_artifact), "--data", flat, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    [only] = found["models"].values()
    assert only["images"] == 24
    assert set(only) == {"agreement", "divergence", "images", "same"}
    assert found["warnings"][-1].startswith("classes are not known: the images in")
    few = ["--samples", "8", "--seeds", "1", "--scheme", "W3A8", "--method", "rtn"]
    file = tmp_path / "compare.json"
    assert main(["compare", tiny, "--data", flat, *few, "-o", str(file)]) == 0
    assert "agree %" in capsys.readouterr().out


def test_the_classes_of_a_folder_are_counted_alike_in_train_and_val(tmp_path: Path):
    for path in ("train/b/0.png", "train/a/0.png", "train/c/0.png", "val/b/0.png", "val/c/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    found = find_measured(str(tmp_path), ())
    assert found.measured.targets == (1, 2)
    assert found.gallery is not None
    assert found.gallery.targets == (0, 1, 2)
    assert found.notes == ()
    few = find_measured(str(tmp_path), (), gallery_images=2)
    assert few.gallery is not None
    assert len(few.gallery) == 2
    assert few.notes == ("k-NN looks among 2 of the 3 images of train, drawn at random",)
    # Without train/ there is no gallery, and with classes of its own a model needs none.
    alone = find_measured(str(tmp_path / "val"), ())
    assert alone.gallery is None
    assert alone.measured.targets == (0, 1)
    assert "has no train/" in alone.notes[0]
    assert find_measured(str(tmp_path), ("a", "b", "c")).gallery is None


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (("0.png", "1.png"), "'0.png'"),
        (("a/0.png", "b/1.png", "2.png"), "'2.png'"),
        (("a/0.png", "a/b/1.png"), "'a'"),
    ],
)
def test_images_that_are_in_no_class_folders_say_why(
    paths: tuple[str, ...], why: str, tmp_path: Path
):
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    found = find_measured(str(tmp_path), ())
    assert found.measured.targets == ()
    assert why in found.measured.why_unlabelled
    assert "one folder for each class" in found.measured.why_unlabelled


def test_embeddings_of_a_single_image_are_not_judged():
    images = MeasuredSets(ImageSet("one", (Path("a.png"),), ("a.png",), (), "there is one image"))
    with pytest.raises(MarrqError, match="2 images or more, and 'one' has 1: add images"):
        judge({"float": Embedded(np.ones((1, 4), np.float32))}, images, "features")
