"""Files of tiny models in every flavour, and how their logits compare with torch's."""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from _pytest.mark import ParameterSet
from onnx import numpy_helper
from tiny_models import noise, quantized, swin, vit

from exporters.onnx_file import Export
from exporters.trace import TracedModel, trace_quantized
from marrq.quantized_model import QuantizedModel
from marrq.schemes import ActivationStrategy
from runtime.audit.cuda_operators import has_kernel
from runtime.audit.graph import Graph
from runtime.session import SessionSettings, executed_nodes

MODELS = {"vit": vit, "vit with LayerScale": partial(vit, init_values=1e-5, depth=1), "swin": swin}
"""Swin has linears of 24 inputs, windows, and four axes. It takes longest to trace."""


def slow(*values: object) -> ParameterSet:
    """A case that `pytest` alone leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def traced(
    model: str,
    scheme: str,
    lowrank: str | None = None,
    strategy: ActivationStrategy = "per-tensor",
) -> TracedModel:
    """A tiny model, quantized and traced once for all tests that ask for the same."""
    return _traced(model, scheme, lowrank, strategy)


@cache
def _traced(
    model: str, scheme: str, lowrank: str | None, strategy: ActivationStrategy
) -> TracedModel:
    method = "gptq" if lowrank is None else f"gptq,lowrank={lowrank}"
    made = quantized(MODELS[model](), noise(8), scheme, method, strategy=strategy)
    return trace_quantized(made, "hash")


def session(file: Path, level: str | None = None) -> ort.InferenceSession:
    """level: accuracy level of the MatMulNBits that ONNX Runtime makes of DequantizeLinear →
    MatMul."""
    options = ort.SessionOptions()
    if level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def cosines(model: QuantizedModel, file: Path, level: str | None = None) -> np.ndarray:
    """Of torch's logits and ONNX Runtime's, for 32 images, ascending."""
    pixels = noise(32, seed=1)
    with torch.no_grad():
        a = model.module(pixels).numpy()
    b = session(file, level).run(None, {"pixels": pixels.numpy()})[0]
    return np.sort((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def agree(model: QuantizedModel, file: Path, level: str | None = None) -> bool:
    """Whether logits are the same. A quantized activation that falls between two codes may go to
    either side, and torch does the same under a nudge of a millionth. How often depends on the
    order in which a processor sums; that may be seen in one image of ten."""
    found = cosines(model, file, level)
    alike = (found >= 0.9999).mean()
    return bool(alike >= (0.9 if model.scheme.activation else 1) and np.median(found) >= 0.99999)


def executed_operators(file: Path, settings: SessionSettings, scratch: Path) -> Counter[str]:
    """How often each operator ran in one forward."""
    return Counter(node.operator for node in executed_nodes(file, settings, scratch))


def initializers(file: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer
    }


def metadata(file: Path) -> dict[str, str]:
    return {
        entry.key.removeprefix("marrq."): entry.value for entry in onnx.load(file).metadata_props
    }


def without_kernel(file: Path) -> list[str]:
    """The nodes of a file for GPUs that the CUDA provider has no kernel for, constants and
    arithmetic on shapes left out, as `Pad-19(float16)`."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(file))
    graph = Graph(inferred)
    opset = {entry.domain: entry.version for entry in inferred.opset_import}[""]
    return [
        f"{node.op_type} of {opset} ({', '.join(types)})"
        for node in graph.depending_on_images
        if not has_kernel(node, opset, types := [graph.type_of(name) for name in node.input])
    ]


@dataclass(frozen=True)
class Prepared(Export):
    """An export whose files were written before, so that only the repository is made.

    files: by whether the model takes images.
    """

    files: Mapping[bool, Path] = field(default_factory=dict)

    def write(self, path: Path, takes_images: bool = False) -> None:
        path.parent.mkdir(parents=True)
        shutil.copy(self.files[takes_images], path)
