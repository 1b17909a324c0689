"""The check of a repository finds what a server would refuse; the examples serve what it holds."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml

from marrq.cli import main
from runtime.doctor.file import examine_file
from runtime.doctor.releases import loads_under
from runtime.doctor.repository import examine_repository

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "examples" / "serve"


def edit(old: str, new: str) -> Callable[[Path], None]:
    """A change of the config's text."""

    def change(model: Path) -> None:
        text = (model / "config.pbtxt").read_text()
        assert old in text
        (model / "config.pbtxt").write_text(text.replace(old, new, 1))

    return change


def cut(model: Path) -> None:
    file = model / "1" / "model.onnx"
    file.write_bytes(file.read_bytes()[:1000])


def fix_batch(model: Path) -> None:
    file = onnx.load(model / "1" / "model.onnx")
    file.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(file, model / "1" / "model.onnx")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (
        lambda model: edit("max_batch_size", "max_bath_size")(model),
        'config.pbtxt cannot be read: .*"max_bath_size"',
    ),
    "another name": (edit('"digits"', '"numbers"'), "the config names the model 'numbers'"),
    "an unknown backend": (edit('"onnxruntime"', '"onnx"'), "the backend is 'onnx'"),
    "another shape": (
        edit("dims: 32", "dims: 28"),
        r"'pixels' is \[3, 28, 32\] in the config, \[3, 32, 32\] in the file",
    ),
    "another type": (
        edit("TYPE_FP32", "TYPE_UINT8"),
        "'pixels' is TYPE_UINT8 in the config, FLOAT in the file",
    ),
    "another output": (edit('"logits"', '"classes"'), "the output 'classes' is only in the config"),
    "too few labels": (
        lambda model: (model / "labels.txt").write_text("one\n") and None,
        "has 1 labels, logits has 5 classes",
    ),
    "no labels": (
        lambda model: (model / "labels.txt").unlink(),
        "should be in labels.txt, which is not there",
    ),
    "batches larger than allowed": (
        edit("dynamic_batching {", "dynamic_batching { preferred_batch_size: 9"),
        "batches of 9 images",
    ),
    "no version": (lambda model: (model / "1").rename(model / "one"), "there is no version"),
    "no file": (lambda model: (model / "1" / "model.onnx").unlink(), "version 1 has no model.onnx"),
    "no script": (edit('"onnxruntime"', '"python"'), "version 1 has no model.py"),
    "a file cut off": (cut, "version 1: '.*model.onnx' is no ONNX file, or not the whole of one"),
    "an empty file": (
        lambda model: (model / "1" / "model.onnx").write_bytes(b"") and None,
        "version 1: '.*model.onnx' is no ONNX file",
    ),
    "a fixed batch": (fix_batch, "whose batch is not free: max_batch_size has to be 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_names_what_a_server_would_refuse(fault: str, repository: Path):
    plant, sentence = FAULTS[fault]
    assert examine_repository(repository)[0].problems == ()
    plant(repository / "digits")
    assert re.search(sentence, "\n".join(examine_repository(repository)[0].problems))


def test_of_a_model_that_others_wrote_only_the_config_is_read(repository: Path):
    (repository / "theirs" / "1").mkdir(parents=True)
    (repository / "theirs" / "config.pbtxt").write_text('platform: "onnxruntime_onnx"')
    ours, theirs = examine_repository(repository)
    assert (ours.warnings, theirs.backend, theirs.problems, len(theirs.warnings)) == (
        (),
        "onnxruntime_onnx",
        (),
        1,
    )


def test_the_container_and_the_composition_serve_what_the_exporter_writes(repository: Path):
    dockerfile = (SERVE / "Dockerfile").read_text()
    [version] = re.findall(r"image has ONNX Runtime (\S+),", dockerfile)
    [file] = examine_repository(repository)[0].files
    assert loads_under(version, examine_file(file).lowest_onnxruntime)
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    assert [line.split()[0] for line in lines] == [
        "FROM",
        "RUN",
        "COPY",
        "EXPOSE",
        "HEALTHCHECK",
        "CMD",
    ]
    command = json.loads(lines[-1].removeprefix("CMD "))
    assert "--model-repository=/models" in command
    [service] = yaml.safe_load((SERVE / "compose.yaml").read_text())["services"].values()
    assert service["volumes"] == ["./repository:/models:ro"]
    exports = re.findall(
        r"^# +(marrq export .*)$", dockerfile + (SERVE / "compose.yaml").read_text(), re.MULTILINE
    )
    assert len(exports) == 3
    assert all(
        "--format triton" in text and "examples/serve/repository" in shlex.split(text)
        for text in exports
    )


@pytest.mark.slow
def test_the_commands_of_the_readme_make_a_repository_that_the_doctor_finds_sound(
    demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "exporters" / "triton" / "README.md").read_text()
    block = re.search(r"More models and versions:\n.*?```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    lines = [
        line.split("#")[0].split()
        for line in block.group(1).splitlines()
        if line.startswith("marrq ")
    ]
    assert [words[1] for words in lines] == ["export", "export", "export", "doctor"]
    for words in lines:
        words = [
            str(demo_artifact) if word in ("artifact", "better") else word for word in words[1:]
        ]
        assert main(words) == 0
    assert [
        (model.name, model.versions) for model in examine_repository(tmp_path / "repository")
    ] == [("pixels", (1,)), ("vit", (1, 2))]
