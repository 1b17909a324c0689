"""Checkpoints: the finished blocks of a run, on disk, so that a run that was killed can go on.

    settings.json             model, images, settings and versions of the run
    costs.json                what each linear costs at each width, if the run has a budget
    block-0012.safetensors    the tensors of a finished block, named as in an artifact, and the
                              reports of its linears in the header

Tokens are not kept. A run that goes on computes them again from the images and the finished blocks,
which takes a fraction of the time of quantizing these blocks and gives the same bits. So the
artifact of a run that was killed is the artifact of a run that was not, byte for byte.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from marrq.artifact.config import report_from_json, report_to_json, settings_from_json
from marrq.artifact.tensors import (
    errors_of_writing,
    linears_in,
    outside,
    restore,
    save_tensors,
    tensors_of,
)
from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.files import beside, remove_files, write_json
from marrq.models.blocks import Block
from marrq.quantized_model import ModuleReport, QuantizationSettings
from marrq.quantizers.linear import quantized_linears

SETTINGS = "settings.json"
COSTS = "costs.json"
BLOCKS = "block-[0-9][0-9][0-9][0-9]*.safetensors"


class FolderCheckpoint:
    """The finished blocks of one run, in a folder (Checkpoint in marrq/pipeline/quantize.py). The
    first process reads and writes the folder for all processes."""

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        settings: QuantizationSettings,
        processes: Processes,
    ) -> None:
        """Begin a run, or go on with the run that the folder has.

        about: everything that the blocks are a function of, as JSON.
        settings: of the run; they give the scheme of each linear.
        Raises MarrqError if the folder is damaged or has a run with other settings.
        """
        self._folder, self._settings, self._processes = folder, settings, processes
        self._about, self._has_begun = about, False
        # The folder says whose run it has, but two runs may have begun in it at the same time.
        self._run = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        # One writer: the others would write the same bytes over the same files.
        if processes.is_first:
            self._begin()

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
        schemes = {
            name: block.scheme_of(self._settings.scheme_of(block.path_of(name)))
            for name in linears_in(tensors)
        }
        # The module of first and last layers is the whole model: what they do not own stays as it
        # is. Quantized linears of the blocks are in their places.
        floats = outside(block.module.state_dict(), quantized_linears(block.module))
        others = {name: tensor for name, tensor in floats.items() if not block.owns(name)}
        # Tensors come from the file on the CPU. The block stays on the device that it had.
        device = next(block.module.parameters()).device
        restore(block.module, tensors | others, schemes).to(device)
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
        header = {
            "reports": json.dumps([report_to_json(report) for report in reports]),
            "run": self._run,
        }
        with _errors_of_writing(file):
            if self._has_begun:
                # A folder that was removed meanwhile must not come back without its first blocks.
                (self._folder / SETTINGS).stat()
            else:
                write_json(self._folder / SETTINGS, self._about)
                self._has_begun = True
            save_tensors(tensors, file, header)

    def remove(self) -> None:
        """Remove the folder: the run is done."""
        if self._processes.is_first:
            remove_checkpoint(self._folder)

    def _begin(self) -> None:
        """Find out whether the folder has this run, and raise MarrqError if it has another."""
        folder = self._folder
        if not is_checkpoint(folder):
            # A place that cannot be written is told now, not after the first block. Nothing stays:
            # a run that fails before its first block must not stand in the way of the next run.
            with _errors_of_writing(folder / SETTINGS):
                write_json(folder / SETTINGS, self._about)
            remove_files(folder, {SETTINGS})
            return
        self._has_begun = True
        check_checkpoint(folder, self._about)

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
                reports, run = json.loads(content.metadata()["reports"]), content.metadata()["run"]
                names = content.keys()
                tensors = {name: content.get_tensor(name) for name in names}
            if run == self._run:
                return tensors, [report_from_json(fields) for fields in reports]
        # A file that was cut or edited: the header is no JSON, it lacks the reports, or a report
        # lacks a field.
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise MarrqError(
                f"checkpoint {str(file)!r} is damaged: remove it to quantize its block again"
            ) from error
        raise MarrqError(
            f"checkpoint {str(file)!r} is of another run, which writes to the same place: give "
            "each run an output of its own"
        )


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder has an unfinished run: at least one finished block."""
    return any(folder.glob(BLOCKS))


def is_checkpoint_of(folder: Path, about: Mapping[str, Any]) -> bool:
    """Whether the folder has an unfinished run with these settings."""
    return is_checkpoint(folder) and not _differing(folder, about)


def check_checkpoint(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise MarrqError if the folder has an unfinished run with other settings: it is never
    overwritten silently, since hours of work may be in it."""
    differing = _differing(folder, about) if is_checkpoint(folder) else []
    if differing:
        # Widths follow from the budget, which is what the user knows of them.
        what = "budget" if differing[0] == "widths" else differing[0]
        values = _values(_read_settings(folder).get(differing[0]), about[differing[0]])
        raise MarrqError(
            f"checkpoint {str(folder)!r} is of a run with another {what}{values}: remove it, or "
            "repeat that run's options"
        )


def _values(theirs: Any, ours: Any) -> str:
    """What differs inside a table of settings, to stand behind its name."""
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return ""
    key = next(key for key in ours if theirs.get(key) != ours[key])
    if isinstance(ours[key], dict):
        return _values(theirs.get(key), ours[key])
    return f", {key} {theirs.get(key)} and not {ours[key]}"


def _differing(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """The keys of the settings that the folder's run has otherwise."""
    found = _read_settings(folder)
    return [key for key in about if found.get(key) != about[key]]


def settings_in(folder: Path) -> QuantizationSettings:
    """The settings of the unfinished run in the folder. Raises MarrqError if they are damaged."""
    try:
        return settings_from_json(_read_settings(folder))
    except (KeyError, TypeError) as error:
        raise _damage(folder) from error


def keep_costs(folder: Path, about: Mapping[str, Any], costs: Mapping[str, Any]) -> None:
    """Keep what a run has measured before its first block. about: as of FolderCheckpoint, without
    the widths, which follow from the costs. Raises MarrqError if it cannot be written."""
    with errors_of_writing(f"checkpoint {str(folder / COSTS)!r}", "nothing is kept"):
        write_json(folder / COSTS, {"run": about, "costs": costs})


def costs_in(folder: Path, about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The costs that an unfinished run has kept; None if it has none, or is another run."""
    try:
        found = json.loads((folder / COSTS).read_text())
    except (OSError, ValueError):
        return None
    is_kept = isinstance(found, dict) and found.get("run") == about
    return found["costs"] if is_kept else None


def remove_checkpoint(folder: Path) -> None:
    """Remove the unfinished run in the folder, and the folder if nothing else is in it."""
    # A killed process may have left the beginning of a block.
    blocks = {path.name for path in folder.glob(BLOCKS)}
    begun = {path.name for path in folder.glob(beside(Path(BLOCKS), "unfinished").name)}
    remove_files(folder, {SETTINGS, COSTS, *blocks, *begun})


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run that the folder has."""
    try:
        found: Any = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        found = None
    # An empty table would agree with a run of no settings; it is as damaged as a file that is no
    # JSON.
    if not isinstance(found, dict) or not found:
        raise _damage(folder)
    return found


def _damage(folder: Path) -> MarrqError:
    return MarrqError(f"checkpoint {str(folder)!r} is damaged: remove it to begin again")


def _errors_of_writing(file: Path) -> AbstractContextManager[None]:
    advice = "blocks before it are kept, for --resume"
    return errors_of_writing(f"checkpoint {str(file)!r}", advice)
