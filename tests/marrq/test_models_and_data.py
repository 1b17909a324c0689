"""Models come with their own preprocessing and labels; data errors name the file."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from marrq.errors import MarrqError
from marrq.models.images import find_images
from marrq.models.load import build, load_model, load_source
from marrq.models.preprocessing import Preprocessing
from marrq.workflows.checks import check_model


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


@pytest.fixture
def transformers_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    config = ViTConfig(
        **sizes, id2label={0: "cat", 1: "dog", 2: "eel"}, label2id={"cat": 0, "dog": 1, "eel": 2}
    )
    ViTForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_demo_model_carries_labels_and_reaches_the_accuracy_it_was_trained_to(count: int):
    model = load_model("demo")
    assert model.labels == tuple("0123456789")
    assert sum(parameter.numel() for parameter in model.module.parameters()) <= 1_500_000
    images = find_images("demo", "val", model.labels)
    assert len(images) == 1000
    assert len(find_images("demo", "train", model.labels)) == 512
    drawn = images.draw(count, seed=0)
    with torch.no_grad():
        found = model.module(drawn.pixels(model.preprocessing)[:]).argmax(1)
    assert (found == torch.tensor(drawn.targets)).float().mean() >= 0.97


def test_a_timm_model_is_loaded_and_a_wrong_name_refused_without_transformers(
    tiny: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "marrq.models.transformers_models", None)
    assert load_model(tiny).source.library == "timm"
    for name in ("vit_no_such", "local-dir:/no/such/folder", "/no/such/folder", "./no_such_folder"):
        with pytest.raises(MarrqError, match=r"unknown model|does not exist"):
            load_model(name)


def test_a_timm_folder_is_preprocessed_by_timms_own_transform(tiny: str, photo: Image.Image):
    preprocessing = load_model(tiny).preprocessing
    expected = create_transform(
        (3, 32, 32), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9
    )(photo)
    assert torch.equal(preprocessing.transform()(photo), expected)


def test_preprocessing_survives_json(tiny: str):
    preprocessing = load_model(tiny).preprocessing
    assert Preprocessing.from_json(json.loads(json.dumps(asdict(preprocessing)))) == preprocessing


def test_a_transformers_folder_loads_with_labels_and_can_be_built_again(transformers_folder: Path):
    model = load_model(str(transformers_folder))
    assert model.labels == ("cat", "dog", "eel")
    again = build(model.source)
    again.load_state_dict(model.module.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(pixels), model.module(pixels))


def test_weights_that_changed_since_are_noticed(tiny_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    source = load_model(f"local-dir:{copy}").source
    assert load_source(source).source == source
    tensors = load_file(copy / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(MarrqError, match="other weights now"):
        load_source(source)


def test_weights_with_nan_are_refused_by_name(tiny_folder: Path, tmp_path: Path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MarrqError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        load_model(f"local-dir:{tmp_path}")


def test_an_onnx_file_in_the_place_of_a_model_is_told_with_what_takes_it(tmp_path: Path):
    (tmp_path / "m.onnx").touch()
    with pytest.raises(MarrqError, match="is an ONNX file, which marrq bench and marrq inspect"):
        check_model(str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("name", ["no_such_model", "local-dir:/no/such/folder", "/no/such/folder"])
def test_an_unknown_model_is_refused_by_name(name: str):
    with pytest.raises(MarrqError, match=r"no_such_model|/no/such/folder"):
        load_model(name)
