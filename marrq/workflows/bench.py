"""What `marrq bench` and `marrq.bench` do: export what is not exported yet, export the float
baselines, read the images, and have all files measured in one run (runtime/measure/bench.py).

All files of one run come from one float model. Its metadata name the images' preprocessing and
labels, so that a file can be measured without the artifact that it was exported from.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from marrq.errors import MarrqError
from marrq.workflows.baselines import BaselineMaker, Baselines, check_same_model
from marrq.workflows.bench_images import checked_metadata, describe, images_for, unmeasured
from marrq.workflows.bench_options import (
    DEFAULTS,
    BenchOptions,
    check_limits,
    check_paths,
)
from marrq.workflows.checks import check_data
from marrq.workflows.parity import artifact_of, measure_parity
from runtime.measure.answers import judged_output
from runtime.measure.bench import BenchReport, Progress
from runtime.measure.bench import bench as measure
from runtime.measure.gate import Limits
from runtime.measure.measured import Entry
from runtime.metadata import Metadata, OutputKind
from runtime.quantization import read_quantization
from runtime.session import Model, SessionSettings, check_provider

if TYPE_CHECKING:
    from marrq.models.images import ImageSet
    from marrq.models.images.gallery import MeasuredSets


class Bar(Protocol):
    """A progress bar."""

    def advance(self, amount: int = 1) -> None:
        """Go on by `amount`."""


# Called with a total for each name: shows a progress bar for each, in that order, while its block
# runs.
Bars = Callable[..., AbstractContextManager[Sequence[Bar]]]


class _HiddenBar:
    def advance(self, amount: int = 1) -> None:
        """Nothing is shown."""


@contextmanager
def hidden_bars(**totals: int) -> Iterator[list[Bar]]:
    """Bars that nobody sees."""
    yield [_HiddenBar() for _ in totals]


class Shared(NamedTuple):
    """What all files of a run have in common: source, preprocessing and labels in the metadata of
    the first, the kind of the output that is judged, and whether there is no other output."""

    metadata: Metadata
    kind: OutputKind
    is_alone: bool


class BenchedFile(NamedTuple):
    """An ONNX file to measure.

    path: what the user named, the file itself or an artifact.
    file: the ONNX file.
    variant: which of several exports of one artifact it is; empty for the only one.
    """

    path: Path
    file: Path
    variant: str = ""


def bench(
    paths: Sequence[str | Path],
    data: str | None = None,
    options: BenchOptions = DEFAULTS,
    say: Callable[[str], None] = lambda text: None,
    bars: Bars = hidden_bars,
) -> BenchReport:
    """Measure accuracy, size and latency of files and artifacts beside their float baselines.

    paths: artifacts, or ONNX files that `marrq export` wrote, all of one model.
    data: folder of images; None for the demo's own. Accuracy of a classifier is measured if its
        class folders are classes of the model, k-NN and retrieval of a model that gives embeddings
        if there are class folders.
    options: what is measured, and how.
    say: called with a line for people before each export.
    bars: shows how far the measuring is.

    Raises MarrqError for paths that cannot be measured together, and BenchError for files that
    ONNX Runtime cannot run.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    # A mistake is told before minutes of exporting and measuring.
    check_paths(given, options)
    check_provider(options.session)
    if data is not None:
        check_data(data)
    # Artifacts are looked for first: a missing one must not show after minutes of measuring.
    artifacts = (
        {str(path): artifact_of(path, options.artifacts, options.session) for path in given}
        if options.parity_images is not None
        else {}
    )
    from exporters.classes import classes_in

    images = images_for(given[0], data, options)
    # Exports are measured, and gone when the report is there.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        left_out: list[str] = []
        files = [
            item for path in given for item in _onnx_files(path, options, folder, say, left_out)
        ]
        candidates, shared = _candidates(files, options)
        check_limits(options.limits, shared.kind, shared.is_alone)
        beside = tuple(dict.fromkeys(path.resolve().parent for path in given))
        device, _ = options.runs_on
        classes, session = classes_in(files[0].file), options.session
        maker = BaselineMaker(shared.metadata, classes, beside, device, session, folder, say)
        baselines = maker.make(options.wanted_baselines)
        _check_baselines(baselines, options.limits)
        entries = [*baselines.entries, *candidates]
        # Parity compares images drawn at random, accuracy all of them.
        if options.parity_images is not None:
            measured = images.measured
            drawn = measured.draw(min(options.parity_images, len(measured)), 0)
            entries = _with_parity(entries, artifacts, drawn, options.session, bars)
        both = [s for path in given if path.is_dir() for s in _flattered(path, images.measured)]
        others = _other_devices(entries, device)
        warnings = (*both, *left_out, *baselines.warnings, *others)
        return _measured(entries, shared, images, options, bars, warnings)


