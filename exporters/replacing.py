"""Which files and folders an export may replace: those that marrq exported.

A model is known by the entries `marrq.*` of its metadata. The file with its tensors is known by the
model that names it. A version of a model in a Triton repository is a folder with such a model, and
with nothing that marrq does not put there. What must be told from what is in marrq/outputs.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from exporters.external_data import external_data
from marrq.errors import MarrqError
from marrq.outputs import check_output, check_place, check_replaceable

if TYPE_CHECKING:
    from onnx import ModelProto

FLAVOR_KEY = "marrq.flavor"
"""The entry of the metadata that every file of marrq's has."""

CONFIG = "config.pbtxt"
CONFIG_MARK = 'key: "onnx_file"'
"""A parameter that marrq puts into every config."""

SHARED_FILES = (CONFIG, "labels.txt")
"""What an export puts beside the folders of the versions."""

VERSION_FILES = ("model.onnx", "model.onnx.data", "model.py", "README.md")
"""What an export puts into the folder of a model's version."""


MOST_BYTES = 2**31


def check_model_file(path: Path, force: bool) -> None:
    """Raise MarrqError if an ONNX file, or the file with its tensors, may not be written there."""
    # The model itself; a link or a folder in its place is refused.
    check_output(path, force, no_model)
    # The data of a large model lies beside it. The size of the new model is not known yet, and the
    # data of an old one are removed even if the new one has none.
    data = external_data(path)
    is_named = path.is_file() and data.name in _data_files(path)
    check_output(data, force, lambda _: None if is_named else "belongs to no model of marrq's")


def check_version_folder(version: Path, force: bool) -> None:
    """Raise MarrqError if a model's version may not be put into a Triton repository there."""
    # A link or a mount in place of the repository, the model or the version.
    for place in (version.parent.parent, version.parent):
        if place.exists() and not place.is_dir():
            raise MarrqError(f"{str(place)!r} is a file: choose another repository or --name")
    check_place(version)
    _check_shared_files(version.parent)
    if not version.exists():
        return
    if not force:
        raise MarrqError(
            f"{str(version)!r} exists: pass another --model-version, or --force to replace it"
        )
    check_replaceable(version, no_version)


def _check_shared_files(model: Path) -> None:
    """Raise MarrqError if the files that all versions of a model share are not marrq's."""
    # The labels have no mark of their own: they belong to the config.
    config, found = model / CONFIG, next((f for f in SHARED_FILES if (model / f).exists()), None)
    is_ours = config.is_file() and CONFIG_MARK in config.read_text(errors="replace")
    if found is not None and not is_ours:
        raise MarrqError(
            f"{str(model)!r} has a {found} that marrq did not write: choose another --name or "
            "repository"
        )


def no_model(path: Path) -> str | None:
    """What keeps a path from being replaced by a model; None for a model that marrq wrote."""
    if not path.is_file():
        return "is a folder"
    return None if FLAVOR_KEY in _metadata(path) else "is no ONNX file of marrq's"


def no_version(path: Path) -> str | None:
    """What keeps a folder from being replaced by a model's version; None for one of marrq's."""
    # A model of another tool's may stand under the same name.
    model = path / VERSION_FILES[0]
    if not path.is_dir() or not model.is_file() or no_model(model) is not None:
        return "holds no model of marrq's"
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in VERSION_FILES)
    return f"holds {others[0]!r}, which marrq did not write" if others else None


def _metadata(path: Path) -> set[str]:
    """The keys of a model's metadata; empty if the file is no model."""
    return {entry.key for entry in _model(path).metadata_props}


def _data_files(path: Path) -> set[str]:
    """The files beside a model that its tensors are in."""
    return {
        entry.value
        for tensor in _model(path).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _model(path: Path) -> "ModelProto":
    """The model without the tensors in other files; an empty one if the file is none."""
    # Imported here: it takes a third of a second, and is needed only if a file exists.
    import onnx
    from google.protobuf import message

    # No protobuf is that large.
    if path.stat().st_size > MOST_BYTES:
        return onnx.ModelProto()
    try:
        return onnx.load(path, load_external_data=False)
    except message.DecodeError:
        return onnx.ModelProto()
