"""The input of a linear has torch's codes in the graph, token by token."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from flavor_files import agree, initializers, metadata, slow, traced
from onnx import helper
from tiny_models import noise, quantized, vit_with_strong_channels

from exporters.onnx_file import write
from exporters.trace import trace_quantized
from marrq.quantizers.linear import bits_per_weight, quantized_linears
from marrq.schemes import ActivationStrategy


@pytest.mark.parametrize(
    ("flavor", "strategy"),
    [
        ("integer", "per-token"),
        slow("integer", "per-tensor"),
        slow("qdq", "per-token"),
        slow("qdq", "per-tensor"),
    ],
)
def test_an_input_with_a_smoothing_is_multiplied_by_it_in_the_graph(
    flavor: str, strategy: ActivationStrategy, tmp_path: Path
):
    made = quantized(vit_with_strong_channels(), noise(8), "W4A4", "gptq", strategy=strategy)
    write(trace_quantized(made, "hash"), flavor, tmp_path / "m.onnx")
    assert agree(made, tmp_path / "m.onnx")
    linears = quantized_linears(made.module)
    smoothed = {
        f"{path}.input_smoothing": linear.input.smoothing
        for path, linear in linears.items()
        if linear.input.smoothing is not None
    }
    stored = {
        name: array
        for name, array in initializers(tmp_path / "m.onnx").items()
        if name.endswith("input_smoothing")
    }
    assert (
        set(stored)
        == set(smoothed)
        >= {f"blocks.{index}.mlp.fc2.input_smoothing" for index in range(2)}
    )
    assert all(np.array_equal(stored[name], smoothed[name]) for name in stored)
    assert float(metadata(tmp_path / "m.onnx")["bits_per_weight"]) == pytest.approx(
        bits_per_weight(made.module), abs=0.05
    )


@pytest.mark.parametrize("scheme", ["W4A4", slow("W4A8"), slow("W4A3")])
@pytest.mark.parametrize("flavor", ["integer", "qdq"])
def test_the_codes_of_every_token_are_torchs(flavor: str, scheme: str, tmp_path: Path):
    """The input of each linear as ONNX Runtime has it, quantized by torch, gives the graph's own
    codes: every one of them."""
    trace = traced("vit", scheme, strategy="per-token")
    made = trace.model
    write(trace, flavor, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    quantizing = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    clipped = {node.input[0]: node.output[0] for node in graph.graph.node if node.op_type == "Clip"}
    codes = [clipped.get(node.output[0], node.output[0]) for node in quantizing]
    for node, name in zip(quantizing, codes, strict=True):
        graph.graph.output.append(
            helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None)
        )
        graph.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    running = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    linears = quantized_linears(made.module)
    apart = (
        flavor == "integer"
    )  # attention is one operator there, and queries of the last block are those of the class token
    assert len(quantizing) == len(linears) + apart
    for node, name in zip(quantizing, codes, strict=True):
        x, found = running.run([node.input[0], name], {"pixels": noise(4, seed=2).numpy()})
        path = re.sub(r"\.[qkv]$", "", node.name.split("/")[0])
        quantizer = linears[path].input
        assert quantizer is not None
        x = torch.from_numpy(x)
        np.testing.assert_array_equal(found, quantizer.grid(x).quantize(x).numpy(), err_msg=path)
