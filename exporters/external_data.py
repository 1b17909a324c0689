"""Models of two files: a protobuf ends at 2 GiB, so a larger model keeps its tensors beside it.

The tensors are in one file, named like the model with `.data` behind. The model names that file, so
both go together.
"""

from pathlib import Path

from marrq.files import flush


def external_data(path: Path) -> Path:
    """The file beside a model that holds the tensors which do not fit in the model."""
    return path.with_name(f"{path.name}.data")


def put(file: Path, path: Path) -> None:
    """Move a model, with its data if it has some, to the place of another model.

    `marrq.files.write_file` replaces one file in one step. Two files cannot be replaced so: the old
    model is removed first, and at every moment there is a whole model or none.

    file: on the file system of `path`.
    """
    # Whether the tensors were too large is seen by the file that the writer left.
    data, two_files = external_data(file), external_data(file).exists()
    if two_files:
        flush(data)
        # From here on there is no model, until the new one is in its place.
        path.unlink(missing_ok=True)
        data.replace(external_data(path))
    # A rename may reach the disk before the bytes do, unless these are flushed first.
    flush(file)
    file.replace(path)
    if not two_files:
        # Data of the old model, which nothing names any more.
        external_data(path).unlink(missing_ok=True)
    # The new names, too, must survive a power cut.
    flush(path.parent)
