"""Classes in exported files: the head stays in float32 in every flavour, large features do not
overflow there, and the class embeddings are read back as they were given."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from flavor_files import slow
from tiny_models import noise, quantized, vision_model, vit

from exporters.classes import classes_in
from exporters.onnx_file import write, write_baseline
from exporters.trace import TracedModel, trace_quantized
from marrq.errors import MarrqError
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.load import VisionModel
from marrq.zero_shot import HEAD, with_classes
from runtime.session import Model, SessionSettings

DIM, COUNT = 64, 7


def classes(scale: float = 100.0, bias: float = -10.0) -> ClassEmbeddings:
    rows = np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return ClassEmbeddings(tuple(map(str, range(COUNT))), rows, scale, bias)


def embedder(size: float = 1.0) -> VisionModel:
    """A model of one block that gives features, about as large as `size` says."""
    module = vit(num_classes=0, depth=1)
    with torch.no_grad():
        for parameter in module.norm.parameters():
            parameter *= size
    return replace(vision_model(module), labels=(), outputs=("features",))


@cache
def traced(scheme: str) -> TracedModel:
    """A quantized model with classes."""
    made = quantized(vit(num_classes=0, depth=1), noise(8), scheme, "rtn")
    made = replace(made, labels=(), outputs=("features",))
    return trace_quantized(with_classes(made, classes()), "hash")


@pytest.mark.parametrize(
    ("flavor", "scheme"),
    [
        ("integer", "W4A8"),
        slow("qdq", "W4A8"),
        slow("matmulnbits", "W4A16"),
        slow("folded", "W4A16"),
    ],
)
def test_a_quantized_file_gives_the_logits_of_torch_and_the_classes_back(
    flavor: str, scheme: str, tmp_path: Path
):
    one, file = traced(scheme), tmp_path / "model.onnx"
    write(one, flavor, file)
    with torch.no_grad():
        expected = one.model.module(noise(4)).numpy()
    found = Model(file, SessionSettings()).run(noise(4).numpy())
    # Of logits that are up to 100 apart; float16 features have eleven bits.
    np.testing.assert_allclose(found, expected, atol=0.5 if flavor == "folded" else 0.1)
    assert classes_in(file).sha256 == classes().sha256
    assert_head_is_float32(file)


@pytest.mark.parametrize(
    ("flavor", "size"), [slow("fp32", 1.0), slow("fp16", 1.0), slow("fp32", 1e4), ("fp16", 1e4)]
)
def test_a_float_file_is_finite_with_large_features(flavor: str, size: float, tmp_path: Path):
    model, file = with_classes(embedder(size), classes()), tmp_path / "model.onnx"
    write_baseline(model, flavor, file)
    with torch.no_grad():
        features, expected = embedder(size).module(noise(4)), model.module(noise(4)).numpy()
    # Each number fits into float16, and the sum of their squares does not.
    assert size == 1 or (features.abs().max() < 60_000 and (features**2).sum(1).min() > 70_000)
    found = Model(file, SessionSettings()).run(noise(4).numpy())
    np.testing.assert_allclose(found, expected, atol=1e-4 if flavor == "fp32" else 0.5)
    assert classes_in(file).sha256 == classes().sha256
    assert_head_is_float32(file)


def assert_head_is_float32(file: Path) -> None:
    """The norm, the division, and the product with the embeddings."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    types = {one.name: one.type.tensor_type.elem_type for one in graph.value_info}
    types |= {one.name: one.data_type for one in graph.initializer}
    weight = f"{HEAD}.weight"
    [product] = [node for node in graph.node if weight in node.input]
    [norm] = [node for node in graph.node if node.op_type == "ReduceL2"]
    named = [*product.input, norm.input[0], norm.output[0]]
    assert {types[name] for name in named} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (1.0, -3.0), (20.0, 0.0)])
def test_a_factor_of_1_and_a_bias_of_0_come_back_too(scale: float, bias: float, tmp_path: Path):
    given = classes(scale, bias)
    write_baseline(with_classes(embedder(), given), "fp32", tmp_path / "model.onnx")
    found = classes_in(tmp_path / "model.onnx")
    assert (found.logit_scale, found.logit_bias) == (scale, bias)
    assert found.sha256 == given.sha256


def test_a_file_without_classes_has_none_and_a_changed_one_is_refused(tmp_path: Path):
    file = tmp_path / "model.onnx"
    write_baseline(embedder(), "fp32", file)
    assert classes_in(file) is None
    # Somebody claims classes that the graph does not have.
    model = onnx.load(file)
    model.metadata_props.add(key="marrq.classes", value="0" * 64)
    onnx.save(model, file)
    with pytest.raises(MarrqError, match="cannot be read"):
        classes_in(file)


@pytest.mark.slow
def test_embeddings_that_were_changed_in_the_file_are_refused(tmp_path: Path):
    file = tmp_path / "model.onnx"
    write_baseline(with_classes(embedder(), classes()), "fp32", file)
    model = onnx.load(file)
    [weight] = [one for one in model.graph.initializer if one.name == f"{HEAD}.weight"]
    weight.CopyFrom(onnx.numpy_helper.from_array(-classes().embeddings, weight.name))
    onnx.save(model, file)
    with pytest.raises(MarrqError, match="not those that it was exported with"):
        classes_in(file)
