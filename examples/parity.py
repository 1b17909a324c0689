"""How far the exported graph is from torch's simulation, beside how far ONNX Runtime is from itself when it only fuses other operators.

    python examples/parity.py ARTIFACT MODEL.onnx --data IMAGES --images 300

All of them compute with the same integer codes. What differs is the rounding of float sums between the integer products, and whether an
activation that lies halfway between two codes falls to one or the other; what that does to the logits depends on the model. How much is
shown by torch against itself, with every input value changed by about a millionth of itself, quantized and in floating point. Prints JSON:
the least and the median cosine of the logits per image, and the share of images with the same top-1.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import torch
import typer

from marrq.artifact import load
from marrq.data import find_images
from marrq.models import load_source


def main(artifact: Path, file: Path, data: Annotated[str, typer.Option()], images: int = 300) -> None:
    model = load(artifact)
    drawn = find_images(data, "val", model.labels).draw(images, 0)
    levels = {"onnxruntime": ort.GraphOptimizationLevel.ORT_ENABLE_ALL, "onnxruntime_unfused": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC}
    sessions = {name: open_session(file, level) for name, level in levels.items()}
    modules = {"torch": model.module, "float": load_source(model.source).module}
    logits: dict[str, list[np.ndarray]] = {name: [] for name in (*modules, "torch_nudged", "float_nudged", *sessions)}
    generator = torch.Generator().manual_seed(0)
    for pixels, _ in drawn.batches(model.preprocessing, 50):
        nudged = pixels * (1 + 1e-6 * torch.randn(pixels.shape, generator=generator))
        with torch.no_grad():
            for name, module in modules.items():
                logits[name].append(module(pixels).numpy())
                logits[f"{name}_nudged"].append(module(nudged).numpy())
        for name, session in sessions.items():
            logits[name].append(session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0])
    joined = {name: np.concatenate(parts) for name, parts in logits.items()}
    pairs = [(name, "onnxruntime") for name in ("torch", "onnxruntime_unfused")] + [(f"{name}_nudged", name) for name in modules]
    report = {f"{one} to {other}": compare(joined[one], joined[other]) for one, other in pairs}
    typer.echo(json.dumps({"images": images, **report}, indent=2))


def open_session(file: Path, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "least_cosine": round(float(cosine.min()), 6),
        "median_cosine": round(float(np.median(cosine)), 6),
        "same_top1": round(float((a.argmax(1) == b.argmax(1)).mean()), 4),
    }


if __name__ == "__main__":
    typer.run(main)
