"""Files that are whole or absent, whenever the machine stops; and what tells one file from another.

A file is written beside its place, flushed to the disk and renamed. A rename within a folder is one
step (POSIX rename), so a reader sees the old file or the new one, and never a part.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from marrq.errors import MarrqError

CHUNK_BYTES = 1 << 20


def write_file(file: Path, write: Callable[[Path], object]) -> None:
    """Put a file in its place in one step.

    write: called with the path to write to, in the same folder. The folder is made if it does not
    exist. Raises what `write` and the file system raise; then what was there before is still there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    try:
        write(unfinished)
        flush(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    flush(file.parent)


def write_text(file: Path, text: str) -> None:
    """Put a UTF-8 text in its place in one step."""
    write_file(file, lambda place: place.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: object) -> None:
    """Put a value in its place as JSON for people, in one step."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_output(path: Path, overwrite: bool) -> None:
    """Raise MarrqError if the output exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise MarrqError(
            f"output {str(path)!r} exists: choose another place, or pass --force to replace it"
        )
