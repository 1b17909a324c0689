"""Part of marrq: from a quantized model to ONNX files.

    trace.py        torch model → float graph with a placeholder for each quantized linear, once
    passes/         rewrites of that graph, in the order of passes/__init__.py
    flavors/        one file a flavour: what a placeholder becomes
    lowering/       what the flavours share
    onnx_file.py    describe, check and save
    triton/         a model repository for Triton Inference Server

`export` is the way in. It is imported when it is first called, since it needs torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from exporters.choices import NO_OPTIONS, Options

if TYPE_CHECKING:
    from marrq.quantized_model import QuantizedModel


def export(
    model: "QuantizedModel",
    artifact_hash: str,
    path: Path,
    flavor: str | None = None,
    options: Options = NO_OPTIONS,
    takes_images: bool = False,
) -> str:
    """Write a quantized model as an ONNX file, and return its flavour.

    artifact_hash: of the artifact that holds the model.
    flavor: a name of exporters/choices.py; None for the one that suits the scheme best.
    options: of the flavour.
    takes_images: the graph takes uint8 images and normalizes them itself.
    Raises MarrqError for an unknown flavour or option, and for a scheme that the flavour cannot
    express.
    """
    # torch and onnx are loaded here, not when the package is imported.
    from exporters.choices import suitable_flavor
    from exporters.onnx_file import Export

    chosen = Export(model, artifact_hash, flavor or suitable_flavor(model.scheme), options)
    chosen.write(path, takes_images)
    return chosen.flavor
