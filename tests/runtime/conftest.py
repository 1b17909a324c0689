"""A small quantized model and its file, which the tests of runtime share: quantized and traced
once."""

from pathlib import Path

import pytest
from tiny_models import noise, quantized, vit

from exporters.onnx_file import write
from exporters.trace import TracedModel, trace_quantized


@pytest.fixture(scope="session")
def traced_vit() -> TracedModel:
    """A ViT of two blocks, W4A8."""
    return trace_quantized(quantized(vit(), noise(8), "W4A8", "gptq"), "hash")


@pytest.fixture(scope="session")
def integer_file(traced_vit: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX file in the flavour integer."""
    file = tmp_path_factory.mktemp("runtime") / "model.onnx"
    write(traced_vit, "integer", file)
    return file
