"""A Triton repository says what the file in it says, is never half there, and the check of it finds
what a server would refuse."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from google.protobuf import text_format
from PIL import Image
from runtime.doctor.file import examine_file
from runtime.doctor.releases import loads_under
from tritonclient.grpc import model_config_pb2 as protocol

from exporters import onnx_file
from exporters.triton.config import preferred_batches
from marrq.artifact.folder import load
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.models.load import load_model
from runtime.doctor.repository import examine_repository
from runtime.preprocessing import ServedPreprocessing
from runtime.session import Model, SessionSettings

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "examples" / "serve"


def export(artifact: Path, repository: Path, *options: str) -> int:
    return main(["export", str(artifact), "--format", "triton", "-o", str(repository), *options])


@pytest.fixture(scope="module")
def written(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "repository"
    assert (
        export(
            demo_artifact,
            folder,
            "--name",
            "digits",
            "--threads",
            "2",
            "--max-batch",
            "16",
            "--queue-delay",
            "500",
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def plain(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "repository"
    assert export(demo_artifact, folder, "--name", "digits") == 0
    return folder


@pytest.fixture
def repository(plain: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(plain, tmp_path / "repository"))


def config_of(repository: Path, name: str = "digits") -> protocol.ModelConfig:
    return text_format.Parse(
        (repository / name / "config.pbtxt").read_text(), protocol.ModelConfig()
    )


def test_the_config_for_the_onnxruntime_backend_says_what_the_file_takes_and_gives(
    written: Path, demo_artifact: Path
):
    config, model = config_of(written), load(demo_artifact)
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 16)
    [pixels], [logits], [group] = config.input, config.output, config.instance_group
    assert (pixels.name, pixels.data_type, list(pixels.dims)) == (
        "pixels",
        protocol.TYPE_FP32,
        [1, 28, 28],
    )
    assert (logits.name, logits.data_type, list(logits.dims), logits.label_filename) == (
        "logits",
        protocol.TYPE_FP32,
        [10],
        "labels.txt",
    )
    assert (group.kind, group.count) == (protocol.ModelInstanceGroup.KIND_CPU, 1)
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    assert (written / "digits" / "labels.txt").read_text().splitlines() == list(model.labels)
    assert json.loads(config.parameters["preprocessing"].string_value)["mean"] == list(
        model.preprocessing.mean
    )
    [examined] = examine_repository(written)
    assert (examined.name, examined.versions, examined.problems) == ("digits", (1,), ())


def test_the_page_beside_the_model_tells_a_client_what_to_send(
    written: Path, demo_artifact: Path, tmp_path: Path
):
    assert export(demo_artifact, tmp_path / "r", "--preprocess") == 0
    floats, images = (
        (written / "digits" / "1" / "README.md").read_text(),
        (tmp_path / "r" / "vit" / "1" / "README.md").read_text(),
    )
    assert "`pixels`, FP32 [1, 28, 28], up to 16 at once" in floats
    assert "mean [0.1307]" in floats
    assert "`pixels`, UINT8 [28, 28, 1]" in images
    assert "mean" not in images


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


def test_the_file_in_a_repository_is_the_export(written: Path, demo_artifact: Path, tmp_path: Path):
    assert main(["export", str(demo_artifact), "-o", str(tmp_path / "model.onnx")]) == 0
    assert (written / "digits" / "1" / "model.onnx").read_bytes() == (
        tmp_path / "model.onnx"
    ).read_bytes()


def test_the_tensors_of_a_large_model_lie_beside_it(
    demo_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", 1000)
    assert export(demo_artifact, tmp_path / "repository") == 0
    assert {file.name for file in (tmp_path / "repository" / "vit" / "1").iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "README.md",
    }
    assert examine_repository(tmp_path / "repository")[0].problems == ()


def test_the_fastest_batches_of_a_bench_are_preferred(demo_artifact: Path, tmp_path: Path):
    speeds = {1: 100.0, 2: 180.0, 4: 290.0, 8: 300.0, 16: 600.0}
    rows = [{"batch": batch, "images_per_s": speed} for batch, speed in speeds.items()]
    model = {"flavor": "integer", "scheme": "W4A8", "latency": rows}
    report: dict[str, Any] = {
        "schema": "marrq.bench/2",
        "models": [model, {"flavor": "fp32", "scheme": "fp32", "latency": rows}],
    }
    assert preferred_batches(report, "fp32", "W4A8", 2) == (2,)
    with pytest.raises(MarrqError, match="no batch size up to 0"):
        preferred_batches(report, "integer", "W4A8", 0)
    with pytest.raises(
        MarrqError, match="the bench holds 0 of W4A8 qdq, among W4A8 integer, fp32 fp32"
    ):
        preferred_batches(report, "qdq", "W4A8", 8)
    with pytest.raises(MarrqError, match="the bench holds 2 of W4A8 integer"):
        preferred_batches({"models": [model, model]}, "integer", "W4A8", 8)
    assert preferred_batches(report, "integer", "W4A8", 8) == (4, 8)
    assert preferred_batches(report, "integer", "W4A8", 16) == (16,)
    (tmp_path / "bench.json").write_text(json.dumps(report))
    assert (
        export(demo_artifact, tmp_path / "repository", "--bench", str(tmp_path / "bench.json")) == 0
    )
    assert list(
        config_of(tmp_path / "repository", "vit").dynamic_batching.preferred_batch_size
    ) == [4, 8]


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file with the time of its last change."""
    return {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_second_version_stands_beside_the_first_which_it_leaves_untouched(
    repository: Path, demo_artifact: Path
):
    before = contents(repository)
    assert export(demo_artifact, repository, "--name", "digits", "--model-version", "2") == 0
    after = contents(repository)
    assert {file: after[file] for file in before} == before
    assert {file.parent.name for file in set(after) - set(before)} == {"2"}
    assert examine_repository(repository)[0].versions == (1, 2)
    assert [place.name for place in repository.parent.iterdir()] == ["repository"]


@pytest.mark.parametrize("moved", ["the version that is there", "the new version"])
def test_a_version_that_cannot_be_replaced_stays(
    moved: str, repository: Path, demo_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    before, rename = contents(repository), Path.rename

    def fail(place: Path, target: Path) -> Path:
        if (target.name == "replaced") == (
            moved == "the version that is there"
        ) and place.name == "1":
            monkeypatch.undo()
            raise OSError("planted")
        return rename(place, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert export(demo_artifact, repository, "--name", "digits", "--flavor", "qdq", "--force") == 1
    assert contents(repository) == before
    assert [place.name for place in repository.parent.iterdir()] == ["repository"]


def test_what_clients_see_is_not_changed_under_other_versions_even_by_force(
    repository: Path, demo_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert export(demo_artifact, repository, "--name", "digits", "--model-version", "2") == 0
    before = contents(repository)
    assert export(demo_artifact, repository, "--name", "digits", "--preprocess", "--force") == 1
    assert (
        "has version 2 under a config with another input, model_warmup: choose another --name\n"
        in capsys.readouterr().err
    )
    (repository / "digits" / "labels.txt").write_text(
        "".join(f"{number}\n" for number in range(9, -1, -1))
    )
    assert export(demo_artifact, repository, "--name", "digits", "--model-version", "3") == 1
    assert "a config with another labels: choose another --name" in capsys.readouterr().err
    assert {file for file in contents(repository) if file not in before} == set()


def test_settings_that_clients_do_not_see_are_changed_by_force(
    repository: Path, demo_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--name", "digits", "--model-version", "2", "--threads", "2"]
    assert export(demo_artifact, repository, *arguments) == 1
    assert (
        "another parameters: choose another --name, or pass --force to replace it for all of them"
        in capsys.readouterr().err
    )
    assert export(demo_artifact, repository, *arguments, "--force") == 0
    assert config_of(repository).parameters["intra_op_thread_count"].string_value == "2"


def test_a_repository_behind_a_link_takes_its_first_model(demo_artifact: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert export(demo_artifact, tmp_path / "link") == 0
    assert examine_repository(tmp_path / "there")[0].problems == ()


def test_a_repository_on_another_file_system_than_its_folder_is_refused_before_anything_is_made(
    demo_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    if not Path("/dev/shm").is_mount():
        pytest.skip("needs a file system that is mounted")
    assert export(demo_artifact, Path("/dev/shm")) == 1
    assert (
        "'/dev' and moved to '/dev/shm' in one step, but the first is not writable or on another "
        "file system" in capsys.readouterr().err
    )


REFUSED = {
    "a version that is there": (
        ["--name", "digits"],
        "pass another --model-version, or --force to replace it",
    ),
    "a config that differs": (
        ["--name", "digits", "--model-version", "2", "--preprocess"],
        "a config with another input, model_warmup",
    ),
    "a name that is no address": (["--name", "a/b"], "letters, digits and '_'"),
    "a name that goes up": (["--name", "a..b"], "letters, digits and '_'"),
    "an unknown backend": (["--backend", "tensorflow"], "choose one of onnxruntime, python"),
    "an unknown device": (["--device", "tpu"], "choose one of cpu, gpu"),
    "CPU kernels on a GPU": (
        ["--device", "gpu"],
        "the kernels of integer are of ONNX Runtime's CPU provider",
    ),
    "a flavour that does not fit": (["--flavor", "matmulnbits"], "use --flavor integer or qdq"),
    "a bench that is none": (["--bench", "config.json"], "is no bench"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    case: str,
    repository: Path,
    demo_artifact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(demo_artifact)
    before = {file: file.read_bytes() for file in repository.parent.rglob("*") if file.is_file()}
    options, sentence = REFUSED[case]
    capsys.readouterr()
    assert export(demo_artifact, repository, *options) == 1
    assert sentence in capsys.readouterr().err
    assert {
        file: file.read_bytes() for file in repository.parent.rglob("*") if file.is_file()
    } == before


@pytest.mark.parametrize(
    "option", [["--backend", "python"], ["--preprocess"], ["--threads", "2"], ["--bench", "b.json"]]
)
def test_options_of_servers_are_refused_for_files(
    option: list[str], demo_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["export", str(demo_artifact), "-o", "never.onnx", *option]) == 1
    assert f"{option[0]} is about a server: use it with --format triton" in capsys.readouterr().err


def test_force_replaces_a_version_and_its_config(repository: Path, demo_artifact: Path):
    assert export(demo_artifact, repository, "--name", "digits", "--preprocess", "--force") == 0
    assert config_of(repository).input[0].data_type == protocol.TYPE_UINT8
    assert examine_repository(repository)[0].problems == ()


def test_the_bench_does_not_feed_pixels_to_a_file_that_takes_images(
    demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert export(demo_artifact, tmp_path / "repository", "--preprocess") == 0
    assert (
        main(["bench", str(tmp_path / "repository" / "vit" / "1" / "model.onnx"), "--data", "demo"])
        == 1
    )
    assert (
        "takes tensor(uint8), not normalized pixels: bench it as exported without --preprocess"
        in capsys.readouterr().err
    )


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
        edit("dims: 28", "dims: 32"),
        r"'pixels' is \[1, 32, 28\] in the config, \[1, 28, 28\] in the file",
    ),
    "another type": (
        edit("TYPE_FP32", "TYPE_UINT8"),
        "'pixels' is TYPE_UINT8 in the config, FLOAT in the file",
    ),
    "another output": (edit('"logits"', '"classes"'), "the output 'classes' is only in the config"),
    "too few labels": (
        lambda model: (model / "labels.txt").write_text("one\n") and None,
        "has 1 labels, logits has 10 classes",
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


def test_the_graph_normalizes_each_channel_as_the_preprocessing_does(tiny: str, tmp_path: Path):
    model = load_model(tiny)
    model = replace(
        model, preprocessing=replace(model.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    )
    onnx_file.write_baseline(model, "fp32", tmp_path / "floats.onnx")
    onnx_file.write_baseline(model, "fp32", tmp_path / "images.onnx", takes_images=True)
    preprocessing = ServedPreprocessing(**asdict(model.preprocessing))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    floats, images = (
        Model(tmp_path / f"{name}.onnx", SessionSettings()) for name in ("floats", "images")
    )
    np.testing.assert_array_equal(
        images.run(preprocessing.pixels(image)[None]), floats.run(preprocessing(image)[None])
    )


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
