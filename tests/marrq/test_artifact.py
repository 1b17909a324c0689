"""The artifact holds the very codes, is complete or absent, and is refused when it is not what it
was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import noise, quantized, vit
from torch import Tensor, nn

from marrq.artifact.folder import artifact_hash, is_artifact, load, read_config, save
from marrq.artifact.tensors import tensors_of
from marrq.errors import MarrqError
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.activations import ActivationQuantizer
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import (
    LowRank,
    QuantizedWeight,
    QuantLinear,
    StoredFactor,
    quantized_linears,
)
from marrq.schemes import ActivationSpec, ActivationStrategy, WeightSpec

IMAGES = noise(4)
CASES: list[tuple[str, str, ActivationStrategy]] = [
    ("W8A16", "rtn", "per-tensor"),
    ("W3A8-g16-sym", "rescomp,bias-correction=off", "per-tensor"),
    ("W4A16-mxint", "exact", "per-tensor"),
    ("W2A8-mxint", "gptq,lowrank=qera:4:int8", "per-token"),
    ("W4A4-e8", "marr,lowrank=srr:4", "per-token"),
    ("W3A8", "gptq,lowrank=serq:5", "per-tensor"),
]
MORE_CASES: list[tuple[str, str, ActivationStrategy]] = [
    ("W2A8", "marr", "per-tensor"),
    ("W3A4", "gptaq,alpha=global=0.5", "per-tensor"),
    ("W4A4", "marr-stream,feedback=calibration,pid.steps=3", "per-token"),
    ("W4A16-g32", "marr-gptaq,alpha=grid", "per-tensor"),
    ("W4A8-sym", "gptq,act-order=off", "per-tensor"),
    ("W2A8", "exact,lowrank=srr:4", "per-tensor"),
    ("W2A8-mxint", "exact,lowrank=serq:64", "per-tensor"),
    ("W4A8-g16-sym", "marr,lowrank=serq:1", "per-token"),
    ("W4A8", "gptq,rotate=3", "per-tensor"),
    ("W3A16-g16-sym-e8", "gptq,rotate=3", "per-tensor"),
]


def tiny(scheme: str) -> QuantizedModel:
    return quantized(vit(), IMAGES, scheme, "rtn")


@pytest.mark.parametrize(
    ("scheme", "method", "strategy"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_a_loaded_artifact_is_the_model_that_was_saved(
    tmp_path: Path, scheme: str, method: str, strategy: ActivationStrategy
):
    model = quantized(vit(), IMAGES, scheme, method, strategy=strategy)
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    before, after = model.module.state_dict(), again.module.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])
    before, after = quantized_linears(model.module), quantized_linears(again.module)
    assert [linear.spec for linear in before.values()] == [linear.spec for linear in after.values()]
    with torch.no_grad():
        assert torch.equal(again.module(IMAGES), model.module(IMAGES))
    assert (again.source, again.preprocessing, again.labels) == (
        model.source,
        model.preprocessing,
        model.labels,
    )
    assert (again.scheme, again.method, again.calibration, again.reports) == (
        model.scheme,
        model.method,
        model.calibration,
        model.reports,
    )


def stored(linear: QuantLinear) -> dict[str, tuple[str, object]]:
    """The tensors of a linear as the file has them, with the bytes of those types that Python has
    no numbers for."""

    def told(tensor: Tensor) -> object:
        return (
            tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor
        ).tolist()

    tensors = tensors_of(nn.ModuleDict({"fc": linear}))
    return {
        name.removeprefix("fc."): (str(tensor.dtype).removeprefix("torch."), told(tensor))
        for name, tensor in tensors.items()
    }


CODES = torch.tensor([[3, -4, -1, 0], [0, 1, 2, -3]], dtype=torch.int8)
PACKED = (
    "uint8",
    [0b00_11_00_11, 0b01_10_01_00, 0b1000_0110],
)  # the low two bits of each code, then the high ones
SHAPE = ("int64", [2, 4])


def test_the_tensors_of_a_linear_are_these_bytes():
    """Pins format version 8: change this test only together with FORMAT_VERSION."""
    spec = ActivationSpec(8)
    quantizer = ActivationQuantizer(
        spec, Grid(torch.tensor(0.5), torch.tensor(7.0), *spec.code_range)
    )
    scale, zero_point = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1], [2]], dtype=torch.int8)
    weight = QuantizedWeight(WeightSpec(3), CODES, scale, zero_point)
    linear = QuantLinear(weight, torch.tensor([5.0, 6.0]), quantizer)
    assert stored(linear) == {
        "weight_packed": PACKED,
        "weight_scale": ("float32", [[1.0], [2.0]]),
        "weight_zero_point": ("int8", [[-1], [2]]),
        "weight_shape": SHAPE,
        "bias": ("float32", [5.0, 6.0]),
        "input_scale": ("float32", 0.5),
        "input_zero_point": ("uint8", 7),
    }


def test_the_tensors_of_a_linear_with_groups_and_per_token_inputs_are_these_bytes():
    """Pins format version 8."""
    quantizer = ActivationQuantizer(ActivationSpec(4, "per-token"), torch.tensor(0.95))
    scale, zero_point = (
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[0, 1], [2, 3]], dtype=torch.int8),
    )
    weight = QuantizedWeight(WeightSpec(3, 2), CODES, scale, zero_point)
    assert stored(QuantLinear(weight, None, quantizer)) == {
        "weight_packed": PACKED,
        "weight_scale": ("float32", [[1.0, 2.0], [3.0, 4.0]]),
        "weight_zero_point": ("int8", [[0, 1], [2, 3]]),
        "weight_shape": SHAPE,
        "input_clip": ("float32", pytest.approx(0.95)),
    }


def test_the_smoothing_of_a_linears_input_is_these_bytes():
    """Pins format version 8."""
    quantizer = ActivationQuantizer(
        ActivationSpec(4, "per-token"), torch.tensor(0.5), torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    scale, zero_point = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1, dtype=torch.int8)
    weight = QuantizedWeight(WeightSpec(3, None, "symmetric"), CODES, scale, zero_point)
    assert stored(QuantLinear(weight, None, quantizer)) == {
        "weight_packed": PACKED,
        "weight_scale": ("float32", [[1.0], [2.0]]),
        "weight_shape": SHAPE,
        "input_clip": ("float32", 0.5),
        "input_smoothing": ("float32", [1.0, 2.0, 3.0, 4.0]),
    }


def test_symmetric_linears_have_no_zero_points_and_mxint_scales_are_bytes():
    """Pins format version 8."""
    scale, zero_point = torch.tensor([[0.125], [2.0]]), torch.zeros(2, 1, dtype=torch.int8)
    symmetric = QuantizedWeight(WeightSpec(3, None, "symmetric"), CODES, scale, zero_point)
    assert stored(QuantLinear(symmetric, None, None)) == {
        "weight_packed": PACKED,
        "weight_scale": ("float32", [[0.125], [2.0]]),
        "weight_shape": SHAPE,
    }
    mxint = QuantizedWeight(WeightSpec(3, 32, "mxint"), CODES, scale, zero_point)
    assert stored(QuantLinear(mxint, None, None)) == {
        "weight_packed": PACKED,
        "weight_scale": ("float8_e8m0fnu", [[124], [128]]),
        "weight_shape": SHAPE,
    }


def test_the_tensors_of_a_low_rank_branch_are_these_bytes():
    """Pins format version 8."""
    scale, zero_point = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1, dtype=torch.int8)
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    halves = LowRank(StoredFactor(left.half()), StoredFactor(right.half()))
    integers = LowRank(
        StoredFactor(left.to(torch.int8), left[:1]),
        StoredFactor(right.to(torch.int8), right[:, :1]),
    )
    weight = QuantizedWeight(WeightSpec(3, None, "symmetric"), CODES, scale, zero_point)
    with_halves, with_integers = (
        stored(QuantLinear(weight, None, None, branch)) for branch in (halves, integers)
    )
    common = {
        "weight_packed": PACKED,
        "weight_scale": ("float32", [[1.0], [2.0]]),
        "weight_shape": SHAPE,
    }
    assert with_halves == {
        **common,
        "lowrank_left": ("float16", [[1], [2]]),
        "lowrank_right": ("float16", [[3, 4, 5, 6]]),
    }
    assert with_integers == {
        **common,
        "lowrank_left": ("int8", [[1], [2]]),
        "lowrank_right": ("int8", [[3, 4, 5, 6]]),
        "lowrank_left_scale": ("float32", [[1.0]]),
        "lowrank_right_scale": ("float32", [[3.0]]),
    }


def test_the_tensors_of_salient_columns_are_these_bytes():
    """Pins format version 8."""
    scale, zero_point = torch.tensor([[0.25], [0.5]]), torch.zeros(2, 1, dtype=torch.int8)
    # 4 q in the columns 0 and 2; 8 r + s + 4 in the columns 1 and 3, with r from CODES and s below.
    second = torch.tensor([[-4, 3], [0, -1]], dtype=torch.int32)
    joint = 4 * CODES.int()
    joint[:, [1, 3]] = 8 * CODES[:, [1, 3]].int() + second + 4
    columns = torch.tensor([1, 3], dtype=torch.int32)
    weight = QuantizedWeight(
        WeightSpec(3, None, "symmetric"), joint.to(torch.int8), scale, zero_point, columns
    )
    assert stored(QuantLinear(weight, None, None)) == {
        "weight_packed": PACKED,
        # -4, 3, 0, -1: the low two bits of each code, then the high ones.
        "salient_packed": ("uint8", [0b11_00_11_00, 0b1001]),
        "salient_columns": ("int32", [1, 3]),
        "weight_scale": ("float32", [[0.25], [0.5]]),
        "weight_shape": SHAPE,
    }


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    save(quantized(vit(), IMAGES, "W4A8", "marr"), folder)
    return folder


def test_config_and_report_hold_what_the_format_promises(artifact: Path):
    config = read_config(artifact)
    assert config["format"] == "marrq.artifact"
    assert config["format_version"] == 8
    keys = {
        "format",
        "format_version",
        "model",
        "preprocessing",
        "labels",
        "scheme",
        "method",
        "calibration",
        "widths",
        "refinement",
        "versions",
        "tensors_sha256",
    }
    assert set(config) == keys
    reports = json.loads((artifact / "quantization.json").read_text())
    assert len(reports) == 8
    for report in reports:
        assert {step["half"] for step in report["trajectory"]} == {0, 1}
        assert 0 <= report["alpha"] <= 1.5
    with safe_open(artifact / "model.safetensors", "pt") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118  (safe_open is no dict)
        assert "blocks.0.attn.qkv.weight" not in file.keys()  # noqa: SIM118
    assert is_artifact(artifact)
    assert not is_artifact(artifact.parent)


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_tensors_are_refused(copied: Path, keep: float):
    file = copied / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(MarrqError, match="is damaged"):
        load(copied)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "quantization.json"])
def test_a_missing_file_is_refused(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(MarrqError, match=r"is damaged|is no artifact"):
        load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 3}'])
def test_a_config_that_is_none_is_refused(copied: Path, text: str):
    (copied / "config.json").write_text(text)
    with pytest.raises(MarrqError, match="is damaged"):
        load(copied)


@pytest.mark.parametrize(
    "key", ["scheme", "method", "calibration", "widths", "preprocessing", "labels"]
)
def test_a_config_that_lacks_something_is_refused(copied: Path, key: str):
    config = json.loads((copied / "config.json").read_text())
    del config[key]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(MarrqError, match=f"is damaged .*{key}"):
        load(copied)


def test_a_flipped_bit_is_noticed(copied: Path):
    file = copied / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MarrqError, match="not what was saved"):
        load(copied)


@pytest.mark.parametrize(
    ("version", "advice"), [(7, "quantize the model again"), (9, "upgrade marrq")]
)
def test_another_version_is_refused_with_what_to_do(copied: Path, version: int, advice: str):
    edit_config(copied, format_version=version)
    with pytest.raises(
        MarrqError, match=f"has format version {version}, this marrq reads 8: {advice}"
    ):
        load(copied)


def test_an_existing_output_is_kept_unless_replacing_is_asked_for(tmp_path: Path):
    folder = tmp_path / "a"
    save(tiny("W4A8"), folder)
    first, other = artifact_hash(folder), tiny("W2A8")
    with pytest.raises(MarrqError, match="exists"):
        save(other, folder)
    assert artifact_hash(folder) == first
    save(other, folder, overwrite=True)
    assert artifact_hash(folder) != first
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("marrq.files.flush", full)
    with pytest.raises(
        MarrqError, match=r"cannot write artifact .*No space left on device; make room"
    ):
        save(tiny("W4A8"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_or_was_killed_keeps_what_it_was_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tiny("W4A8"), tmp_path / "a")
    before = artifact_hash(tmp_path / "a")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.name == ".a.unfinished":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(MarrqError, match="Input/output error"):
        save(tiny("W3A8"), tmp_path / "a", overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert artifact_hash(tmp_path / "a") == before
    (tmp_path / "a").rename(tmp_path / ".a.replaced")  # as a kill at that moment leaves it
    (tmp_path / ".a.unfinished").mkdir()

    def unreadable(module: nn.Module) -> dict[str, Tensor]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("marrq.artifact.folder.tensors_of", unreadable)
    with pytest.raises(MarrqError, match="Input/output error"):
        save(tiny("W3A8"), tmp_path / "a", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensors_that_share_memory_are_saved_each(tmp_path: Path):
    model = quantized(vit(), noise(4), "W4A8", "rtn")
    blocks = model.module.blocks
    # One norm for two blocks, as CoaT has one position encoding for the blocks of a stage.
    blocks[1].norm1 = blocks[0].norm1
    save(model, tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    assert torch.equal(again.module(noise(2)), model.module(noise(2)))


def test_the_same_run_gives_the_same_hash(tmp_path: Path):
    for name in ("a", "b"):
        save(quantized(vit(), IMAGES, "W3A8", "gptaq"), tmp_path / name)
    assert artifact_hash(tmp_path / "a") == artifact_hash(tmp_path / "b")
