"""Files of strangers: an artifact, a model, images."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz_artifact
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import noise, quantized, vit

from marrq.artifact.folder import CONFIG, REPORTS, TENSORS, load, save
from marrq.artifact.validate import PART_TYPES, check_architecture
from marrq.errors import MarrqError
from marrq.files import sha256
from marrq.models.images import read_image
from marrq.models.load import load_model

HUGE = 10**9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stranger") / "artifact"
    save(quantized(vit(), noise(4), "W4A8", "rtn"), folder)
    return folder


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "artifact"))


@pytest.fixture(autouse=True)
def limited_time() -> Iterator[None]:
    signal.alarm(20)
    yield
    signal.alarm(0)


def configured(folder: Path, *path: str, value: Any) -> Path:
    """The artifact with another value in config.json."""
    config = inner = json.loads((folder / CONFIG).read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def with_tensors(folder: Path, **changes: torch.Tensor) -> Path:
    """The artifact with other tensors (a dot in a name is written __), and the hash that belongs to
    them."""
    tensors = load_file(folder / TENSORS) | {
        name.replace("__", "."): tensor for name, tensor in changes.items()
    }
    save_file(tensors, folder / TENSORS)
    return configured(folder, "tensors_sha256", value=sha256(folder / TENSORS))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint_path", "/etc/passwd"),
        ("pretrained_cfg", {"file": "/etc/passwd"}),
        ("pretrained_cfg_overlay", {"url": "http://localhost"}),
        ("cache_dir", "/tmp"),
        ("scriptable", True),
        ("features_only", True),
        ("auto_map", {"AutoModel": "evil.Evil"}),
        ("backbone_config", {"use_pretrained_backbone": True}),
        ("attn_implementation", "someone/kernel"),
    ],
)
def test_an_architecture_that_would_read_download_or_import_is_refused(
    artifact: Path, key: str, value: Any
):
    with pytest.raises(MarrqError, match=f"its architecture sets '{key}"):
        load(configured(artifact, "model", "architecture", key, value=value))


def test_a_table_for_a_backbone_lets_no_name_of_another_backbone_pass():
    table = {"model_type": "dinov2", "hidden_size": 32}
    check_architecture("transformers", {"model_type": "dpt", "backbone_config": table})
    for inner in ({**table, "backbone_config": "someone/model"}, "someone/model"):
        with pytest.raises(ValueError, match="its architecture sets 'backbone_config'"):
            check_architecture("transformers", {"model_type": "dpt", "backbone_config": inner})


@pytest.mark.parametrize(
    "name", ["hf-hub:someone/model", "local-dir:/tmp", "no_such_model", "", 5, None]
)
def test_a_model_that_timm_does_not_have_is_refused(artifact: Path, name: object):
    with pytest.raises(MarrqError, match="timm has no model"):
        load(configured(artifact, "model", "architecture", "model_name", value=name))


@pytest.mark.parametrize(
    "key", ["embed_dim", "depth", "img_size", "num_classes", "mlp_ratio", "reg_tokens"]
)
@pytest.mark.parametrize("value", [HUGE, 2**20, 5000, -1, 1e300])
def test_a_huge_architecture_is_refused_before_it_takes_memory_or_time(
    artifact: Path, key: str, value: float
):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, limits[1]))
    try:
        with pytest.raises(MarrqError, match="is damaged") as refused:
            load(configured(artifact, "model", "architecture", key, value=value))
        assert not fuzz_artifact.ran_out(refused.value)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize(
    "shape", [[HUGE, HUGE], [2**62, 4], [-1, -1], [0, 0], [64, 192], [1], [192, 64, 1]]
)
def test_a_shape_that_its_codes_do_not_have_is_refused(artifact: Path, shape: list[int]):
    with pytest.raises(MarrqError, match="is damaged"):
        load(with_tensors(artifact, blocks__0__attn__qkv__weight_shape=torch.tensor(shape)))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("weight_scale", torch.ones(192, 2)),
        ("weight_scale", torch.full((192, 1), float("nan"))),
        ("weight_scale", torch.zeros(192, 1)),
        ("weight_scale", torch.ones(192, 1, dtype=torch.float16)),
        ("weight_zero_point", torch.zeros(1, 1, dtype=torch.int8)),
        ("weight_zero_point", torch.zeros(192, 1, dtype=torch.int32)),
        ("bias", torch.ones(191)),
        ("input_scale", torch.ones(2)),
        ("input_scale", torch.tensor(float("inf"))),
        ("lowrank_left", torch.ones(192, 4, dtype=torch.float16)),
    ],
)
def test_a_part_of_a_linear_that_does_not_fit_is_refused(
    artifact: Path, part: str, tensor: torch.Tensor
):
    with pytest.raises(MarrqError, match="is damaged"):
        load(with_tensors(artifact, **{f"blocks__0__attn__qkv__{part}": tensor}))


@pytest.mark.parametrize(
    ("scheme", "method", "part", "tensor", "told"),
    [
        ("W4A8", "rtn", "weight_zero_point", torch.full((192, 1), 8), "beyond -8 … 7"),
        ("W4A4", "rtn", "input_zero_point", torch.tensor(16), "beyond 0 … 15"),
        ("W8A8", "rtn", "weight_packed", torch.full((192 * 64,), 127), "beyond -64 … 63"),
        ("W4A8", "gptq,lowrank=serq:3", "weight_zero_point", torch.full((192, 1), 29), "-32 … 28"),
        ("W4A8", "rtn", "bias", torch.full((192,), math.nan), "bias has NaN or infinity"),
        ("W4A8", "rtn", "input_smoothing", torch.full((64,), math.inf), "has NaN or infinity"),
        ("W4A8", "rtn", "input_clip", torch.tensor(0.5), "input_clip is no part of a linear of"),
        ("W4A8", "rtn", "zzz", torch.tensor(0.5), "zzz is no part of a linear of W4A8"),
        ("W4A8-sym", "rtn", "weight_zero_point", torch.zeros(192, 1), "is no part of a linear"),
    ],
)
def test_a_number_that_its_grid_does_not_have_is_refused(
    scheme: str, method: str, part: str, tensor: torch.Tensor, told: str, tmp_path: Path
):
    save(quantized(vit(), noise(4), scheme, method), tmp_path / "a")
    load(tmp_path / "a")
    typed = tensor.to(PART_TYPES.get(part, torch.float32))
    changed = with_tensors(tmp_path / "a", **{f"blocks__0__attn__qkv__{part}": typed})
    with pytest.raises(MarrqError, match=f"is damaged.*{told}"):
        load(changed)


@pytest.fixture(scope="module")
def salient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("salient") / "artifact"
    save(quantized(vit(), noise(4), "W4A8", "rtn,lowrank=serq:3"), folder)
    return folder


@pytest.mark.parametrize(
    ("columns", "packed_bytes"),
    [
        ([0, 1, 64], 216),
        ([-1, 0, 1], 216),
        ([1, 1, 2], 216),
        ([2, 1, 0], 216),
        ([[0, 1, 2]], 216),
        ([], 0),
        (list(range(65)), 4680),
        ([0, 1, 2], 215),
        ([0, 1], 216),
    ],
)
def test_salient_columns_that_do_not_fit_are_refused(
    salient: Path, columns: list[Any], packed_bytes: int, tmp_path: Path
):
    folder, path = Path(shutil.copytree(salient, tmp_path / "artifact")), "blocks__0__attn__qkv"
    assert load(folder).reports
    changes = {
        f"{path}__salient_columns": torch.tensor(columns, dtype=torch.int32),
        f"{path}__salient_packed": torch.zeros(packed_bytes, dtype=torch.uint8),
    }
    with pytest.raises(MarrqError, match="is damaged"):
        load(with_tensors(folder, **changes))


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("salient_columns", torch.tensor([0, 1, 2])),
        ("salient_packed", torch.zeros(216, dtype=torch.int8)),
        ("salient_packed", torch.zeros(2, 108, dtype=torch.uint8)),
    ],
)
def test_parts_of_salient_columns_of_another_type_are_refused(
    salient: Path, part: str, tensor: torch.Tensor, tmp_path: Path
):
    folder = Path(shutil.copytree(salient, tmp_path / "artifact"))
    with pytest.raises(MarrqError, match="is damaged"):
        load(with_tensors(folder, **{f"blocks__0__attn__qkv__{part}": tensor}))


@pytest.mark.parametrize("part", ["salient_columns", "salient_packed"])
def test_a_half_of_salient_columns_is_refused(artifact: Path, part: str):
    kind = torch.int32 if part == "salient_columns" else torch.uint8
    tensor = torch.arange(3, dtype=kind)
    with pytest.raises(MarrqError, match="is damaged"):
        load(with_tensors(artifact, **{f"blocks__0__attn__qkv__{part}": tensor}))


@pytest.mark.parametrize("name", [CONFIG, REPORTS, TENSORS])
def test_a_file_that_leads_out_of_the_folder_is_refused(artifact: Path, name: str, tmp_path: Path):
    (artifact / name).rename(tmp_path / name)
    (artifact / name).symlink_to(tmp_path / name)
    with pytest.raises(MarrqError, match=r"is damaged|cannot be read"):
        load(artifact)


@pytest.mark.parametrize("name", [CONFIG, REPORTS])
def test_json_that_is_nested_too_deeply_or_too_large_is_refused(artifact: Path, name: str):
    for text in (
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        " " * (17 * 2**20),
    ):
        (artifact / name).write_text(text)
        with pytest.raises(MarrqError, match="is damaged"):
            load(artifact)


@pytest.mark.parametrize(
    "size",
    [[3, HUGE, HUGE], [3, 5000, 32], [3, 32], 5, [3, "32", 32], [3, -32, 32], [True, 32, 32]],
)
def test_an_input_size_that_no_model_has_is_refused(artifact: Path, size: object):
    with pytest.raises(MarrqError, match="is damaged"):
        load(configured(artifact, "preprocessing", "input_size", value=size))


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("resized", [HUGE, HUGE]),
        ("resized", [32]),
        ("resized", [32, 0]),
        ("crop_pct", 0),
        ("crop_pct", "half"),
        ("crop_pct", 1e-9),
        ("crop_mode", "corner"),
        ("interpolation", "cubic"),
        ("resampling", "by hand"),
        ("transparency", 1),
        ("bgr", "yes"),
        ("std", [0.5, 0.0, 0.5]),
        ("mean", [0.5]),
        ("gamma", 2),
    ],
)
def test_a_term_of_preprocessing_that_has_no_meaning_is_refused(
    artifact: Path, term: str, value: object
):
    with pytest.raises(MarrqError, match="is damaged"):
        load(configured(artifact, "preprocessing", term, value=value))


def test_labels_that_are_no_text_are_refused(artifact: Path):
    with pytest.raises(MarrqError, match="label 5 is no text"):
        load(configured(artifact, "labels", value=["a", 5]))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_a_checkpoint_is_not_run(tiny_folder: Path, tmp_path: Path):
    folder, mark = Path(shutil.copytree(tiny_folder, tmp_path / "model")), tmp_path / "it ran"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(MarrqError, match="cannot load model"):
        load_model(f"local-dir:{folder}")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


@pytest.mark.parametrize("size", [(10_000, 10_000), (1, 40_000)])
def test_an_image_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    size: tuple[int, int], tmp_path: Path
):
    Image.new("1", size).save(tmp_path / "bomb.png")
    with pytest.raises(MarrqError, match=r"cannot read image .*bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_the_fuzzer_notices_a_hang_and_memory_that_is_not_there(
    whole: Path, monkeypatch: pytest.MonkeyPatch
):
    def hangs(source: object) -> None:
        raise fuzz_artifact.TooLong  # as the alarm does

    def asks_for_too_much(source: object) -> None:
        torch.empty(2**60, device="cpu")

    for build, expected in ((hangs, "failed: too long"), (asks_for_too_much, "failed: MarrqError")):
        monkeypatch.setattr("marrq.artifact.folder.build", build)
        assert fuzz_artifact.outcome(whole).startswith(expected)


@pytest.mark.parametrize("cases", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_the_fuzzer_finds_nothing(cases: int, tmp_path: Path):
    handler = signal.getsignal(signal.SIGALRM)
    try:
        found = fuzz_artifact.run(seconds=15, cases=cases, seed=1, folder=tmp_path)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert found.keys() >= {"refused", "loaded"}
    assert "failed" not in found
    assert found["grown_mb"] < 100
