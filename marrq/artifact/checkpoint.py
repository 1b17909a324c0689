"""Checkpoints: the finished blocks of a run, on disk, so that a run that was killed can go on.

    settings.json             model, images, settings and versions of the run
    block-0012.safetensors    the tensors of a finished block, named as in an artifact, and the
                              reports of its linears in the header

Tokens are not kept. A run that goes on computes them again from the images and the finished blocks,
which takes a fraction of the time of quantizing these blocks and gives the same bits. So the
artifact of a run that was killed is the artifact of a run that was not, byte for byte.
"""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from marrq.artifact.config import report_from_json, report_to_json
from marrq.artifact.tensors import (
    errors_of_writing,
    linears_in,
    restore,
    save_tensors,
    tensors_of,
)
from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.files import write_json
from marrq.models.blocks import Block
from marrq.quantized_model import ModuleReport
from marrq.schemes import Scheme

SETTINGS = "settings.json"


class FolderCheckpoint:
    """The finished blocks of one run, in a folder (Checkpoint in marrq/pipeline/quantize.py). The
    first process reads and writes the folder for all processes."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], scheme: Scheme, processes: Processes
    ) -> None:
        """Begin a run, or go on with the run that the folder has.

        settings: everything that the blocks are a function of, as JSON.
        Raises MarrqError if the folder is damaged or has a run with other settings.
        """
        # One writer: the others would write the same bytes over the same files.
        self._folder, self._scheme, self._processes = folder, scheme, processes
        if processes.is_first:
            _begin(folder, settings)

    def restore(self, index: int, block: Block) -> list[ModuleReport] | None:
        """Put the quantized linears of a finished block in their places, and return their reports.
        None if the block is not finished. Raises MarrqError if its file is damaged."""
        is_first = self._processes.is_first
        # Every process calls the broadcast, also if there is nothing to restore: the first process
        # alone knows, and all must restore the same blocks.
        saved = self._processes.broadcast_object(self._read(index) if is_first else None)
        if saved is None:
            return None
        tensors, reports = saved
        # A file has the linears of one block, so that all of them are outer linears or none is.
        outer = set() if block.kind == "block" else set(linears_in(tensors))
        # The module of first and last layers is the whole model: what they do not own, the
        # tensors of the blocks, stays as it is.
        others = {
            name: tensor
            for name, tensor in tensors_of(block.module).items()
            if not block.owns(name)
        }
        # Tensors come from the file on the CPU. The block stays on the device that it had.
        device = next(block.module.parameters()).device
        restore(block.module, tensors | others, self._scheme, outer).to(device)
        return reports

    def keep(self, index: int, block: Block, reports: list[ModuleReport]) -> None:
        """Write a finished block. Raises MarrqError if it cannot be written."""
        if not self._processes.is_first:
            return
        file = self._file(index)
        tensors = {
            name: tensor for name, tensor in tensors_of(block.module).items() if block.owns(name)
        }
        # The header of a safetensors file is a table of texts: the reports are one of them, so that
        # tensors and reports of a block cannot get out of step.
        header = {"reports": json.dumps([report_to_json(report) for report in reports])}
        with _errors_of_writing(file):
            # A folder that was removed meanwhile must not come back without its settings.
            (self._folder / SETTINGS).stat()
            save_tensors(tensors, file, header)

    def remove(self) -> None:
        """Remove the folder: the run is done."""
        if self._processes.is_first:
            remove_checkpoint(self._folder)

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index:04}.safetensors"

    def _read(self, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]] | None:
        """Tensors and reports of a finished block, None if it is not finished."""
        file = self._file(index)
        # A file in its place is complete (marrq/files.py), so that its existence says that the
        # block is finished.
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                reports = json.loads(content.metadata()["reports"])
                names = content.keys()
                tensors = {name: content.get_tensor(name) for name in names}
            return tensors, [report_from_json(fields) for fields in reports]
        # A file that was cut or edited: the header is no JSON, it lacks the reports, or a report
        # lacks a field.
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise MarrqError(
                f"checkpoint {str(file)!r} is damaged: remove it to quantize its block again"
            ) from error


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder has an unfinished run."""
    return (folder / SETTINGS).exists()


def remove_checkpoint(folder: Path) -> None:
    """Remove the folder and the unfinished run in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder. If it exists, raise MarrqError unless its run has these settings."""
    # settings.json is the first file of a run: without it nothing else in the folder counts.
    if not is_checkpoint(folder):
        with _errors_of_writing(folder / SETTINGS):
            write_json(folder / SETTINGS, settings)
        return
    found = _read_settings(folder)
    # A checkpoint of other settings is never overwritten silently: hours of work may be in it.
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        raise MarrqError(
            f"checkpoint {str(folder)!r} is of a run with another {differing[0]}: remove it, or "
            "repeat that run's options"
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that the folder has."""
    try:
        found: Any = json.loads((folder / SETTINGS).read_text())
    except ValueError:
        found = None
    # An empty table would agree with a run of no settings; it is as damaged as a file that is no
    # JSON.
    if not isinstance(found, dict) or not found:
        raise MarrqError(f"checkpoint {str(folder)!r} is damaged: remove it to begin again")
    return found


def _errors_of_writing(file: Path) -> AbstractContextManager[None]:
    advice = "blocks before it are kept, for --resume"
    return errors_of_writing(f"checkpoint {str(file)!r}", advice)
