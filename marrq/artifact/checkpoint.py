"""Checkpoints: what each block of a run has become, on disk, so that a run that was killed can go
on.

    settings.json             model, images, scheme, method and versions of the run; a run with others is refused
    block-0012.safetensors    the tensors of a block that is done, named as in an artifact, and its reports

A file is written under another name, flushed, and renamed: it is there or it is not. Tokens are not
kept. A run that goes on computes them again from the images and the blocks that are done, which
takes a fraction of the time that quantizing these took, and gives the same bits; so the artifact of
a run that was killed is that of one that was not, byte for byte."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from marrq.artifact.folder import PACKED, flush, report_of, restore, tensors_of
from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.models.blocks import Block
from marrq.models.first_last import Edge
from marrq.quantized_model import ModuleReport
from marrq.schemes import Scheme

SETTINGS = "settings.json"


class FolderCheckpoint:
    """The blocks of one run in a folder, which the first process alone reads and writes
    (pipeline.Checkpoint)."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], scheme: Scheme, processes: Processes
    ) -> None:
        """settings: what the run is, as JSON. Raises MarrqError where the folder has a run with
        others."""
        self._folder, self._scheme, self._team = folder, scheme, processes
        if processes.is_first:
            _begin(folder, settings)

    def restore(self, index: int, block: Block) -> list[ModuleReport] | None:
        """See pipeline.Checkpoint."""
        saved = self._team.broadcast_object(self._read(index) if self._team.is_first else None)
        if saved is None:
            return None
        tensors, reports = saved
        device, edges = next(block.module.parameters()).device, set()
        if isinstance(block, Edge):
            edges = {name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)}
            tensors |= {
                name: tensor
                for name, tensor in tensors_of(block.module).items()
                if _is_other(name, block)
            }
        restore(block.module, tensors, self._scheme, edges).to(device)
        return reports

    def keep(self, index: int, block: Block, reports: list[ModuleReport]) -> None:
        """See pipeline.Checkpoint."""
        if not self._team.is_first:
            return
        tensors = {
            name: tensor
            for name, tensor in tensors_of(block.module).items()
            if not _is_other(name, block)
        }
        told = {"reports": json.dumps([asdict(report) for report in reports])}
        _write(self._file(index), lambda place: save_file(tensors, place, told))

    def remove(self) -> None:
        """Remove the folder: the run is done."""
        if self._team.is_first:
            remove_checkpoint(self._folder)

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index:04}.safetensors"

    def _read(self, index: int) -> tuple[dict[str, Tensor], list[ModuleReport]] | None:
        file = self._file(index)
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                reports = [
                    report_of(fields) for fields in json.loads(content.metadata()["reports"])
                ]
                return {name: content.get_tensor(name) for name in content.keys()}, reports  # noqa: SIM118  # no mapping
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            raise MarrqError(
                f"checkpoint {str(file)!r} is damaged: remove it to quantize its block again"
            ) from error


def _is_other(tensor: str, block: Block) -> bool:
    """Whether a tensor belongs to the blocks that an edge, whose module is the whole model, has
    inside."""
    return isinstance(block, Edge) and tensor.startswith(
        tuple(path + "." for path, part in block.module.named_modules() if part in block.blocks)
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether an unfinished run lies there."""
    return (folder / SETTINGS).exists()


def remove_checkpoint(folder: Path) -> None:
    """Remove what lies there."""
    shutil.rmtree(folder, ignore_errors=True)


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or make sure that it holds this run."""
    if not is_checkpoint(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(
            folder / SETTINGS, lambda place: place.write_text(json.dumps(settings, indent=2) + "\n")
        )
        return
    found = _settings(folder)
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        raise MarrqError(
            f"checkpoint {str(folder)!r} is of a run with another {differing[0]}: remove it, or "
            "repeat that run's options"
        )


def _settings(folder: Path) -> dict[str, Any]:
    """What the run that lies there is."""
    try:
        found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not found:
        raise MarrqError(f"checkpoint {str(folder)!r} is damaged: remove it to begin again")
    return found


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is whole or absent, whenever the machine stops."""
    unfinished = file.with_name(f".{file.name}")
    try:
        write(unfinished)
        flush(unfinished)
        unfinished.replace(file)
        flush(file.parent)
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MarrqError(
            f"cannot write checkpoint {str(file)!r}: {reason}; blocks before it are kept, for "
            "--resume"
        ) from error
