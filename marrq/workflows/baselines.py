"""What `marrq bench` sets beside the files that it measures: the float model that they come from.

Baselines are exported from the float model. If that is not on this machine, they are files: those
that the user names, or `fp16.onnx` and `fp32.onnx` beside what is measured. A baseline that was
named by its flavour must be there; the default ones are left out if they are not, or if they cannot
be exported or run here, and the report says so.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.choices import BASELINES
from marrq.errors import MarrqError
from marrq.workflows.float_model import find_float_model
from runtime.errors import BenchError
from runtime.measure.measured import Entry
from runtime.metadata import Metadata
from runtime.session import Model, SessionSettings

if TYPE_CHECKING:
    from marrq.models.class_embeddings import ClassEmbeddings
    from marrq.models.load import VisionModel

DEFAULTS = ("fp16", "fp32")
"""What is measured if the user names no baseline."""


@dataclass(frozen=True)
class Baselines:
    """Entries of the bench, and a sentence about those that were left out."""

    entries: tuple[Entry, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaselineMaker:
    """Finds and makes the baselines of one float model.

    metadata: of a file that comes from it. classes: that the file was exported with, if any.
    beside: the folders of what is measured, in which files of baselines may lie.
    device: what baselines are exported for.
    """

    metadata: Metadata
    classes: "ClassEmbeddings | None"
    beside: tuple[Path, ...]
    device: str
    session: SessionSettings
    scratch: Path
    say: Callable[[str], None]

    def make(self, wanted: Sequence[str] | None) -> Baselines:
        """The baselines of these names, flavours or files; None for the default ones.

        Raises MarrqError for a file that is no baseline of the model, and for a flavour that was
        named if the float model is not at hand.
        """
        if wanted is None:
            return self._defaults()
        # A baseline that was named twice is measured once.
        names = list(dict.fromkeys(wanted))
        # Flavours are exported from the float model, everything else is a file.
        flavors = [name for name in names if name in BASELINES]
        files = [self.given(Path(name)) for name in names if name not in BASELINES]
        model, reason = self._float_model() if flavors else (None, "")
        if flavors and model is None:
            raise MarrqError(
                f"the baseline {flavors[0]} is exported from the float model: {reason}; pass "
                "--baseline none, or --baseline FILE with an export of it"
            )
        made = [self._export(model, flavor) for flavor in flavors] if model is not None else []
        return Baselines((*made, *files))

    def _defaults(self) -> Baselines:
        model, reason = self._float_model()
        # The model itself is preferred: what it is exported to is made for this device.
        if model is not None:
            return self._tried(model)
        # Exports that were carried along with what is measured.
        found = [self._carried(flavor) for flavor in DEFAULTS]
        entries = tuple(entry for entry in found if isinstance(entry, Entry))
        if entries:
            self.say(f"baselines are {', '.join(entry.path for entry in entries)}, since {reason}")
        left_out = [why for why in found if isinstance(why, str)]
        # Said now and recorded in the report: nobody should look for a ratio that is not there.
        warnings = [f"measured without the baseline {why}" for why in left_out]
        if warnings:
            warnings[-1] += f"; the float model is not at hand: {reason}"
        for warning in warnings:
            self.say(f"warning: {warning}")
        return Baselines(entries, tuple(warnings))

    def _carried(self, flavor: str) -> Entry | str:
        """The baseline that lies beside what is measured; or its flavour, and why it is none."""
        places = [folder / f"{flavor}.onnx" for folder in self.beside]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            return flavor
        # A file of this name may be anything, which is no reason to end a bench.
        try:
            entry = self.given(place)
        except (MarrqError, BenchError) as error:
            return f"{flavor}: {error}"
        return entry if entry.flavor == flavor else f"{flavor}: {str(place)!r} is {entry.flavor}"

    def _tried(self, model: "VisionModel") -> Baselines:
        """The default baselines, without those that cannot be exported or run here."""
        entries, warnings = [], []
        for flavor in DEFAULTS:
            try:
                entry = self._export(model, flavor)
                # One forward tells whether this provider has kernels for it.
                opened = Model(entry.file, self.session)
                opened.run(opened.random_input(1))
            except (MarrqError, BenchError) as error:
                warnings.append(f"measured without the baseline {flavor}: {error}")
                self.say(f"warning: {warnings[-1]}")
            else:
                entries.append(entry)
        return Baselines(tuple(entries), tuple(warnings))

    def given(self, file: Path) -> Entry:
        """A file as a baseline. Raises MarrqError if it is no export of the float model."""
        opened = Model(file, self.session)
        metadata = opened.metadata()
        # Ratios and drops are told against float models, so a quantized file is no baseline.
        if not metadata.is_marrqs or metadata.flavor not in BASELINES:
            raise MarrqError(
                f"the baseline {str(file)!r} is no float model that marrq exported: make one with "
                "--flavor fp32 or fp16"
            )
        check_same_model(str(file), metadata, self.metadata)
        if opened.input.type != "tensor(float)":
            raise MarrqError(
                f"the baseline {str(file)!r} takes {opened.input.type}, not normalized pixels: "
                "export it without --preprocess"
            )
        return _entry(metadata.flavor, metadata.device, file, str(file), metadata.bits_per_weight)

    def _float_model(self) -> "tuple[VisionModel | None, str]":
        from marrq.models.load import ModelSource

        source = ModelSource.from_json(json.loads(self.metadata.source))
        return find_float_model(source, self.classes)

    def _export(self, model: "VisionModel", flavor: str) -> Entry:
        from exporters.onnx_file import write_baseline

        self.say(f"exporting the baseline {flavor}")
        file = self.scratch / f"{flavor}.onnx"
        bits = write_baseline(model, flavor, file, device=self.device)
        return _entry(flavor, self.device, file, model.source.name, bits)


def check_same_model(name: str, metadata: Metadata, shared: Metadata) -> None:
    """Raise MarrqError if a file comes from another float model than the others of a run, or has
    other terms of preprocessing. name: of the file."""
    # A model has one hash, on whatever machine and in whatever folder it lies.
    if metadata.source_weights != shared.source_weights:
        raise MarrqError(
            f"{name!r} comes from another model, {metadata.source_name!r}, than the others, from "
            f"{shared.source_name!r}: bench them apart"
        )
    # Of one checkpoint different outputs may be taken. Old files do not tell theirs.
    outputs, wanted = metadata.source_outputs, shared.source_outputs
    if outputs and wanted and outputs != wanted:
        raise MarrqError(
            f"{name!r} gives {', '.join(outputs)}, the others give {', '.join(wanted)}: bench them "
            "apart"
        )
    if metadata.classes != shared.classes:
        raise MarrqError(
            f"{name!r} was exported with other classes than the others, or without: bench them "
            "apart"
        )
    # All files of a run are fed with the same pixels.
    if json.loads(metadata.preprocessing) != json.loads(shared.preprocessing):
        raise MarrqError(
            f"{name!r} was exported with other preprocessing than the others: bench them apart"
        )


def _entry(flavor: str, device: str, file: Path, path: str, bits: float) -> Entry:
    return Entry(
        name=flavor,
        file=file,
        path=path,
        role="baseline",
        flavor=flavor,
        device=device,
        scheme=flavor,
        method="none",
        bits_per_weight=bits,
    )
