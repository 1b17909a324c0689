"""Nothing is deleted that marrq did not write, by any command and under any option."""

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from exporters.replacing import check_model_file, check_version_folder
from marrq.artifact.checkpoint import remove_checkpoint
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.files import write_folder
from marrq.methods.spec import parse_method
from marrq.outputs import (
    ARTIFACT_FILES,
    MAKERS,
    Strange,
    check_output,
    check_place,
    check_report,
    no_artifact,
    no_picture,
    no_report,
)
from marrq.schemes import parse_scheme
from marrq.workflows.destination import Destination, folders_read
from runtime.report import plots

SVG = "<?xml?><svg><metadata><dc:creator><dc:title>marrq</dc:title></dc:creator></metadata></svg>"
PNG = b"\x89PNG\r\n\x1a\n....tEXtSoftware\0marrq...."


def artifact(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ARTIFACT_FILES:
        (folder / name).write_text('{"format": "marrq.artifact"}' if name == "config.json" else "x")
    return folder


def model(file: Path, *keys: str, data: str | None = None) -> Path:
    """An ONNX file with these keys of metadata, and a tensor in another file."""
    made = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    for key in keys:
        made.metadata_props.add(key=key, value="x")
    if data is not None:
        tensor = made.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=1)
        tensor.external_data.add(key="location", value=data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(made.SerializeToString())
    return file


def text(content: str | bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def folder(*files: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.mkdir()
        for name in files:
            (path / name).write_text("years of work")
        return path

    return write


def artifact_with_notes(path: Path) -> Path:
    artifact(path)
    (path / "notes.txt").write_text("mine")
    return path


REPLACED: dict[str, tuple[Strange, Callable[[Path], Path]]] = {
    "an artifact": (no_artifact, artifact),
    "an empty folder": (no_artifact, folder()),
    "a report": (no_report, text('{"schema": "marrq.bench/2", "models": []}')),
    "an empty file": (no_report, text("")),
    "a page": (no_picture, text('<html><meta name="generator" content="marrq"></html>')),
    "an svg": (no_picture, text(SVG)),
    "a png": (no_picture, text(PNG)),
}
KEPT: dict[str, tuple[Strange, Callable[[Path], Path], str]] = {
    "a folder": (no_artifact, folder("thesis.txt"), "is a folder that holds no artifact"),
    "a checkpoint": (no_artifact, folder("config.json", "model.safetensors"), "holds no artifact"),
    "a file": (no_artifact, text("mine"), "is a file, and an artifact is a folder"),
    "an artifact with notes": (no_artifact, artifact_with_notes, "holds 'notes.txt'"),
    "another JSON": (no_report, text('{"schema": "https://json-schema.org"}'), "is no report"),
    "a list in JSON": (no_report, text("[1]"), "is no report"),
    "no JSON": (no_report, text("mine"), "is no report"),
    "bytes": (no_report, text(b"\xff\xfe\x00"), "is no report"),
    "a folder for a report": (no_report, folder("a"), "is a folder"),
    "a photo": (no_picture, text(b"\x89PNG\r\n\x1a\n a photo of marrq"), "is no page or plot"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_marrq_wrote_or_holds_nothing_is_replaced(what: str, tmp_path: Path):
    strange, write = REPLACED[what]
    output = write(tmp_path / "output")
    with pytest.raises(MarrqError, match="exists: choose another place, or pass --force"):
        check_output(output, False, strange)
    check_output(output, True, strange)


@pytest.mark.parametrize("what", KEPT)
def test_anything_else_is_kept_even_with_force(what: str, tmp_path: Path):
    strange, write, sentence = KEPT[what]
    output = write(tmp_path / "output")
    with pytest.raises(MarrqError, match=f"{sentence}.*: marrq replaces only what it wrote"):
        check_output(output, True, strange)
    with pytest.raises(MarrqError, match=sentence):
        check_report(output, strange)


PLACES = {
    ".": "is the folder that the command runs in: give a new name in it",
    "..": "has no name of its own: give a new name in it",
    "/": "is the root folder: give a new name in it",
    "inner/..": "is the folder that the command runs in: give a new name in it",
    "../here": "is or holds the folder that you are in",
    "/proc": "is a mount",
    "/dev/null": "is no file and no folder",
    "link": "is a link",
    "link to a file": "is a link",
    "dangling": "is a link",
    "file/below": "'file' is a file",
    "home": "is or holds your home folder",
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_refused_whatever_is_there(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # All of them artifacts, which --force replaces elsewhere.
    here = artifact(tmp_path / "here")
    artifact(tmp_path / "elsewhere")
    artifact(here / "home")
    (here / "file").write_text('{"schema": "marrq.bench/2"}')
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (here / "link to a file").symlink_to("file")
    (here / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here / "home"))
    for force in (False, True):
        with pytest.raises(MarrqError, match=PLACES[place]):
            check_output(Path(place), force, no_artifact)
    with pytest.raises(MarrqError, match=PLACES[place]):
        check_report(Path(place), no_report)


@pytest.mark.parametrize(
    ("output", "how"),
    [
        ("data/images", "is what"),
        ("images/cat", "lies in 'images', which"),
        ("data", "holds 'images', which"),
        ("images/new", "lies in 'images', which"),
    ],
)
def test_an_artifact_meets_no_folder_that_is_read(
    output: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data" / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images").symlink_to(tmp_path / "data" / "images")
    monkeypatch.chdir(tmp_path)
    inputs = folders_read("demo", "images")
    destination = Destination(Path(output), True, inputs=inputs)
    with pytest.raises(MarrqError, match=f"output '{output}' {how} --data reads: choose another"):
        destination.check(parse_scheme("W4A8"), parse_method("rtn"), 8, 0)


def test_a_model_file_is_replaced_only_with_its_own_data(tmp_path: Path):
    ours = model(tmp_path / "ours.onnx", "marrq.flavor", data="ours.onnx.data")
    (tmp_path / "ours.onnx.data").write_text("tensors")
    check_model_file(ours, True)
    with pytest.raises(MarrqError, match=r"ours.onnx' exists"):
        check_model_file(ours, False)
    # A file of the same name that the model does not name.
    small = model(tmp_path / "small.onnx", "marrq.flavor")
    (tmp_path / "small.onnx.data").write_text("mine")
    with pytest.raises(MarrqError, match=r"small.onnx.data' belongs to no model of marrq's"):
        check_model_file(small, True)
    (tmp_path / "alone.onnx.data").write_text("mine")
    with pytest.raises(MarrqError, match=r"alone.onnx.data' belongs to no model of marrq's"):
        check_model_file(tmp_path / "alone.onnx", True)


@pytest.mark.parametrize("content", ["another tool's", "text", "folder"])
def test_a_model_file_of_somebody_else_is_kept(content: str, tmp_path: Path):
    file = tmp_path / "model.onnx"
    if content == "another tool's":
        model(file, "producer.notes")
    elif content == "text":
        file.write_text("mine")
    else:
        folder("a")(file)
    with pytest.raises(MarrqError, match="marrq replaces only what it wrote"):
        check_model_file(file, True)


def test_a_repository_keeps_what_marrq_did_not_put_there(tmp_path: Path):
    version = tmp_path / "repository" / "vit" / "1"
    check_version_folder(version, False)
    model(version / "model.onnx", "marrq.flavor")
    check_version_folder(version, True)
    (version / "notes.txt").write_text("mine")
    with pytest.raises(MarrqError, match=r"holds 'notes.*', which marrq did not write"):
        check_version_folder(version, True)
    model(version.parent / "2" / "model.onnx")
    with pytest.raises(MarrqError, match="holds no model of marrq's"):
        check_version_folder(version.parent / "2", True)
    (version.parent / "config.pbtxt").write_text('name: "vit"')
    with pytest.raises(MarrqError, match=r"has a config.pbtxt that marrq did not write"):
        check_version_folder(version.parent / "3", True)


def test_a_folder_that_is_replaced_loses_only_what_the_caller_names(tmp_path: Path):
    # What no check saw: somebody adds a file while the new folder is written.
    output = folder("a")(tmp_path / "output")

    def write(place: Path) -> None:
        (place / "a").write_text("new")
        (output / "notes.txt").write_text("mine")

    write_folder(output, write, ("a",))
    assert [path.name for path in output.iterdir()] == ["a"]
    assert (tmp_path / ".output.replaced" / "notes.txt").read_text() == "mine"


def test_writing_beside_hidden_files_leaves_them_alone(tmp_path: Path):
    # `--json env` once wrote to `.env` first.
    (tmp_path / ".env").write_text("SECRET=1")
    assert main(["doctor", "--json", str(tmp_path / "env")]) == 0
    assert json.loads((tmp_path / "env").read_text())["schema"] == "marrq.doctor/1"
    assert (tmp_path / ".env").read_text() == "SECRET=1"


def test_a_checkpoint_is_removed_and_what_else_is_in_its_folder_is_not(tmp_path: Path):
    work = folder("settings.json", "block-0000.safetensors", "block-notes.txt")(tmp_path / "work")
    (work / ".block-0001.safetensors.unfinished").write_text("half")
    remove_checkpoint(work)
    assert [path.name for path in work.iterdir()] == ["block-notes.txt"]
    (work / "block-notes.txt").unlink()
    remove_checkpoint(work)
    assert not work.exists()


COMMANDS = {
    "quantize": "quantize demo -o {folder} --force",
    "quantize, work dir": "quantize demo -o new --work-dir {file}",
    "export": "export artifact -o {file} --force",
    "export, folder": "export artifact -o {folder} --force",
    "export, artifact": "export artifact -o artifact --force",
    "export, triton": "export artifact --format triton --name {folder} -o . --force",
    "bench --json": "bench model.onnx --json {file}",
    "bench --json, model": "bench model.onnx --json model.onnx",
    "bench --report": "bench model.onnx --report {file}",
    "bench --report, folder": "bench model.onnx --report {folder}",
    "compare": "compare demo -o {file}",
    "compare, folder": "compare demo -o {folder}",
    "compare --plot": "compare demo -o new.json --plot {file}",
    "inspect --json": "inspect model.onnx --json {file}",
    "inspect --plot": "inspect artifact --plot {file}",
    "doctor --json": "doctor --json {file}",
    "evaluate --json": "evaluate demo --json {file}",
    "demo, artifact": "demo -o one --force",
    "demo, model": "demo -o two --force",
    "demo, report": "demo -o three --force",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_replaces_what_it_did_not_write(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    folder("thesis.txt")(tmp_path / "mine")
    text("years of work")(tmp_path / "mine.svg")
    artifact(tmp_path / "artifact")
    (tmp_path / "mine" / "1").mkdir()
    (tmp_path / "mine" / "1" / "model.onnx").write_text("mine")
    model(tmp_path / "model.onnx", "marrq.flavor")
    # In the place of each of the demo's outputs.
    for place, output in (("one", "artifact"), ("two", "model.onnx"), ("three", "bench.json")):
        folder("thesis.txt")(tmp_path / place)
        (tmp_path / place / output).mkdir()
        (tmp_path / place / output / "thesis.txt").write_text("years of work")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = COMMANDS[command].format(folder="mine", file="mine.svg").split()
    assert main(arguments) in (1, 2)
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert len(errors.splitlines()) < 10
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots_and_pages_name_their_maker(suffix: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"plot{suffix}"
    with plots.written_figure(plot, 2.0) as figure:
        figure.add_subplot().plot([1, 2])
    check_report(plot, no_picture)
    template = (Path(plots.__file__).parent / "report.html.jinja").read_bytes()
    assert any(mark in template for mark in MAKERS)


def test_a_folder_that_may_not_be_written_is_told_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Root may write everywhere, so that modes of folders would show nothing here.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(MarrqError, match=f"you may not write to {str(tmp_path)!r}"):
        check_place(tmp_path / "new" / "artifact")
    monkeypatch.setattr("os.access", lambda path, mode: True)
    check_place(tmp_path / "new" / "artifact")


@pytest.mark.parametrize(
    "command",
    [
        "bench m.onnx --json same.html --report same.html",
        "compare demo -o same.svg --plot same.svg",
        "sensitivity demo --json same.svg --plot same.svg",
    ],
)
def test_two_outputs_of_one_name_are_told_before_anything_is_done(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").touch()
    assert main(command.split()) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "is named for two outputs: give each of them a file of its own" in told
    assert not (tmp_path / "same.svg").exists()
