"""Every linear of a mixed scheme has its own bits, in the model, the artifact and the record;
widths that do not fit are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WIDTHS, noise, quantized, transformers_vit, vision_model, vit

from marrq.artifact.folder import load, save
from marrq.artifact.scheme import read_scheme
from marrq.errors import MarrqError
from marrq.methods.spec import parse_method
from marrq.pipeline.quantize import RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import parse_scheme

IMAGES = noise(6)


def settings(scheme: str, widths: dict[str, Any]) -> QuantizationSettings:
    calibration = CalibrationRecord("noise", len(IMAGES), 0, "")
    return QuantizationSettings(parse_scheme(scheme), parse_method("gptq"), calibration, widths)


@pytest.mark.parametrize("scheme", ["WmixA8", "WmixA16-g16-sym", "WmixA4-mxint-e8"])
def test_each_linear_has_its_own_bits_and_an_artifact_gives_them_back(scheme: str, tmp_path: Path):
    model = quantized(vit(), IMAGES, scheme, "gptq")
    found = {path: linear.spec for path, linear in quantized_linears(model.module).items()}
    assert {path: found[path].num_bits for path in WIDTHS} == WIDTHS
    # All else is the scheme's, and what is outside the blocks has 8 bits.
    parsed = parse_scheme(scheme)
    assert all(found[path] == parsed.of_width(bits).weight for path, bits in WIDTHS.items())
    assert {found[path].num_bits for path in found.keys() - WIDTHS.keys()} <= {8}
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert (again.scheme, again.widths) == (model.scheme, WIDTHS)
    assert read_scheme(tmp_path / "a") == parsed
    with torch.no_grad():
        assert torch.equal(again.module(IMAGES), model.module(IMAGES))


def test_one_width_for_all_gives_the_codes_of_the_uniform_scheme():
    mixed = quantize(
        vision_model(vit()),
        IMAGES,
        settings("WmixA8", dict.fromkeys(WIDTHS, 3)),
        RunOptions(torch.device("cpu")),
    )
    uniform = quantized(vit(), IMAGES, "W3A8", "gptq")
    for path, linear in quantized_linears(uniform.module).items():
        assert torch.equal(linear.codes, mixed.module.get_submodule(path).codes)


@pytest.mark.parametrize(
    ("scheme", "widths", "sentence"),
    [
        ("WmixA8", {}, "give a budget of bits"),
        ("W4A8", WIDTHS, "has one width for all linears"),
        ("WmixA8", {**WIDTHS, "blocks.0.mlp.fc1": 5}, "must be one of 2, 3, 4, 8: got 5"),
        ("WmixA8", {**WIDTHS, "blocks.0.mlp.fc1": True}, "got True"),
        ("WmixA8", {**WIDTHS, "blocks.0.mlp.fc1": 4.0}, r"got 4\.0"),
    ],
)
def test_settings_refuse_widths_that_are_none(scheme: str, widths: dict[str, Any], sentence: str):
    with pytest.raises(MarrqError, match=sentence):
        settings(scheme, widths)


@pytest.mark.parametrize(
    ("build", "widths", "sentence"),
    [
        (vit, {**WIDTHS, "head": 4}, "head has weight bits, but is not quantized"),
        (vit, {"blocks.0.attn.qkv": 4}, "has no weight bits"),
        (transformers_vit, None, "share an input but not their weight bits"),
    ],
)
def test_a_run_refuses_widths_of_another_model(
    build: Any, widths: dict[str, int] | None, sentence: str
):
    if widths is None:
        uniform = quantized(build(), IMAGES, "W4A8", "rtn")
        widths = dict.fromkeys(quantized_linears(uniform.module), 4)
        widths[next(path for path in widths if path.endswith(("key", "k_proj")))] = 3
    with pytest.raises(MarrqError, match=sentence):
        quantize(
            vision_model(build()),
            IMAGES,
            settings("WmixA8", widths),
            RunOptions(torch.device("cpu")),
        )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "tiny"
    save(quantized(vit(), IMAGES, "WmixA8", "rtn"), folder)
    return folder


@pytest.mark.parametrize(
    "widths",
    [
        {},
        [],
        4,
        None,
        list(WIDTHS.items()),
        {**WIDTHS, "blocks.0.mlp.fc1": 4},
        {**WIDTHS, "blocks.0.mlp.fc1": "3"},
        {**WIDTHS, "blocks.0.mlp.fc1": 3.0},
        {**WIDTHS, "blocks.0.mlp.fc1": True},
        {**WIDTHS, "blocks.0.mlp.fc1": None},
        {**WIDTHS, "blocks.0.mlp.fc1": -3},
        {**WIDTHS, "blocks.0.mlp.fc1": 10**30},
        {**WIDTHS, "blocks.9.mlp.fc1": 3},
        {**WIDTHS, "head": 8},
        {path: bits for path, bits in WIDTHS.items() if path != "blocks.0.mlp.fc1"},
    ],
)
def test_an_artifact_with_other_widths_is_refused(artifact: Path, tmp_path: Path, widths: object):
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "widths": widths}))
    with pytest.raises(MarrqError, match="is damaged"):
        load(folder)


@pytest.mark.parametrize("mixed", [False, "yes", 1, None])
def test_an_artifact_with_a_scheme_that_is_not_its_own_is_refused(
    artifact: Path, tmp_path: Path, mixed: object
):
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    config = json.loads((folder / "config.json").read_text())
    scheme = {**config["scheme"], "mixed": mixed}
    (folder / "config.json").write_text(json.dumps({**config, "scheme": scheme}))
    with pytest.raises(MarrqError, match="is damaged"):
        load(folder)
