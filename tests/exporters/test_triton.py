"""A Triton repository says what the file in it says, and is never half there."""

import json
import sys
from dataclasses import asdict, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from flavor_files import Prepared
from google.protobuf import text_format
from onnx import helper
from PIL import Image
from tiny_models import noise, vision_model
from torch import nn
from tritonclient.grpc import model_config_pb2 as protocol

from exporters import onnx_file
from exporters.onnx_file import Export
from exporters.triton import config as triton_config
from exporters.triton.card import card
from exporters.triton.config import preferred_batches, read_bench
from exporters.triton.repository import write_repository
from exporters.triton.serving import BACKEND_FILES, Serving
from marrq.artifact.folder import save
from marrq.cli import main
from marrq.errors import MarrqError
from runtime.doctor.repository import examine_repository
from runtime.errors import BenchError
from runtime.preprocessing import ServedPreprocessing
from runtime.session import Model, SessionSettings

FLOAT = onnx.TensorProto.FLOAT


def export(artifact: Path, repository: Path, *options: str) -> int:
    """By the command line."""
    return main(["export", str(artifact), "--format", "triton", "-o", str(repository), *options])


def config_of(repository: Path, name: str = "digits") -> protocol.ModelConfig:
    text = (repository / name / "config.pbtxt").read_text()
    return text_format.Parse(text, protocol.ModelConfig())


def test_the_config_says_what_the_file_takes_and_gives(prepared: Prepared, tmp_path: Path):
    serving = Serving("digits", threads=2, max_batch=16, queue_delay=500)
    write_repository(prepared, tmp_path / "repository", serving)
    config, model = config_of(tmp_path / "repository"), prepared.model
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 16)
    [pixels], [logits], [group] = config.input, config.output, config.instance_group
    assert (pixels.name, pixels.data_type) == ("pixels", protocol.TYPE_FP32)
    assert list(pixels.dims) == [3, 32, 32]
    assert (logits.name, logits.data_type) == ("logits", protocol.TYPE_FP32)
    assert (list(logits.dims), logits.label_filename) == ([5], "labels.txt")
    assert (group.kind, group.count) == (protocol.ModelInstanceGroup.KIND_CPU, 1)
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    labels = tmp_path / "repository" / "digits" / "labels.txt"
    assert labels.read_text().splitlines() == list(model.labels)
    preprocessing = json.loads(config.parameters["preprocessing"].string_value)
    assert preprocessing["mean"] == list(model.preprocessing.mean)
    [examined] = examine_repository(tmp_path / "repository")
    assert (examined.name, examined.versions, examined.problems) == ("digits", (1,), ())


def file_of(outputs: dict[str, list[int]], place: Path) -> Path:
    """A file that gives zeros of these shapes, the batch left out."""
    pixels = helper.make_tensor_value_info("pixels", FLOAT, ["batch", 3, 32, 32])
    given = [
        helper.make_tensor_value_info(name, FLOAT, ["batch", *dims])
        for name, dims in outputs.items()
    ]
    graph = helper.make_graph([], "several", [pixels], given)
    onnx.save(helper.make_model(graph), place)
    return place


def test_a_config_describes_every_output_and_gives_labels_to_classes_alone(
    prepared: Prepared, tmp_path: Path
):
    shapes = {"logits": [5], "boxes": [6, 4], "pooler_output": [64]}
    config = triton_config.config_of(file_of(shapes, tmp_path / "m.onnx"), prepared, Serving("x"))
    assert {output.name: list(output.dims) for output in config.output} == shapes
    assert {output.data_type for output in config.output} == {protocol.TYPE_FP32}
    assert [output.label_filename for output in config.output] == ["labels.txt", "", ""]
    page = card(prepared, config, Serving("x"))
    for name, dims in shapes.items():
        assert f"| output | `{name}`, FP32 {dims}" in page
    # Logits of boxes have classes along an axis, but a server knows labels of one vector only.
    dense = triton_config.config_of(
        file_of({"logits": [6, 5]}, tmp_path / "d.onnx"), prepared, Serving("x")
    )
    assert [output.label_filename for output in dense.output] == [""]
    assert "class_count" not in card(prepared, dense, Serving("x"))


