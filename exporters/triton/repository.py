"""A model repository for Triton Inference Server: an ONNX file, and what the server must be told.

    REPOSITORY/NAME/config.pbtxt         the server's ModelConfig (config.py)
    REPOSITORY/NAME/labels.txt           a class a line, for answers by name; none without classes
    REPOSITORY/NAME/VERSION/model.onnx   model.onnx.data beside it above 2 GB
    REPOSITORY/NAME/VERSION/model.py     for the python backend
    REPOSITORY/NAME/VERSION/README.md    what a client has to send, and what comes back (card.py)

A new version is put beside the others in one step, so that a server which watches the repository
finds the version whole. Nothing else is touched, because the server would load the other versions
again. The version is made outside the repository, whose folders a server takes for models.

All versions of a model share its config and its labels. A version that needs others is refused.
"""

import os
import shutil
import tempfile
from pathlib import Path

from exporters.onnx_file import Export
from exporters.replacing import CONFIG
from exporters.triton.card import card
from exporters.triton.config import (
    LABELS,
    MODEL,
    classes_of,
    config_of,
    preferred_batches,
    read_bench,
    read_config,
    text_of,
)
from exporters.triton.serving import BACKEND_FILES, Serving
from marrq.errors import MarrqError
from marrq.files import flush, write_text

CARD = "README.md"


def write_repository(
    export: Export, repository: Path, serving: Serving, force: bool = False
) -> Path:
    """Add a version of a model to a repository, and return the version's folder.

    repository: made if it does not exist. force: replace the version, and those settings of the
    config that clients do not see. Raises MarrqError if the version exists, if other versions have
    another config, and if the file system cannot move a folder into the repository.
    """
    version = serving.version_folder(repository)
    folder = version.parent
    serving.check_repository(repository, force)
    preferred = _preferred(export, serving)
    with tempfile.TemporaryDirectory(dir=_beside(repository), prefix=".marrq.") as temporary:
        # Whatever fails from here on, the repository is as it was.
        made = Path(temporary) / serving.name
        _write_folder(made, export, serving, preferred)
        repository.mkdir(exist_ok=True)
        # A folder with other versions is added to; a new model moves as a whole.
        if folder.exists():
            _put_version(made, folder, version.name, force)
        else:
            made.rename(folder)
            flush(repository)
    return version


def _preferred(export: Export, serving: Serving) -> tuple[int, ...]:
    if serving.bench is None:
        return ()
    # Read before anything is exported, so that a wrong file is told early.
    report, scheme = read_bench(serving.bench), str(export.scheme)
    return preferred_batches(report, export.flavor, scheme, serving.max_batch)


def _beside(repository: Path) -> Path:
    """A folder that no server looks at, from which a model moves into the repository in one step.

    Raises MarrqError if that is not possible.
    """
    parent = repository.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    # A rename is one step only within a file system.
    elsewhere = repository.exists() and repository.stat().st_dev != parent.stat().st_dev
    if elsewhere or not os.access(parent, os.W_OK):
        raise MarrqError(
            f"a model is made in {str(parent)!r} and moved to {str(repository)!r} in one step, but "
            "the first is not writable or on another file system: export to another repository, "
            "and copy the model's folder"
        )
    return parent


def _write_folder(made: Path, export: Export, serving: Serving, preferred: tuple[int, ...]) -> None:
    """Write a model's folder with one version."""
    place, labels = made / str(serving.model_version), export.model.labels
    export.write(place / MODEL, serving.preprocess)
    # The onnxruntime backend needs no script.
    script = BACKEND_FILES[serving.backend]
    if script is not None:
        shutil.copyfile(script, place / "model.py")
    # Input and output are read from the file that was just written.
    config = config_of(place / MODEL, export, serving, preferred)
    write_text(made / CONFIG, text_of(config))
    write_text(place / CARD, card(export, config, serving))
    if classes_of(config, labels):
        write_text(made / LABELS, "".join(f"{label}\n" for label in labels))


def _put_version(made: Path, folder: Path, version: str, force: bool) -> None:
    """Move a version beside others, or in the place of one.

    If the move fails, the replaced version goes back to its place.
    """
    versions = [place.name for place in folder.iterdir() if place.name.isdecimal()]
    # The replaced version itself may have any config.
    others = sorted(name for name in versions if name != version)
    if others:
        _check_clients(made, folder, others, force)
    place, replaced = folder / version, made.with_name("replaced")
    if place.exists():
        place.rename(replaced)
    try:
        (made / version).rename(place)
    except BaseException:
        # The server still finds the version that it serves.
        if replaced.exists():
            replaced.rename(place)
        raise
    # An unchanged file is not touched: the server would load the model again. Labels that the only
    # version has no more would be held against the next one.
    if not others and not (made / LABELS).exists():
        (folder / LABELS).unlink(missing_ok=True)
    for name in (LABELS, CONFIG):
        if (made / name).exists() and _content(made / name) != _content(folder / name):
            (made / name).replace(folder / name)
    flush(folder)


def _check_clients(made: Path, folder: Path, others: list[str], force: bool) -> None:
    """Raise MarrqError if other versions have another config or other labels.

    What clients see may not change even by force: input, output and labels.
    """
    new, old = read_config(made / CONFIG), read_config(folder / CONFIG)
    different = [
        field.name
        for field in new.DESCRIPTOR.fields
        if getattr(new, field.name) != getattr(old, field.name)
    ]
    # Labels are a file beside the config, and clients see them in answers.
    different += ["labels"] if _content(made / LABELS) != _content(folder / LABELS) else []
    seen = not {"input", "output", "labels"}.isdisjoint(different)
    if different and (seen or not force):
        way = "" if seen else ", or pass --force to replace it for all of them"
        raise MarrqError(
            f"{str(folder)!r} has {'versions' if len(others) > 1 else 'version'} "
            f"{', '.join(others)} under a config with another {', '.join(different)}: choose "
            f"another --name{way}"
        )


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None
