"""Export: an artifact or a quantized model becomes an ONNX file, or a model on a server.

What can be wrong without torch is checked first, so that a mistake is told at once.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.choices import (
    BASELINES,
    NO_OPTIONS,
    Options,
    check_choice,
    check_device,
    check_flavor_on,
    check_scheme,
    suitable_flavor,
)
from exporters.replacing import check_model_file
from exporters.triton.serving import Serving
from marrq.artifact.scheme import read_scheme
from marrq.files import check_artifact
from marrq.outputs import check_place
from marrq.schemes import Scheme

if TYPE_CHECKING:
    from exporters.onnx_file import Export
    from marrq.models.class_embeddings import ClassEmbeddings
    from marrq.quantized_model import QuantizedModel


@dataclass(frozen=True)
class ArtifactWithClasses:
    """The folder of an artifact that gives features, and the classes that its files give."""

    folder: Path
    classes: "ClassEmbeddings"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    path: the ONNX file, or the folder of the model's version in a repository.
    flavor: the flavour that was asked for, or that suits scheme and device best.
    scheme: of the file, as `W4A8`; None for a float model.
    size_bytes: of the model, its external data included.
    warning: a sentence if the file is in float16 and overflows (marrq/workflows/overflow.py).
    """

    path: Path
    flavor: str
    scheme: str | None
    size_bytes: int
    warning: str | None = None


def export(
    quantized: "QuantizedModel | ArtifactWithClasses | Path | str",
    output: Path | str,
    flavor: str | None = None,
    options: Options = NO_OPTIONS,
    device: str = "cpu",
    serving: Serving | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Export a quantized model.

    quantized: a quantized model, with classes or without; or the folder of an artifact.
    output: the ONNX file; with `serving` a repository, which is made or added to.
    flavor: integer, matmulnbits, qdq, folded, fp32 or fp16; None for the flavour that suits scheme
    and device best under ONNX Runtime.
    options: of the flavour, such as {"fuse": False}; exporters/choices.py lists them.
    device: cpu or gpu, what the file is made for.
    serving: how a Triton server runs the model; None for an ONNX file.
    force: replace what exists.
    say: called with a line for people when the checks are done and the long part begins.
    Raises MarrqError if the artifact does not exist, if the output exists and `force` is off, if
    the flavour cannot express the scheme, and if the device has no kernels for the flavour.
    """
    output = Path(output)
    check_device(device)
    if flavor is not None:
        check_choice(flavor, options)
        check_flavor_on(flavor, device)
    _check_place(output, serving, force)
    scheme = _scheme_of(quantized)
    # Now that it is known to be an artifact, nothing may be put into its folder.
    folder = _folder_of(quantized)
    if folder is not None:
        # Of a repository the new version alone is written.
        place = output if serving is None else serving.version_folder(output)
        check_place(place, {"ARTIFACT": folder})
    if scheme is not None:
        flavor = flavor or suitable_flavor(scheme, device)
        check_scheme(scheme, flavor, options, device)
        # Without a scheme the artifact is damaged, and nothing will be exported.
        say(f"exporting to {output}")

    from exporters.onnx_file import Export
    from runtime.audit.graph import size_bytes

    model, artifact = _loaded(quantized)
    flavor = flavor or suitable_flavor(model.scheme, device)
    chosen = Export(model, artifact, flavor, options, device)
    written = None if flavor in BASELINES else str(chosen.scheme)
    if serving is None:
        # One flavour, so one trace is made and used.
        chosen.write(output)
        return Exported(output, flavor, written, size_bytes(output), _overflow(chosen, output))

    # tritonclient is an extra: an ONNX file must not need it.
    from exporters.triton.config import MODEL
    from exporters.triton.repository import write_repository

    version = write_repository(chosen, output, serving, force)
    file = version / MODEL
    warning = _overflow(chosen, file, serving.preprocess)
    return Exported(version, flavor, written, size_bytes(file), warning)


def _overflow(chosen: "Export", file: Path, takes_images: bool = False) -> str | None:
    """A warning if the file is in float16 and overflows."""
    in_float16 = {
        "fp16": True,
        "folded": not chosen.options.get("float32"),
        "qdq": chosen.options.get("symmetric", False),
    }
    if not in_float16.get(chosen.flavor):
        return None
    from marrq.workflows.overflow import overflow_warning

    return overflow_warning(chosen.model, file, takes_images, chosen.flavor == "qdq")


def _check_place(output: Path, serving: Serving | None, force: bool) -> None:
    """Raise MarrqError if what would be written exists and may not be replaced."""
    if serving is not None:
        serving.check_repository(output, force)
        return
    check_model_file(output, force)


def _folder_of(
    quantized: "QuantizedModel | ArtifactWithClasses | Path | str",
) -> Path | None:
    """The folder of the artifact; None for a model in memory."""
    if isinstance(quantized, ArtifactWithClasses):
        return quantized.folder
    return Path(quantized) if isinstance(quantized, Path | str) else None


def _scheme_of(quantized: "QuantizedModel | ArtifactWithClasses | Path | str") -> Scheme | None:
    """The scheme, without torch; None if the artifact is damaged."""
    if not isinstance(quantized, ArtifactWithClasses | Path | str):
        return quantized.scheme
    folder = quantized.folder if isinstance(quantized, ArtifactWithClasses) else Path(quantized)
    check_artifact(folder)
    return read_scheme(folder)


def _loaded(
    quantized: "QuantizedModel | ArtifactWithClasses | Path | str",
) -> "tuple[QuantizedModel, str]":
    """The model, and the hash of the artifact that holds it."""
    from marrq.artifact.folder import artifact_hash, load, save
    from marrq.zero_shot import with_classes, without_classes

    if isinstance(quantized, ArtifactWithClasses):
        model, artifact = load(quantized.folder), artifact_hash(quantized.folder)
        return with_classes(model, quantized.classes), artifact
    if isinstance(quantized, Path | str):
        return load(Path(quantized)), artifact_hash(Path(quantized))
    # A model that was quantized on a GPU is still there, and files are made on the CPU.
    quantized = quantized.on_cpu()
    # The hash is that of a folder, so the model is saved for it, as `marrq.save` would. Classes are
    # no part of an artifact.
    saved = quantized if quantized.classes is None else without_classes(quantized)
    with tempfile.TemporaryDirectory() as place:
        save(saved, Path(place) / "artifact")
        return quantized, artifact_hash(Path(place) / "artifact")