def test_the_python_backend_cuts_every_output_into_the_requests_parts(
    monkeypatch: pytest.MonkeyPatch,
):
    server = SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request),
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda tensors: dict(tensors),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    spec = spec_from_file_location("served", BACKEND_FILES["python"])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.input, model.outputs = "pixels", ["sums", "twice"]
    model.session = SimpleNamespace(
        run=lambda names, given: [given["pixels"].sum(1), 2 * given["pixels"]]
    )
    requests = [np.arange(6.0).reshape(2, 3), np.ones((1, 3)), np.zeros((3, 3))]
    for request, response in zip(requests, model.execute(requests), strict=True):
        assert list(response) == ["sums", "twice"]
        np.testing.assert_array_equal(response["sums"], request.sum(1))
        np.testing.assert_array_equal(response["twice"], 2 * request)


def test_the_page_beside_the_model_tells_a_client_what_to_send(prepared: Prepared, tmp_path: Path):
    floats, images = (
        (
            write_repository(prepared, tmp_path, Serving(name, max_batch=16, preprocess=takes))
            / "README.md"
        ).read_text()
        for name, takes in (("floats", False), ("images", True))
    )
    assert "`pixels`, FP32 [3, 32, 32], up to 16 at once" in floats
    assert "mean [0.5, 0.5, 0.5]" in floats
    assert "resize the shorter side to that of 35 × 35, and cut 32 × 32" in floats
    assert "`pixels`, UINT8 [32, 32, 3]" in images
    assert "mean" not in images


def test_the_page_says_who_resizes_and_what_becomes_of_colours(prepared: Prepared):
    terms = {"resampling": "uint8-tensor", "bgr": True, "resized": (40, 48)}
    described = replace(prepared.model.preprocessing, **terms, crop_mode="squash")
    export = replace(prepared, model=replace(prepared.model, preprocessing=described))
    described_config = triton_config.config_of(prepared.files[False], export, Serving("x"))
    page = card(export, described_config, Serving("x"))
    assert "resize to 40 × 48, and cut 32 × 32 out of the middle" in page
    assert "torchvision's resize of a tensor in uint8, bicubic" in page
    assert "exchange red and blue, and send (x / 255 - mean) / std" in page


