"""Small models and images that the tests share."""

import json
import os
from pathlib import Path

# Two workers of pytest-xdist on two cores must not start two threads each. OpenMP reads this when
# torch is imported, in this process and in those that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from kept_registry import keep_registry
from PIL import Image
from safetensors.torch import load_file, save_file

from marrq.cli import main

# Tests export dozens of models in a process.
keep_registry()

CLASSES = ["cat", "dog", "eel"]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests that all its workers see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm checkpoint folder of a ViT with random weights: 2 blocks, 48 wide, 32 px."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(CLASSES), **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    settings = {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": len(CLASSES),
        "model_args": arguments,
        "label_names": CLASSES,
        "pretrained_cfg": {
            **settings,
            "custom_load": False,
            "num_classes": len(CLASSES),
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> str:
    """The tiny model's name."""
    return f"local-dir:{tiny_folder}"


@pytest.fixture(scope="session")
def embedder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the tiny model without its head: it gives embeddings."""
    folder = tmp_path_factory.mktemp("embedder")
    config = json.loads((tiny_folder / "config.json").read_text())
    del config["label_names"]
    config |= {"num_classes": 0, "pretrained_cfg": config["pretrained_cfg"] | {"num_classes": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(tiny_folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    save_file(kept, folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ with 8 random images in each of 3 classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def demo_artifact(shared_folder: Path) -> Path:
    """The demo quantized by the command line with its default method on few images.

    Made by the first worker that asks for it. Tests that change it work on a copy.
    """
    folder = shared_folder / "demo" / "artifact"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(shared_folder / "demo.lock"):
        if not folder.exists():
            assert main(["quantize", "demo", "--samples", "64", "-o", str(folder)]) == 0
    return folder
