"""A model repository whose ONNX files are exported once."""

from pathlib import Path

import pytest
from flavor_files import Prepared
from tiny_models import noise, quantized, vit

from exporters.onnx_file import write
from exporters.trace import trace_quantized
from exporters.triton.repository import write_repository
from exporters.triton.serving import Serving


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A tiny model of five classes."""
    folder = tmp_path_factory.mktemp("prepared")
    traced = trace_quantized(quantized(vit(), noise(8), "W4A8", "rtn"), "hash")
    files = {takes_images: folder / f"{takes_images}.onnx" for takes_images in (False, True)}
    for takes_images, file in files.items():
        write(traced, "integer", file, takes_images=takes_images)
    return Prepared(traced.model, "hash", "integer", files=files)


@pytest.fixture
def repository(prepared: Prepared, tmp_path: Path) -> Path:
    """A repository with the model `digits`, which a test may change."""
    write_repository(prepared, tmp_path / "repository", Serving("digits"))
    return tmp_path / "repository"