@pytest.fixture(scope="module")
def tiny_artifact(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "artifact"
    save(prepared.model, folder)
    return folder


def test_the_command_writes_the_repository_with_its_options(
    prepared: Prepared, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(BENCH))
    options = ["--name", "digits", "--threads", "2", "--bench", str(bench)]
    assert export(tiny_artifact, tmp_path / "repository", *options) == 0
    config = config_of(tmp_path / "repository")
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert f"tritonserver --model-repository {tmp_path / 'repository'}" in capsys.readouterr().err
    model = Model(tmp_path / "repository" / "digits" / "1" / "model.onnx", SessionSettings())
    given = noise(2).numpy()
    expected = Model(prepared.files[False], SessionSettings()).run(given)
    np.testing.assert_array_equal(model.run(given), expected)


@pytest.mark.slow
def test_the_tensors_of_a_large_model_lie_beside_it(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx_file, "INLINE_BYTES", 1000)
    large = Export(prepared.model, "hash", "integer")
    version = write_repository(large, tmp_path / "repository", Serving())
    names = {file.name for file in version.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "README.md"}
    assert examine_repository(tmp_path / "repository")[0].problems == ()


SPEEDS = {1: 100.0, 2: 180.0, 4: 290.0, 8: 300.0, 16: 600.0}


ROWS = [{"batch": batch, "images_per_s": speed} for batch, speed in SPEEDS.items()]


BENCH: dict[str, Any] = {
    "schema": "marrq.bench/2",
    "models": [
        {"flavor": "integer", "scheme": "W4A8", "latency": ROWS},
        {"flavor": "fp32", "scheme": "fp32", "latency": ROWS},
    ],
}


def test_the_fastest_batches_of_a_bench_are_preferred():
    assert preferred_batches(BENCH, "integer", "W4A8", 8) == (4, 8)
    assert preferred_batches(BENCH, "integer", "W4A8", 16) == (16,)
    assert preferred_batches(BENCH, "fp32", "W4A8", 2) == (2,)
    with pytest.raises(MarrqError, match="no batch size up to 0"):
        preferred_batches(BENCH, "integer", "W4A8", 0)
    had = "the bench holds 0 of W4A8 qdq, among W4A8 integer, fp32 fp32"
    with pytest.raises(MarrqError, match=had):
        preferred_batches(BENCH, "qdq", "W4A8", 8)
    twice = {"models": [BENCH["models"][0]] * 2}
    with pytest.raises(MarrqError, match="the bench holds 2 of W4A8 integer"):
        preferred_batches(twice, "integer", "W4A8", 8)


@pytest.mark.parametrize("text", [None, "{}", "["])
def test_a_file_that_is_no_bench_is_told(text: str | None, tmp_path: Path):
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises(MarrqError, match=r"b\.json' is no bench: give what"):
        read_bench(tmp_path / "b.json")


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file with the time of its last change."""
    return {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_second_version_stands_beside_the_first_which_it_leaves_untouched(
    repository: Path, prepared: Prepared
):
    before = contents(repository)
    write_repository(prepared, repository, Serving("digits", 2))
    after = contents(repository)
    assert {file: after[file] for file in before} == before
    assert {file.parent.name for file in set(after) - set(before)} == {"2"}
    assert examine_repository(repository)[0].versions == (1, 2)
    assert [place.name for place in repository.parent.iterdir()] == ["repository"]


@pytest.mark.parametrize("moved", ["the version that is there", "the new version"])
def test_a_version_that_cannot_be_replaced_stays(
    moved: str, repository: Path, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
):
    before, rename = contents(repository), Path.rename

    def fail(place: Path, target: Path) -> Path:
        first = moved == "the version that is there"
        if (target.name == "replaced") == first and place.name == "1":
            monkeypatch.undo()
            raise OSError("planted")
        return rename(place, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="planted"):
        write_repository(prepared, repository, Serving("digits", threads=2), force=True)
    assert contents(repository) == before
    assert [place.name for place in repository.parent.iterdir()] == ["repository"]


def test_what_clients_see_is_not_changed_under_other_versions_even_by_force(
    repository: Path, prepared: Prepared
):
    write_repository(prepared, repository, Serving("digits", 2))
    before = contents(repository)
    sentence = r"version 2 under a config with another input, model_warmup: choose another --name$"
    with pytest.raises(MarrqError, match=sentence):
        write_repository(prepared, repository, Serving("digits", preprocess=True), force=True)
    (repository / "digits" / "labels.txt").write_text("e\nd\nc\nb\na\n")
    with pytest.raises(MarrqError, match=r"a config with another labels: choose another --name$"):
        write_repository(prepared, repository, Serving("digits", 3))
    assert {file for file in contents(repository) if file not in before} == set()


def test_settings_that_clients_do_not_see_are_changed_by_force(
    repository: Path, prepared: Prepared
):
    serving = Serving("digits", 2, threads=2)
    sentence = "another parameters: choose another --name, or pass --force to replace it for all"
    with pytest.raises(MarrqError, match=sentence):
        write_repository(prepared, repository, serving)
    write_repository(prepared, repository, serving, force=True)
    assert config_of(repository).parameters["intra_op_thread_count"].string_value == "2"


def test_force_replaces_a_version_and_its_config(repository: Path, prepared: Prepared):
    write_repository(prepared, repository, Serving("digits", preprocess=True), force=True)
    assert config_of(repository).input[0].data_type == protocol.TYPE_UINT8
    assert examine_repository(repository)[0].problems == ()


def test_the_only_version_takes_its_labels_with_it(repository: Path, prepared: Prepared):
    assert (repository / "digits" / "labels.txt").exists()
    unlabelled = replace(prepared, model=replace(prepared.model, labels=()))
    write_repository(unlabelled, repository, Serving("digits"), force=True)
    assert not (repository / "digits" / "labels.txt").exists()
    write_repository(unlabelled, repository, Serving("digits", 2))
    assert examine_repository(repository)[0].versions == (1, 2)


def test_a_repository_behind_a_link_takes_its_first_model(prepared: Prepared, tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_repository(prepared, tmp_path / "link", Serving())
    assert examine_repository(tmp_path / "there")[0].problems == ()


def test_a_repository_on_another_file_system_than_its_folder_is_refused_before_anything_is_made(
    prepared: Prepared,
):
    if not Path("/dev/shm").is_mount():
        pytest.skip("needs a file system that is mounted")
    sentence = "'/dev' and moved to '/dev/shm' in one step, but the first is not writable or on"
    with pytest.raises(MarrqError, match=sentence):
        write_repository(prepared, Path("/dev/shm"), Serving())


def test_a_gpu_gets_its_own_kind_and_a_page_that_names_the_scheme_of_the_file(
    prepared: Prepared, tmp_path: Path
):
    folded = {"flavor": "folded", "options": {"weights_only": True}, "device": "gpu"}
    version = write_repository(replace(prepared, **folded), tmp_path, Serving("digits"))
    assert config_of(tmp_path).instance_group[0].kind == protocol.ModelInstanceGroup.KIND_GPU
    assert "quantized to W4A16 by rtn, as `folded` for a GPU" in (version / "README.md").read_text()


REFUSED = {
    "a version that is there": (
        ["--name", "digits"],
        "pass another --model-version, or --force to replace it",
    ),
    "a name that is no address": (["--name", "a/b"], "letters, digits and '_'"),
    "a name that goes up": (["--name", "a..b"], "letters, digits and '_'"),
    "an unknown backend": (["--backend", "tensorflow"], "choose one of onnxruntime, python"),
    "an unknown device": (["--device", "tpu"], "choose one of cpu, gpu"),
    "CPU kernels on a GPU": (
        ["--device", "gpu", "--flavor", "integer"],
        "its kernels are of ONNX Runtime's CPU provider",
    ),
    "quantized activations on a GPU": (["--device", "gpu"], "use --weights-only, which leaves"),
    "an unknown flavour": (["--flavor", "int4"], "unknown flavour 'int4'"),
    "a flavour that does not fit": (["--flavor", "matmulnbits"], "use --flavor integer or qdq"),
    "a bench that is none": (["--bench", "config.json"], "is no bench"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    case: str,
    repository: Path,
    tiny_artifact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tiny_artifact)
    before = contents(repository.parent)
    options, sentence = REFUSED[case]
    capsys.readouterr()
    assert export(tiny_artifact, repository, *options) == 1
    assert sentence in capsys.readouterr().err
    assert contents(repository.parent) == before


@pytest.mark.parametrize(
    "option",
    [["--name", "vit"], ["--backend", "python"], ["--preprocess"], ["--bench", "b.json"]],
)
def test_an_option_of_servers_is_refused_for_a_file_even_if_it_has_its_default(
    option: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(["export", "nowhere", "-o", "never.onnx", *option]) == 1
    assert f"{option[0]} is about a server: use it with --format triton" in capsys.readouterr().err


def test_the_bench_does_not_feed_pixels_to_a_file_that_takes_images(
    prepared: Prepared, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", str(prepared.files[True]), "--data", "demo"]) == 1
    assert (
        "takes tensor(uint8), not normalized pixels: bench it as exported without --preprocess"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("channels", "terms"),
    [
        (1, {}),
        (3, {}),
        (3, {"bgr": True}),
        (3, {"resampling": "uint8-tensor"}),
        (4, {"bgr": True, "resampling": "uint8-tensor"}),
    ],
)
def test_the_graph_normalizes_each_channel_as_the_preprocessing_does(
    tmp_path: Path, channels: int, terms: dict[str, Any]
):
    # A model that only flattens, so that the normalization alone is compared.
    model = vision_model(nn.Flatten())
    mean, std = (0.1, 0.2, 0.3, 0.4)[:channels], (0.4, 0.5, 0.6, 0.7)[:channels]
    size = (channels, 32, 32)
    described = replace(model.preprocessing, input_size=size, mean=mean, std=std, **terms)
    model = replace(model, preprocessing=described)
    onnx_file.write_baseline(model, "fp32", tmp_path / "floats.onnx")
    onnx_file.write_baseline(model, "fp32", tmp_path / "images.onnx", takes_images=True)
    preprocessing = ServedPreprocessing(**asdict(model.preprocessing))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8))
    floats, images = (
        Model(tmp_path / f"{name}.onnx", SessionSettings()) for name in ("floats", "images")
    )
    np.testing.assert_array_equal(
        images.run(preprocessing.pixels(image)[None]), floats.run(preprocessing(image)[None])
    )


@pytest.mark.parametrize("terms", [{"crop_mode": "corner"}, {"resampling": "float32-tensor"}])
def test_a_graph_takes_no_images_that_are_no_8_bit_pixels(tmp_path: Path, terms: dict[str, str]):
    model = vision_model(nn.Flatten())
    described = replace(model.preprocessing, **({"resampling": "uint8-tensor"} | terms))
    model = replace(model, preprocessing=described)
    with pytest.raises(MarrqError, match="no 8-bit pixels"):
        onnx_file.write_baseline(model, "fp32", tmp_path / "images.onnx", takes_images=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BenchError, match="no 8-bit pixels"):
        ServedPreprocessing(**asdict(described)).pixels(Image.new("RGB", (9, 9)))
