"""Zero-shot classes by the command line: a tiny CLIP and a tiny SigLIP are quantized, their own
text towers make classes, and an export with these classes is measured as any classifier."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_towers
import torch

import marrq
from marrq.artifact.folder import load
from marrq.cli import main
from marrq.models.class_embeddings import load_classes
from marrq.models.images import find_images
from marrq.models.load import load_model
from marrq.zero_shot import with_classes
from runtime.session import Model, SessionSettings

QUICK = ["--rounds", "1", "--seconds", "0", "--batch", "1"]
NAMES = ("dog", "cat", "eel")
"""The classes of `image_folder`, in an order of their own."""


@dataclass(frozen=True)
class Made:
    """A checkpoint and what the commands made of it."""

    name: str
    artifact: Path
    classes: Path
    file: Path
    images: Path

    def bench(self, path: Path, *options: str) -> dict[str, Any]:
        """The report of a bench."""
        report = self.file.with_name("bench.json")
        given = [str(path), "--data", str(self.images), *QUICK, *options]
        assert main(["bench", *given, "--json", str(report)]) == 0
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    def logits(self, model: Any) -> np.ndarray:
        """What torch gives for the images of val/."""
        images = find_images(str(self.images), "val", NAMES)
        with torch.no_grad():
            return model.module(images.pixels(model.preprocessing)[:]).numpy()


@pytest.fixture(scope="module", params=["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def made(
    request: pytest.FixtureRequest, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model").mkdir()
    name = getattr(tiny_towers, f"write_{request.param}")(folder / "model")
    artifact, classes, file = folder / "artifact", folder / "c.safetensors", folder / "model.onnx"
    (folder / "names.txt").write_text("\n".join(NAMES))
    runs = (
        ["quantize", name, "--data", str(image_folder), "--samples", "8", "--method", "rtn",
         "-o", str(artifact)],
        ["classes", name, "--names", str(folder / "names.txt"), "--template", "a {}.",
         "--template", "{}", "-o", str(classes)],
        ["export", str(artifact), "--classes", str(classes), "-o", str(file)],
    )  # fmt: skip
    assert [main(run) for run in runs] == [0, 0, 0]
    return Made(name, artifact, classes, file, image_folder)


def test_a_file_with_classes_is_measured_alone_beside_the_same_float_classifier(made: Made):
    report = made.bench(made.file, "--baseline", "fp32")
    fp32, quantized = report["models"]
    classes = load_classes(made.classes)
    images = find_images(str(made.images), "val", NAMES)
    expected = made.logits(with_classes(load_model(made.name), classes)).argmax(1)
    top1 = np.mean(expected == np.array(images.targets))
    assert fp32["accuracy"]["top1"] == pytest.approx(top1)
    simulated = made.logits(with_classes(load(made.artifact), classes))
    assert quantized["accuracy"]["agreement"] == pytest.approx(
        np.mean(simulated.argmax(1) == expected), abs=1 / len(expected)
    )
    assert report["data"]["images"] == len(expected)


def test_the_file_gives_the_logits_of_torch_under_the_names_of_the_classes(made: Made):
    classes = load_classes(made.classes)
    model = with_classes(load(made.artifact), classes)
    session = Model(made.file, SessionSettings())
    assert session.metadata().labels == NAMES
    assert session.metadata().classes == classes.sha256
    images = find_images(str(made.images), "val", NAMES)
    found = session.run(images.pixels(model.preprocessing)[:].numpy())
    np.testing.assert_allclose(found, made.logits(model), atol=0.05)


def test_every_linear_runs_as_its_scheme_says_and_the_head_is_float_on_purpose(
    made: Made, tmp_path: Path
):
    assert main(["inspect", str(made.file), "--strict", "--json", str(tmp_path / "i.json")]) == 0
    rows = json.loads((tmp_path / "i.json").read_text())["audit"]
    [head] = [row for row in rows if row["linear"] == "zero_shot"]
    assert (head["nominal"], head["reason"]) == ("float", None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bench", "{file}", "--classes", "{classes}"], "--classes is about an artifact"),
        (["export", "{artifact}", "--classes", "{names}", "-o", "{new}"], "holds no classes"),
        (["export", "{artifact}", "--classes", "{nothing}", "-o", "{new}"], "does not exist"),
        (["classes", "demo", "--names", "{names}", "-o", "{new}"], "has no text tower"),
        (["classes", "{name}", "--names", "{names}", "-o", "{classes}"], "pass --force"),
        (["classes", "{name}", "--names", "{names}", "-o", "{names}", "--force"], "reads"),
        (
            ["classes", "{name}", "--names", "{names}", "--template", "a", "-o", "{new}"],
            "write it once",
        ),
        (["quantize", "demo", "--classes", "{classes}", "-o", "{new}"], "No such option"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, made: Made, capsys: pytest.CaptureFixture[str]
):
    folder = made.file.parent
    places = {"names": folder / "names.txt", "new": folder / "new", "nothing": folder / "nothing"}
    given = [argument.format(**vars(made), **places) for argument in arguments]
    assert main(given) in (1, 2)
    message = " ".join(capsys.readouterr().err.split())
    assert sentence in message
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_an_artifact_is_measured_with_classes_as_its_file_is(made: Made):
    ours, theirs = (
        made.bench(path, "--baseline", "fp32", *options)["models"]
        for path, options in ((made.artifact, ("--classes", str(made.classes))), (made.file, ()))
    )
    assert [model["accuracy"] for model in ours] == [model["accuracy"] for model in theirs]


@pytest.mark.slow
def test_parity_compares_logits_of_the_same_classes(made: Made):
    report = made.bench(made.file, "--parity", "--artifact", str(made.artifact))
    assert [model["name"] for model in report["models"][:2]] == ["fp16", "fp32"]
    stages = {stage["stage"]: stage for stage in report["models"][-1]["parity"]["stages"]}
    assert set(stages) == {"quantization", "export", "preprocessing"}
    assert stages["export"]["least_cosine"] > 0.999


@pytest.mark.slow
def test_files_with_other_classes_are_not_measured_together(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "names").write_text("dog\ncat\ncow\n")
    runs = (
        ["classes", made.name, "--names", str(tmp_path / "names"), "-o", str(tmp_path / "c")],
        ["export", str(made.artifact), "--classes", str(tmp_path / "c"), "-o",
         str(tmp_path / "other.onnx")],
    )  # fmt: skip
    assert [main(run) for run in runs] == [0, 0]
    both = [str(made.file), str(tmp_path / "other.onnx")]
    assert main(["bench", *both, "--data", str(made.images), *QUICK]) == 1
    assert "was exported with other classes" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_counts_the_right_answers_of_both(made: Made, tmp_path: Path):
    given = [str(made.artifact), "--classes", str(made.classes), "--data", str(made.images)]
    assert main(["evaluate", *given, "--json", str(tmp_path / "e.json")]) == 0
    report = json.loads((tmp_path / "e.json").read_text())
    classes, targets = load_classes(made.classes), find_images(str(made.images), "val", NAMES)
    for found, model in zip(
        report["models"].values(), (load_model(made.name), load(made.artifact)), strict=True
    ):
        answers = made.logits(with_classes(model, classes)).argmax(1)
        assert found["top1"] == pytest.approx(np.mean(answers == np.array(targets.targets)))


@pytest.mark.slow
def test_methods_are_compared_by_the_answers_with_classes(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    compare = ["compare", made.name, "--data", str(made.images), "--samples", "8", "--seeds", "1",
               "--method", "rtn", "-o", str(tmp_path / "c.json")]  # fmt: skip
    assert main([*compare, "--classes", str(made.classes)]) == 0
    report = json.loads((tmp_path / "c.json").read_text())
    classes, images = load_classes(made.classes), find_images(str(made.images), "val", NAMES)
    answers = made.logits(with_classes(load_model(made.name), classes)).argmax(1)
    assert report["float"]["top1"] == pytest.approx(np.mean(answers == np.array(images.targets)))
    # Runs without classes are judged otherwise, and stand in no table with these.
    assert main(compare) == 1
    assert "choose another file" in capsys.readouterr().err


@pytest.mark.slow
def test_python_exports_the_same_file(made: Made, tmp_path: Path):
    classes = marrq.load_classes(made.classes)
    marrq.export(marrq.with_classes(marrq.load(made.artifact), classes), tmp_path / "model.onnx")
    ours, theirs = onnx.load(tmp_path / "model.onnx"), onnx.load(made.file)
    assert ours.graph == theirs.graph
    assert {one.key: one.value for one in ours.metadata_props} == {
        one.key: one.value for one in theirs.metadata_props
    }


@pytest.mark.slow
def test_a_server_is_told_the_names_of_the_classes(made: Made, tmp_path: Path):
    given = [str(made.artifact), "--classes", str(made.classes), "--format", "triton"]
    assert main(["export", *given, "-o", str(tmp_path / "repository")]) == 0
    folder = tmp_path / "repository" / "vit"
    assert (folder / "labels.txt").read_text().split("\n") == [*NAMES, ""]
    assert 'label_filename: "labels.txt"' in (folder / "config.pbtxt").read_text()