def _check_baselines(baselines: Baselines, limits: Limits) -> None:
    """Raise MarrqError if there is nothing that candidates could be held to, or if it is not clear
    what."""
    found = [entry.flavor for entry in baselines.entries]
    twice = next((flavor for flavor in found if found.count(flavor) > 1), None)
    if twice is not None:
        raise MarrqError(f"two baselines are {twice}: leave one of them out")
    why = next(iter(baselines.warnings), "it was left out by --baseline")
    if limits.max_drop is not None and not found:
        raise MarrqError(f"--max-drop compares with a baseline, and there is none: {why}")
    if limits.min_cosine is not None and "fp32" not in found:
        raise MarrqError(f"--min-cosine compares with fp32, which is not measured: {why}")


def _flattered(artifact: Path, judging: "ImageSet") -> list[str]:
    """A sentence if some of the images that judge have calibrated the artifact."""
    from marrq.artifact.config import labels_from_json
    from marrq.artifact.folder import read_config
    from marrq.quantized_model import CalibrationRecord
    from marrq.workflows.judging import flattered_by_record

    config = read_config(artifact)
    record = CalibrationRecord(**config["calibration"])
    found = flattered_by_record(record, labels_from_json(config["labels"]), judging)
    return [f"{str(artifact)!r}: {sentence}" for sentence in found]


def _other_devices(entries: Sequence[Entry], device: str) -> list[str]:
    """A sentence for each file that was made for another device than the one it is measured on."""
    return [
        f"{entry.name} was made for the {entry.device} and is measured on the {device}: its graph "
        "may not be the fastest there"
        for entry in entries
        if entry.device != device
    ]


def _onnx_files(
    path: Path,
    options: BenchOptions,
    scratch: Path,
    say: Callable[[str], None],
    left_out: list[str],
) -> list[BenchedFile]:
    """The file itself; or exports of an artifact: in one flavour, or for a recommendation in each
    flavour that can express the model.

    left_out: takes a sentence for each flavour that can express the scheme and not the model."""
    from exporters.choices import flavors_with, suitable_flavor, written_scheme
    from exporters.flavors import VARIANTS, variants
    from exporters.onnx_file import Export, write
    from exporters.trace import trace_quantized
    from marrq.artifact.folder import artifact_hash, load
    from marrq.zero_shot import with_classes

    if path.is_file():
        return [BenchedFile(path, path)]
    # The hash keeps exports of two artifacts apart that have the same folder name.
    model, artifact = load(path), artifact_hash(path)
    if options.classes is not None:
        model = with_classes(model, options.classes)
    (device, _), given = options.runs_on, options.flavor_options
    if not options.recommend:
        flavor = options.flavor or suitable_flavor(model.scheme, device)
        file = scratch / f"{artifact}.onnx"
        say(f"exporting {path} as {flavor}")
        Export(model, artifact, flavor, given, device).write(file)
        return [BenchedFile(path, file)]
    # Traced once: each flavour lowers a clone of the trace.
    traced, files = trace_quantized(model, artifact), []
    for variant in variants(written_scheme(model.scheme, given), device):
        flavor, flavor_options = VARIANTS[variant]
        # What the user asks of every export, a flavour without that option cannot give.
        if any(flavor not in flavors_with(option) for option in given):
            continue
        say(f"exporting {path} as {variant}")
        made = BenchedFile(path, scratch / f"{artifact} {variant}.onnx", variant)
        try:
            write(traced, flavor, made.file, {**given, **flavor_options}, device=device)
        except MarrqError as error:
            left_out.append(f"measured without {variant} of {str(path)!r}: {error}")
            say(f"warning: {left_out[-1]}")
        else:
            files.append(made)
    if not files:
        raise MarrqError(left_out[-1])
    return files


