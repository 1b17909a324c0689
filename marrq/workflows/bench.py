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

import numpy as np

from marrq.errors import MarrqError
from marrq.workflows.baselines import BaselineMaker, check_same_model
from marrq.workflows.bench_options import DEFAULTS, BenchOptions, check_paths
from marrq.workflows.checks import check_data
from marrq.workflows.parity import artifact_of, measure_parity
from runtime.measure.answers import NO_TARGET
from runtime.measure.bench import BenchReport, ImageData, Progress
from runtime.measure.bench import bench as measure
from runtime.measure.measured import Entry
from runtime.metadata import Metadata
from runtime.quantization import read_quantization
from runtime.session import Model, SessionSettings, check_provider

if TYPE_CHECKING:
    from marrq.models.images import ImageSet

IMAGES_AT_ONCE = 8


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
    data: folder of images; None for the demo's own. Without class folders that are classes of the
        model only size and speed are measured.
    options: what is measured, and how.
    say: called with a line for people before each export.
    bars: shows how far the measuring is.

    Raises MarrqError for paths that cannot be measured together, and BenchError for files that
    ONNX Runtime cannot run.
    """
    given = [Path(path) for path in paths]
    # A mistake is told before minutes of exporting and measuring.
    check_paths(given, options)
    check_provider(options.session)
    if data is not None:
        check_data(data, is_measured=options.counts_answers)
    # Artifacts are looked for first: a missing one must not show after minutes of measuring.
    artifacts = (
        {str(path): artifact_of(path, options.artifacts, options.session) for path in given}
        if options.parity_images is not None
        else {}
    )
    images = _images(given[0], data, options)
    # Exports are measured, and gone when the report is there.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = [item for path in given for item in _onnx_files(path, options, folder, say)]
        candidates, metadata = _candidates(files, options)
        beside = tuple(dict.fromkeys(path.resolve().parent for path in given))
        device, _ = options.runs_on
        maker = BaselineMaker(metadata, beside, device, options.session, folder, say)
        baselines = maker.make(options.wanted_baselines)
        if options.max_drop is not None and not baselines.entries:
            raise MarrqError(
                f"--max-drop compares with a baseline, and there is none: {baselines.warnings[0]}"
            )
        entries = [*baselines.entries, *candidates]
        # Parity compares images drawn at random, accuracy all of them.
        if options.parity_images is not None:
            drawn = images.draw(min(options.parity_images, len(images)), 0)
            entries = _with_parity(entries, artifacts, drawn, options.session, bars)
        warnings = (*baselines.warnings, *_other_devices(entries, device))
        return _measured(entries, metadata, images, options, bars, warnings)


def _other_devices(entries: Sequence[Entry], device: str) -> list[str]:
    """A sentence for each file that was made for another device than the one it is measured on."""
    return [
        f"{entry.name} was made for the {entry.device} and is measured on the {device}: its graph "
        "may not be the fastest there"
        for entry in entries
        if entry.device != device
    ]


def _onnx_files(
    path: Path, options: BenchOptions, scratch: Path, say: Callable[[str], None]
) -> list[BenchedFile]:
    """The file itself; or exports of an artifact: in one flavour, or for a recommendation in each
    flavour that can express the scheme."""
    from exporters.choices import flavors_with, suitable_flavor, written_scheme
    from exporters.flavors import VARIANTS, variants
    from exporters.onnx_file import Export, write
    from exporters.trace import trace_quantized
    from marrq.artifact.folder import artifact_hash, load

    if path.is_file():
        return [BenchedFile(path, path)]
    # The hash keeps exports of two artifacts apart that have the same folder name.
    model, artifact = load(path), artifact_hash(path)
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
        files.append(BenchedFile(path, scratch / f"{artifact} {variant}.onnx", variant))
        write(traced, flavor, files[-1].file, {**given, **flavor_options}, device=device)
    return files


def _candidates(
    files: Sequence[BenchedFile], options: BenchOptions
) -> tuple[list[Entry], Metadata]:
    """The files as entries of the bench, and the metadata of the first: source,
    preprocessing and labels are the same in all."""
    from exporters.choices import check_flavor_on

    entries: list[Entry] = []
    (device, _), session = options.runs_on, options.session
    shared = _checked_metadata(files[0], session)
    for given in files:
        metadata = _checked_metadata(given, session)
        check_flavor_on(metadata.flavor, device)
        # Baselines, images and rounds are shared, so all files must come from one float model.
        check_same_model(str(given.path), metadata, shared)
        entries.append(_candidate(given, metadata, {entry.name for entry in entries}))
    return entries, shared


def _checked_metadata(given: BenchedFile, session: SessionSettings) -> Metadata:
    """The metadata of a file. Raises MarrqError for a file that the bench cannot feed."""
    opened = Model(given.file, session)
    metadata = opened.metadata()
    if not metadata.is_marrqs:
        raise MarrqError(
            f"{str(given.path)!r} was not written by `marrq export`: it does not say how its "
            "images are preprocessed"
        )
    # A graph that normalizes images itself takes uint8, and the bench feeds normalized pixels.
    if opened.input.type != "tensor(float)":
        raise MarrqError(
            f"{str(given.path)!r} takes {opened.input.type}, not normalized pixels: bench it as "
            "exported without --preprocess"
        )
    return metadata


def _candidate(given: BenchedFile, metadata: Metadata, taken: set[str]) -> Entry:
    """A file as an entry. taken: names that other entries have."""
    from marrq.artifact.folder import REPORTS

    scheme = metadata.scheme or "float"
    name = " ".join(filter(None, (scheme, metadata.method, given.variant)))
    # Only an artifact tells how its linears were quantized.
    is_artifact = given.path.is_dir()
    return Entry(
        name=name if name not in taken else f"{name} {given.path.name}",
        file=given.file,
        path=str(given.path),
        role="candidate",
        flavor=metadata.flavor,
        device=metadata.device,
        scheme=scheme,
        method=metadata.method,
        bits_per_weight=metadata.bits_per_weight,
        quantization=read_quantization(given.path / REPORTS) if is_artifact else None,
        has_classes=bool(metadata.labels),
    )


def _images(path: Path, data: str | None, options: BenchOptions) -> "ImageSet":
    """The images to measure on. path: an artifact or an ONNX file, which knows the name of the
    float model and the classes before anything is exported.

    Raises MarrqError if the images have no targets and an option counts right answers.
    """
    from marrq.artifact.config import labels_from_json
    from marrq.artifact.folder import read_config
    from marrq.models.images import find_images
    from marrq.workflows.checks import data_for

    if path.is_file():
        metadata = _checked_metadata(BenchedFile(path, path), options.session)
        source, labels = metadata.source_name, metadata.labels
    else:
        config = read_config(path)
        source, labels = config["model"]["name"], labels_from_json(config["labels"])
    images = find_images(data_for(source, data), "val", labels)
    if options.counts_answers:
        images.labelled()
    return images


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
    metadata: Metadata,
    images: "ImageSet",
    options: BenchOptions,
    bars: Bars,
    warnings: Sequence[str],
) -> BenchReport:
    """Accuracy on all images, and speed."""
    from marrq.models.preprocessing import Preprocessing

    preprocessing = Preprocessing.from_json(json.loads(metadata.preprocessing))
    # Read when the bench asks for them: all images together may not fit into memory.
    targets = np.array(images.targets or [NO_TARGET] * len(images))
    batches = (
        (pixels.numpy(), targets[number * IMAGES_AT_ONCE :][: len(pixels)])
        for number, pixels in enumerate(images.batches(preprocessing, IMAGES_AT_ONCE))
    )
    settings = options.settings
    # Latency opens every model once a round; throughput opens it once for each number of threads.
    sessions = options.rounds * len(entries) * (1 + len(settings.throughput_threads))
    with bars(accuracy=len(images), speed=sessions) as [looking, timing]:
        progress = Progress(looking.advance, timing.advance)
        described = ImageData(images.name, len(images), images.sha256)
        report = measure(entries, batches, described, settings, progress, warnings)
    unmeasured = [] if images.targets else [f"accuracy is not measured: {images.why_unlabelled}"]
    # What is noted of the images is known when they have been read.
    return replace(report, warnings=(*report.warnings, *unmeasured, *images.noted()))
