"""Where marrq may write, and what it may replace there.

Nothing is deleted that marrq did not write. `--force` replaces what a command has written before
and what holds nothing; everything else is refused, and named. What a command writes is known by its
content:

    artifact    a folder of the four files of an artifact and no others
    report      JSON with a schema of marrq's; a page or a plot that names marrq as its maker
    classes     safetensors whose metadata name the format (marrq/models/class_embeddings.py)
    ONNX file   by its metadata (exporters/replacing.py)

Some places are refused whatever is there: a link, since another file or folder is behind it; a
mount, the home folder, and a folder that the command runs in, since these cannot be moved away; and
the folders that the command reads.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from marrq.errors import MarrqError

Strange = Callable[[Path], str | None]
"""What is strange about something that exists, as `is a folder`; None if marrq wrote it."""

ARTIFACT_FORMAT = "marrq.artifact"
ARTIFACT_CONFIG = "config.json"
ARTIFACT_FILES = ("model.safetensors", "quantization.json", "README.md", ARTIFACT_CONFIG)
"""The files of an artifact. The last one is written last, and tells that the folder is one."""

CLASSES_FORMAT = "marrq.classes"
"""What the metadata of a file of classes call its format."""

MAX_HEADER_BYTES = 100_000_000
"""safetensors reads no longer header."""

REPORT_SCHEMAS = "marrq."
"""How the schemas of marrq's reports begin."""

MAKERS = (b'name="generator" content="marrq"', b"<dc:title>marrq</dc:title>", b"Software\0marrq")
"""How a page, an SVG and a PNG name their maker, within the first HEAD_BYTES bytes."""

HEAD_BYTES = 4096

Inputs = Mapping[str, Path]
"""Files and folders that a command reads, by the option or argument that names each."""

# A default argument must not be changed by a caller, so it is read-only.
NO_INPUTS: Inputs = MappingProxyType({})


def check_output(path: Path, overwrite: bool, strange: Strange, inputs: Inputs = NO_INPUTS) -> None:
    """Raise MarrqError if the output can have no place, or exists and may not be replaced.

    strange: what keeps an output that exists from being replaced. inputs: as for `check_place`.
    """
    # Places first: what is behind a link must not even be read.
    check_place(path, inputs)
    if not path.exists():
        return
    if not overwrite:
        raise MarrqError(
            f"output {str(path)!r} exists: choose another place, or pass --force to replace it"
        )
    check_replaceable(path, strange)


def check_report(file: Path, strange: Strange) -> None:
    """Raise MarrqError if a report or a picture of one cannot be written, or would replace what
    marrq did not write. A report of an earlier run is replaced without being asked."""
    check_place(file)
    if file.exists():
        check_replaceable(file, strange)


def check_replaceable(path: Path, strange: Strange) -> None:
    """Raise MarrqError if something that exists was not written by marrq."""
    # What holds nothing can be replaced without a loss.
    if _is_empty(path):
        return
    found = strange(path)
    if found is not None:
        raise MarrqError(
            f"output {str(path)!r} {found}: marrq replaces only what it wrote, choose another place"
        )


def check_place(path: Path, inputs: Inputs = NO_INPUTS) -> None:
    """Raise MarrqError if a path cannot be an output, whatever is there.

    inputs: the output may be none of them, hold none of them, and lie in none of them.
    """
    # `exists` is false below a file, and the error would come only when all is computed.
    file = next((parent for parent in path.parents if parent.is_file()), None)
    if file is not None:
        raise MarrqError(
            f"output {str(path)!r} cannot be written: {str(file)!r} is a file; choose another place"
        )
    found = _why_no_place(path)
    if found is not None:
        # `.`, `..` and `/` often stand for "in there".
        way = "give a new name in it" if path.name in ("", "..") else "choose another place"
        raise MarrqError(f"output {str(path)!r} {found}: {way}")
    # The folders between are made when something is written.
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(nearest, os.W_OK):
        raise MarrqError(
            f"output {str(path)!r} cannot be written: you may not write to {str(nearest)!r}; "
            "choose another place"
        )
    for reader, read in inputs.items():
        # Through links, which may lead to the same folder under another name.
        ours, theirs = path.resolve(), read.resolve()
        if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
            inside = "lies in" if theirs in ours.parents else "holds"
            # The same name twice in a sentence would say nothing.
            how = "is what" if ours == theirs else f"{inside} {str(read)!r}, which"
            raise MarrqError(f"output {str(path)!r} {how} {reader} reads: choose another place")