def _candidates(files: Sequence[BenchedFile], options: BenchOptions) -> tuple[list[Entry], Shared]:
    """The files as entries of the bench, and what they have in common."""
    from exporters.choices import check_flavor_on

    entries: list[Entry] = []
    (device, _), session = options.runs_on, options.session
    first = Model(files[0].file, session)
    judged = judged_output(first.outputs)
    kind: OutputKind = "dense" if judged is None else judged.kind
    is_alone = len(first.outputs) == 1
    shared = Shared(checked_metadata(files[0].path, first), kind, is_alone)
    for given in files:
        metadata = checked_metadata(given.path, Model(given.file, session))
        check_flavor_on(metadata.flavor, device)
        # Baselines, images and rounds are shared, so all files must come from one float model.
        check_same_model(str(given.path), metadata, shared.metadata)
        entries.append(_candidate(given, metadata, {entry.name for entry in entries}))
    return entries, shared


def _candidate(given: BenchedFile, metadata: Metadata, taken: set[str]) -> Entry:
    """A file as an entry. taken: names that other entries have."""
    from marrq.artifact.folder import REPORTS

    scheme = metadata.scheme or "float"
    short = " ".join(filter(None, (scheme, metadata.method, given.variant)))
    # What is measured is kept by name: files of one name in several folders need their folders.
    names = (short, f"{short} {given.path.name}", f"{short} {given.path}")
    # Only an artifact tells how its linears were quantized.
    is_artifact = given.path.is_dir()
    return Entry(
        name=next((name for name in names if name not in taken), names[-1]),
        file=given.file,
        path=str(given.path),
        role="candidate",
        flavor=metadata.flavor,
        device=metadata.device,
        scheme=scheme,
        method=metadata.method,
        bits_per_weight=metadata.bits_per_weight,
        quantization=read_quantization(given.path / REPORTS) if is_artifact else None,
        refinement=metadata.refinement,
    )


def _with_parity(
    entries: Sequence[Entry],
    artifacts: dict[str, Path],
    images: "ImageSet",
    session: SessionSettings,
    bars: Bars,
) -> list[Entry]:
    """The entries, candidates with how they compare with their artifacts.

    artifacts: by the path that the user gave.
    """
    # Baselines are not quantized: there is nothing to compare.
    candidates = [entry for entry in entries if entry.role == "candidate"]
    with bars(parity=len(images) * len(candidates)) as [bar]:
        sections = {
            entry.name: measure_parity(
                artifacts[entry.path], entry.file, images, session, bar.advance
            )
            for entry in candidates
        }
    return [replace(entry, parity=sections.get(entry.name)) for entry in entries]


def _measured(
    entries: Sequence[Entry],
    shared: Shared,
    images: "MeasuredSets",
    options: BenchOptions,
    bars: Bars,
    warnings: Sequence[str],
) -> BenchReport:
    """Accuracy on all images, and speed."""
    from marrq.models.preprocessing import Preprocessing

    preprocessing = Preprocessing.from_json(json.loads(shared.metadata.preprocessing))
    are_embedded, settings = shared.kind == "features", options.settings
    # Nobody looks for neighbours of other answers than embeddings.
    images = images if are_embedded else replace(images, gallery=None)
    measured, count = images.measured, len(images.measured)
    # Latency opens every model once a round; throughput opens it once for each number of threads.
    sessions = options.rounds * len(entries) * (1 + len(settings.throughput_threads))
    # Each embedding is compared with float32's and, if it has a class, with all others.
    rows = len(entries) * count * (2 if measured.targets else 1) if are_embedded else 0
    looked_at = count + (0 if images.gallery is None else len(images.gallery))
    totals = {"accuracy": looked_at, "neighbours": rows, "speed": sessions}
    with bars(**{name: total for name, total in totals.items() if total}) as shown:
        # The second bar is the last one without neighbours, which are not advanced then.
        progress = Progress(shown[0].advance, shown[1].advance, shown[-1].advance)
        described = describe(images, preprocessing)
        report = measure(entries, described, settings, progress, warnings)
    # What is noted of the images is known when they have been read.
    notes = (*unmeasured(images, shared.kind), *measured.noted())
    return replace(report, warnings=(*report.warnings, *notes))
