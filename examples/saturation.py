"""Do files of each scheme give the simulation's outputs on processors with VNNI and without?

    python examples/saturation.py write OUT                           # quantize, export, simulate
    python examples/saturation.py times OUT > times.json              # on this processor
    python examples/saturation.py cosines OUT > vnni.json             # on this processor
    valgrind --tool=none python examples/saturation.py cosines OUT > avx2.json     # on AVX2 alone

`write` makes a ViT of 2 blocks, 192 wide, for 64 pixels, with random weights, quantizes it to
several schemes with the method rtn on noise, and exports each as `integer` and `qdq`. Beside the
schemes of marrq stands W8A8 with weight codes in the whole of -128 … 127, as other tools write
them. The pixels of 8 images, and the logits of each simulation in torch on them, are written beside
the files.

`cosines` runs the files and compares logits: the least cosine over the images, and the share of
images with the same class. It needs onnxruntime and numpy alone, so that Valgrind, which emulates a
processor with AVX2 and without AVX-512 and VNNI, is done in minutes. `times` measures one image on
one thread, as a ratio to the float model: the median over interleaved rounds. `marrq doctor` tells
which kind of processor a machine has, under `int8 products`.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy._core._multiarray_umath import __cpu_features__ as cpu_features
from numpy.typing import NDArray

FULL_RANGE = "W8A8 with full range"
SCHEMES = ("W8A8", "W4A8-e8", "W4A8", "W2A8", FULL_RANGE)
FLAVORS = ("integer", "qdq")
FLOAT = "fp32"
IMAGES, CALIBRATION = 8, 16
FEATURES = ("AVX2", "AVX512F", "AVX512VNNI")
SCHEMA = "marrq.saturation/1"
ARCHITECTURE, CLASSES = "vit_tiny_patch16_224", 10
SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}


def write(folder: Path) -> None:
    """Quantize and export every scheme, and simulate each in torch."""
    import torch

    import marrq
    from exporters.onnx_file import write_baseline
    from marrq.models.images import find_images
    from marrq.schemes import ActivationSpec, Scheme, WeightSpec, parse_scheme

    folder.mkdir(parents=True)
    model = marrq.load_model(f"local-dir:{_checkpoint(folder / 'checkpoint')}")
    # The operators that other tools know.
    write_baseline(model, FLOAT, folder / f"{FLOAT}.onnx", {"fuse": False})
    images = find_images(str(_noise(folder / "images")), "train", model.labels)
    pixels = images.pixels(model.preprocessing)[:IMAGES]
    np.save(folder / "pixels.npy", pixels.numpy())
    for name in SCHEMES:
        # The one that `parse_scheme` does not offer, because of what this script shows.
        full = Scheme(WeightSpec(8), ActivationSpec(8))
        scheme = full if name == FULL_RANGE else parse_scheme(name)
        made = marrq.quantize(model, images, scheme=scheme, method="rtn", samples=CALIBRATION)
        with torch.no_grad():
            np.save(folder / f"{name}.npy", made.module(pixels).numpy())
        for flavor in FLAVORS:
            marrq.export(made, folder / f"{name}.{flavor}.onnx", flavor=flavor)


def _checkpoint(folder: Path) -> Path:
    """A checkpoint of timm with random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = timm.create_model(ARCHITECTURE, num_classes=CLASSES, **SHAPE)
    with torch.no_grad():
        for parameter in module.parameters():
            # Large enough that every block moves its input.
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    folder.mkdir()
    save_file(module.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, SHAPE["img_size"], SHAPE["img_size"]]}
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": CLASSES,
        "model_args": SHAPE,
        "label_names": [f"class {number}" for number in range(CLASSES)],
        "pretrained_cfg": {**pretrained, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _noise(folder: Path) -> Path:
    """Images of noise: what saturates the sums is a matter of the numbers, not of the picture."""
    from PIL import Image

    generator, side = np.random.default_rng(0), SHAPE["img_size"]
    folder.mkdir()
    for number in range(CALIBRATION):
        array = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number:03}.png")
    return folder


def opened(file: Path) -> ort.InferenceSession:
    """A file under ONNX Runtime with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def cosines(folder: Path) -> list[dict[str, Any]]:
    """A row for each file: how near its logits are to those of the simulation."""
    pixels, rows = np.load(folder / "pixels.npy"), []
    for scheme, flavor, file in files(folder):
        expected = np.load(folder / f"{scheme}.npy").astype(np.float64)
        session = opened(file)
        name = session.get_inputs()[0].name
        found = np.concatenate([session.run(None, {name: image[None]})[0] for image in pixels])
        product = (expected * found).sum(1)
        sizes = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
        row = {"scheme": scheme, "flavor": flavor, "least_cosine": float((product / sizes).min())}
        same = float((expected.argmax(1) == found.argmax(1)).mean())
        rows.append({**row, "same_class": same})
    return rows


def files(folder: Path) -> list[tuple[str, str, Path]]:
    """Scheme, flavour and place of each file."""
    return [
        (scheme, flavor, folder / f"{scheme}.{flavor}.onnx")
        for scheme in SCHEMES
        for flavor in FLAVORS
    ]


def times(folder: Path, rounds: int, runs: int) -> list[dict[str, Any]]:
    """A row for each file: time of one image, as a ratio to the float model's in the same round."""
    image = np.load(folder / "pixels.npy")[:1]
    measured: dict[tuple[str, str], list[float]] = {}
    named = [(FLOAT, FLOAT, folder / f"{FLOAT}.onnx"), *files(folder)]
    sessions = {(scheme, flavor): opened(file) for scheme, flavor, file in named}
    for _ in range(rounds):
        for key, session in sessions.items():
            measured.setdefault(key, []).append(_least_ms(session, image, runs))
    base = measured[FLOAT, FLOAT]
    return [
        {
            "scheme": scheme,
            "flavor": flavor,
            "ms": statistics.median(by_round),
            "ratio": statistics.median(map(float.__truediv__, by_round, base)),
        }
        for (scheme, flavor), by_round in measured.items()
    ]


def _least_ms(session: ort.InferenceSession, image: NDArray, runs: int) -> float:
    """The least processor time of a run: other work on the machine does not count in it."""
    name, least = session.get_inputs()[0].name, float("inf")
    for _ in range(runs):
        start = time.thread_time()
        session.run(None, {name: image})
        least = min(least, 1e3 * (time.thread_time() - start))
    return least


def processor() -> str:
    """The processor's name as Linux gives it. It is that of the machine under Valgrind too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="Exactness on processors without VNNI.")
    parser.add_argument("measure", choices=("write", "cosines", "times"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=30, help="of a round, for each file")
    options = parser.parse_args()
    if options.measure == "write":
        write(options.folder)
        return
    if options.measure == "cosines":
        rows = cosines(options.folder)
    else:
        rows = times(options.folder, options.rounds, options.runs)
    environment = {
        "processor": processor(),
        "features": [feature for feature in FEATURES if cpu_features.get(feature)],
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
    }
    report = {"schema": SCHEMA, "measure": options.measure, "environment": environment}
    print(json.dumps({**report, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
