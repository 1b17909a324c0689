"""What can be told of an ONNX file without running it."""

from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data


def size_bytes(file: Path) -> int:
    """The size of a model: its file, and the data beside it where tensors are kept apart."""
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    apart = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    return sum(part.stat().st_size for part in (file, *(file.parent / name for name in apart)))
