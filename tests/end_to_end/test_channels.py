"""Models that take other images than RGB, from image files to what a client of the exported file
gets; and those that are refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tiny_models import TRANSFORMERS, randomized

import marrq
from exporters.triton.config import read_config
from marrq.artifact.folder import save
from marrq.cli import main
from marrq.errors import MarrqError
from marrq.models.load import load_model
from runtime.preprocessing import ServedPreprocessing
from runtime.session import Model, SessionSettings

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def timm_folder(folder: Path, channels: int, described: int) -> str:
    """A checkpoint whose model takes `channels`; its pretrained_cfg describes another number."""
    arguments = {**VIT, "in_chans": channels}
    model = randomized(timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    numbers = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)[:described]
    pretrained = {"input_size": [described, 32, 32], "mean": numbers, "std": numbers}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": arguments,
        "pretrained_cfg": pretrained | {"interpolation": "bicubic", "crop_pct": 0.9},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def transformers_folder(folder: Path, processor: Any, channels: int = 3) -> str:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TRANSFORMERS, num_channels=channels)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def image_folder(folder: Path, mode: str) -> Path:
    random = np.random.default_rng(0)
    for index in range(6):
        pixels = random.integers(0, 256, (40 + index, 48, 4), dtype=np.uint8)
        (folder / "any").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, "RGBA").convert(mode).save(folder / "any" / f"{index}.png")
    return folder


def rescaling(**settings: Any) -> Any:
    """MobileViT's processor: blue comes first, and nothing is normalized."""
    crop = {"height": 32, "width": 32}
    return transformers.MobileViTImageProcessor(
        size={"shortest_edge": 36}, crop_size=crop, **settings
    )


def grey() -> Any:
    return transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4], image_std=[0.3]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm, RGBA", "transformers, BGR", "transformers, L"])
def test_a_client_gets_the_answers_of_the_simulation(kind: str, tmp_path: Path):
    library, mode = kind.split(", ")
    channels = {"L": 1, "RGBA": 4, "BGR": 3}[mode]
    if library == "timm":
        name = timm_folder(tmp_path / "model", channels, channels)
    else:
        processor = rescaling() if mode == "BGR" else grey()
        name = transformers_folder(tmp_path / "model", processor, channels)
    data = image_folder(tmp_path / "images", "RGB" if mode == "BGR" else mode)
    images = marrq.find_images(str(data), "train")
    quantized = marrq.quantize(load_model(name), images, "W8A8", "rtn", samples=4)
    assert quantized.preprocessing.bgr == (mode == "BGR")
    with torch.no_grad():
        expected = quantized.module(images.pixels(quantized.preprocessing)[:]).numpy()
    save(quantized, tmp_path / "artifact")
    arguments = [str(tmp_path / "artifact"), "--format", "triton", "-o", str(tmp_path / "served")]
    assert main(["export", *arguments, "--preprocess"]) == 0
    # A client knows the config, and nothing else.
    config = read_config(tmp_path / "served" / "vit" / "config.pbtxt")
    prepare = ServedPreprocessing.read(config.parameters["preprocessing"].string_value)
    pixels = np.stack([prepare.pixels(Image.open(file)) for file in images.files])
    assert list(pixels.shape[1:]) == list(config.input[0].dims)
    model = Model(tmp_path / "served" / "vit" / "1" / "model.onnx", SessionSettings())
    np.testing.assert_allclose(model.run(pixels), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("takes", "described", "message"),
    [
        (4, 3, r"mean has 3 numbers and input_size 4 channels"),
        (6, 6, r"the model takes 6 channels, and image files have 1, 3 or 4"),
    ],
)
def test_a_timm_model_with_channels_that_its_images_lack_is_refused_when_it_is_loaded(
    takes: int, described: int, message: str, tmp_path: Path
):
    with pytest.raises(MarrqError, match=message):
        load_model(timm_folder(tmp_path / "model", takes, described))


@pytest.mark.parametrize(
    ("processor", "channels", "message"),
    [
        (grey(), 2, r"takes 2 channels, and image files have 1, 3 or 4"),
        (rescaling(do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3), 1, "has 3 num"),
    ],
)
def test_a_transformers_model_with_channels_that_its_images_lack_is_refused_when_it_is_loaded(
    processor: Any, channels: int, message: str, tmp_path: Path
):
    with pytest.raises(MarrqError, match=message):
        load_model(transformers_folder(tmp_path / "model", processor, channels))


def test_an_image_without_the_fourth_channel_is_named(tmp_path: Path):
    model = load_model(timm_folder(tmp_path / "model", 4, 4))
    images = marrq.find_images(str(image_folder(tmp_path / "images", "RGB")), "train")
    with pytest.raises(MarrqError, match=r"image '.*0\.png' does not fit: the model takes 4"):
        images.pixels(model.preprocessing)[:1]


def test_an_earlier_artifact_has_the_pixels_it_was_quantized_with(tmp_path: Path):
    name = timm_folder(tmp_path / "model", 3, 3)
    images = marrq.find_images(str(image_folder(tmp_path / "images", "RGB")), "train")
    quantized = marrq.quantize(load_model(name), images, "W8A8", "rtn", samples=4)
    save(quantized, tmp_path / "artifact")
    shutil.copytree(tmp_path / "artifact", tmp_path / "earlier")
    config = json.loads((tmp_path / "earlier" / "config.json").read_text())
    config["preprocessing"] = {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": config["preprocessing"]["mean"],
        "std": config["preprocessing"]["std"],
    }
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(config))
    assert marrq.load(tmp_path / "earlier").preprocessing == quantized.preprocessing