def _why_no_place(path: Path) -> str | None:
    """What keeps a path from being written to, whatever is there; None for a good one."""
    # `.` and `..` have no name of their own, beside which an unfinished output could lie.
    if path.name in ("", ".."):
        place = path.resolve()
        if place == Path.cwd():
            return "is the folder that the command runs in"
        is_root = place == Path(place.anchor)
        return "is the root folder" if is_root else "has no name of its own"
    # Also one that leads nowhere: it would be gone.
    if path.is_symlink():
        return "is a link, and what is behind it may be anyone's"
    if path.is_mount():
        return "is a mount, which cannot be moved"
    # A device such as /dev/null would be replaced by a file.
    if path.exists() and not path.is_file() and not path.is_dir():
        return "is no file and no folder"
    if path.is_dir() and Path.cwd().is_relative_to(path.resolve()):
        return "is or holds the folder that you are in"
    if path.is_dir() and Path.home().is_relative_to(path.resolve()):
        return "is or holds your home folder"
    return None


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


def is_artifact(folder: Path) -> bool:
    """Whether the folder says that it is an artifact; the artifact may still be damaged."""
    # A search for the text, since a damaged artifact is still an artifact: loading it must say that
    # it is damaged, and not that it is something else.
    config = folder / ARTIFACT_CONFIG
    return config.is_file() and f'"{ARTIFACT_FORMAT}"' in config.read_text(errors="replace")


def no_artifact(path: Path) -> str | None:
    """What keeps a path from being replaced by an artifact; None for an artifact.

    The artifact may be damaged, or of another format version. A file that somebody put into it is
    not marrq's, so the folder is kept for it.
    """
    if not path.is_dir():
        return "is a file, and an artifact is a folder"
    if not is_artifact(path):
        return "is a folder that holds no artifact"
    # Sorted, so that the sentence is the same in every run.
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ARTIFACT_FILES)
    return f"holds {others[0]!r}, which is no part of an artifact" if others else None


def no_report(path: Path) -> str | None:
    """What keeps a path from being replaced by a report in JSON; None for a report."""
    if not path.is_file():
        return "is a folder"
    # Any JSON may have a schema of its own; marrq's begin with its name.
    try:
        report = json.loads(path.read_bytes())
    except ValueError:
        report = None
    schema = report.get("schema") if isinstance(report, dict) else None
    is_ours = isinstance(schema, str) and schema.startswith(REPORT_SCHEMAS)
    return None if is_ours else "is no report of marrq's"


def no_picture(path: Path) -> str | None:
    """What keeps a path from being replaced by a page or a plot; None for one of marrq's."""
    if not path.is_file():
        return "is a folder"
    # Only the beginning: a picture of somebody else's may be large.
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    return None if any(mark in head for mark in MAKERS) else "is no page or plot of marrq's"


def no_classes(path: Path) -> str | None:
    """What keeps a path from being replaced by a file of classes; None for such a file."""
    if not path.is_file():
        return "is a folder"
    # A safetensors file begins with the length of its header, which is JSON.
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        is_ours = header["__metadata__"]["format"] == CLASSES_FORMAT
    # Anything else is no JSON, or has no such entries.
    except (ValueError, KeyError, TypeError, RecursionError):
        is_ours = False
    return None if is_ours else "holds no classes of marrq's"


def check_own_files(*files: Path | None) -> None:
    """Raise MarrqError if two outputs of a command are one file. files: None for no output."""
    places = [file.resolve() for file in files if file is not None]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise MarrqError(
            f"{str(twice)!r} is named for two outputs: give each of them a file of its own"
        )
