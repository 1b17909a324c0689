"""The class embeddings in an exported file, from which the same classes can be given to the float
model again.

A model with classes (marrq/zero_shot.py) keeps its head's tensors in the graph as initializers of
their own names, in float32 in every flavour:

    zero_shot.weight [classes, dim]     zero_shot.scale [1]     zero_shot.bias [classes]
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.metadata import PREFIX, FileMetadata
from marrq.errors import MarrqError
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.zero_shot import HEAD


def classes_in(file: Path) -> ClassEmbeddings | None:
    """The class embeddings of a file that marrq exported; None if it was exported without.

    Raises MarrqError if they are not those that the file's metadata name.
    """
    # Tensors beside the file are read when they are asked for.
    model = ir.load(file)
    # Files of older exports lack entries that `FileMetadata` needs, and have no classes either.
    if f"{PREFIX}classes" not in model.metadata_props:
        return None
    metadata = FileMetadata.from_metadata_props(model.metadata_props)
    values = model.graph.initializers
    # The exporter drops a factor of 1 and a bias of 0.
    neutral = {"scale": 1.0, "bias": 0.0}
    try:
        embeddings = _tensor(values[f"{HEAD}.weight"])
        # The bias is one number, written for each class.
        scale, bias = (
            float(_tensor(values[f"{HEAD}.{part}"])[0]) if f"{HEAD}.{part}" in values else default
            for part, default in neutral.items()
        )
        found = ClassEmbeddings(metadata.labels, embeddings, scale, bias)
    except (KeyError, ValueError, IndexError, MarrqError) as error:
        raise MarrqError(
            f"the class embeddings of {str(file)!r} cannot be read ({error}): export it again"
        ) from error
    if found.sha256 != metadata.classes:
        raise MarrqError(
            f"the class embeddings of {str(file)!r} are not those that it was exported with: "
            "export it again"
        )
    return found


def _tensor(value: ir.Value) -> np.ndarray:
    """The numbers of an initializer. Raises ValueError for a value that is none."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    return value.const_value.numpy()
