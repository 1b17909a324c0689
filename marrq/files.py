"""Files and folders that are whole or absent, whenever the machine stops; hashes that tell one file
from another; and checks of the paths that a user gives.

A file is written beside its place, flushed to the disk and renamed. A rename within a folder is one
step (POSIX rename), so a reader sees the old file or the new one, and never a part. A folder is
written the same way, but a folder that is replaced has to be moved away first: between the two
renames it lies beside its place, and the next write puts it back.

What lies beside a place NAME is called `.NAME.unfinished` and `.NAME.replaced`, which nobody else
uses. Of folders only files are removed whose names the caller knows. What may be replaced at all is
decided in marrq/outputs.py.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from marrq.errors import MarrqError

CHUNK_BYTES = 1 << 20


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place in one step.

    write: called with the path to write to, in the same folder. The folder is made if it does not
    exist. Raises what `write` and the file system raise; then what was there before is still there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(file, "unfinished")
    try:
        write(unfinished)
        flush(unfinished)
        # Bytes first, then the name: a machine that stops between the two keeps the old file.
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    # The rename itself is on the disk only when the folder is.
    flush(file.parent)


def write_folder(folder: Path, write: Callable[[Path], object], names: Collection[str]) -> None:
    """Put a folder in its place in one step, or replace the folder that is there.

    write: called with an empty folder to fill. The parent is made if it does not exist.
    names: of all files that `write` makes; no other file is ever removed.
    Raises what `write` and the file system raise; then what was there before is still there, and
        nothing is left beside it.
    """
    unfinished, replaced = beside(folder, "unfinished"), beside(folder, "replaced")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Of a process that was killed.
        _clear(folder, names)
        # What is filled here gets its name in one step below.
        unfinished.mkdir()
        write(unfinished)
        # Every file inside, so that a name never appears before its content.
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        if folder.exists():
            # A folder with content cannot be renamed over: the old one steps aside first.
            folder.rename(replaced)
        unfinished.rename(folder)
        flush(folder.parent)
    finally:
        _clear(folder, names)


def beside(path: Path, state: str) -> Path:
    """Where something lies that is not in its place yet (unfinished), or no longer (replaced)."""
    # In the same folder, since a rename between two file systems is a copy. The dot hides it from a
    # reader that lists the folder.
    return path.with_name(f".{path.name}.{state}")


def _clear(folder: Path, names: Collection[str]) -> None:
    """Put a folder back that was moved away and not replaced; remove what lies beside its place."""
    unfinished, replaced = beside(folder, "unfinished"), beside(folder, "replaced")
    # The process was killed between the two renames: the old folder is the valid one.
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for path in (unfinished, replaced):
        remove_files(path, names)


def remove_files(folder: Path, names: Collection[str]) -> None:
    """Remove the named files of a folder, and what a killed process left of them; then the folder,
    if nothing else is in it. A link is left alone."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in names:
        # `write_file` writes beside the place of each file.
        for path in (folder / name, beside(folder / name, "unfinished")):
            with suppress(OSError):
                path.unlink()
    # Fails if something else is there, which is not ours to remove.
    with suppress(OSError):
        folder.rmdir()


def write_text(file: Path, text: str) -> None:
    """Put a UTF-8 text in its place in one step."""
    write_file(file, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: object) -> None:
    """Put a value in its place as JSON for people, in one step."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk."""
    # A folder cannot be opened for writing; fsync works on a descriptor for reading too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        # In chunks: a model file may be larger than the memory.
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_data_folder(name: str) -> None:
    """Raise MarrqError if there is no folder of images; `demo` names the built-in images."""
    if name == "demo" or Path(name).is_dir():
        return
    state = "is a file" if Path(name).exists() else "does not exist"
    raise MarrqError(f"data folder {name!r} {state}: give a folder of images, or demo")


CONFIG_BYTES = 16 * 2**20
"""No config.json of a model is larger."""


def check_artifact(folder: Path) -> None:
    """Raise MarrqError if the folder is no artifact; an artifact may still be damaged."""
    if not folder.exists():
        raise MarrqError(
            f"{str(folder)!r} does not exist: give a folder that `marrq quantize` wrote"
        )
    if folder.is_file():
        inside = (folder.parent / "config.json").is_file()
        way = repr(str(folder.parent)) if inside else "what `marrq quantize` wrote"
        raise MarrqError(f"{str(folder)!r} is a file, and an artifact is a folder: give {way}")
    if not (folder / "config.json").is_file():
        raise MarrqError(
            f"{str(folder)!r} is no artifact, it has no config.json: give a folder that `marrq "
            "quantize` wrote"
        )
    if _is_model(folder / "config.json"):
        raise MarrqError(
            f"{str(folder)!r} is a model's checkpoint, not an artifact: run marrq quantize first"
        )


def _is_model(config: Path) -> bool:
    """Whether a config.json is that of a checkpoint of timm or of transformers."""
    # Damaged or hostile, which is told with the reason when it is loaded.
    if config.stat().st_size > CONFIG_BYTES:
        return False
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    # timm writes the first key, transformers the others; an artifact has none of them.
    keys = {"architecture", "architectures", "model_type"}
    return isinstance(found, dict) and not keys.isdisjoint(found)
