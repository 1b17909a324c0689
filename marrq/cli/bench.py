"""`marrq bench`: accuracy, size and latency of exported files beside their float baselines, under
ONNX Runtime, in one run."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from marrq.cli.common import (
    DataOption,
    JsonOption,
    ProviderOption,
    ThreadsOption,
    data_for,
    progress_bars,
    say,
    stdout,
    write_json,
    write_text,
)
from marrq.errors import MarrqError
from marrq.workflows.parity import artifact_of, measure_parity

if TYPE_CHECKING:
    from marrq.models.images import ImageSet
    from runtime.measure.bench import Entry
    from runtime.session import SessionSettings

IMAGES_AT_ONCE = 8


class _File(NamedTuple):
    """An ONNX file of what the user named, and which of several exports of one artifact it is."""

    path: Path
    file: Path
    variant: str = ""


def bench(
    paths: Annotated[
        list[Path], typer.Argument(help="Artifacts, or ONNX files that `marrq export` wrote.")
    ],
    data: DataOption = None,
    flavor: Annotated[
        str | None,
        typer.Option(
            help="Of artifacts: integer, matmulnbits or qdq; left out: what suits the scheme best."
        ),
    ] = None,
    baseline: Annotated[list[str], typer.Option(help="fp16 or fp32; may be repeated.")] = [
        "fp16",
        "fp32",
    ],
    batch: Annotated[
        list[int], typer.Option(help="Batch size to time; may be repeated.", min=1)
    ] = [1, 8],
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of timing.", min=1)] = 5,
    seconds: Annotated[
        float, typer.Option(help="Time on each model, batch size and round.", min=0.0)
    ] = 1.0,
    parity: Annotated[
        bool,
        typer.Option(
            "--parity",
            help="Tell what quantization, export and preprocessing lose, and name the first that does.",
        ),
    ] = False,
    artifact: Annotated[
        list[Path],
        typer.Option(help="What an ONNX file was exported from, for --parity; may be repeated."),
    ] = [],
    parity_images: Annotated[
        int, typer.Option(help="Images that --parity compares, drawn at random.", min=1)
    ] = 256,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput",
            help="Images per second with 1, 2, 4 … threads too, up to --threads: marrq bench artifact --throughput",
        ),
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of top-1 that may be lost against fp32; exit code 3 where it is surely more: marrq bench artifact --max-drop 1.0",
            min=0.0,
        ),
    ] = None,
    recommend: Annotated[
        bool,
        typer.Option(
            "--recommend",
            help="Every flavour that an artifact can have; the best for size, latency and accuracy: marrq bench artifact --recommend",
        ),
    ] = False,
    json_file: JsonOption = None,
    page_file: Annotated[
        Path | None,
        typer.Option("--report", help="Also write it here as a page for people, .html."),
    ] = None,
) -> None:
    """Measure files and artifacts beside their baselines: marrq bench artifact --data demo --json
    bench.json"""
    from marrq.models.images import find_images
    from marrq.models.preprocessing import Preprocessing
    from runtime.environment import usable_cores
    from runtime.measure.bench import BenchSettings, Progress
    from runtime.measure.bench import bench as run_bench
    from runtime.measure.latency import Plan, thread_counts
    from runtime.report.html import check_page, page
    from runtime.report.inspection import shortfalls
    from runtime.report.tables import parity_table, sentences, table, throughput_table
    from runtime.session import SessionSettings

    if page_file is not None:
        check_page(page_file)
    if recommend and flavor is not None:
        raise MarrqError(f"--recommend measures every flavour: leave out --flavor {flavor}")
    counts = thread_counts(threads or usable_cores()) if throughput else ()
    plan = Plan(tuple(batch), rounds, seconds)
    settings = BenchSettings(SessionSettings(provider, threads), plan, counts, max_drop, recommend)
    artifacts = (
        {str(path): artifact_of(path, artifact, settings.session) for path in paths}
        if parity
        else {}
    )
    with tempfile.TemporaryDirectory() as scratch:
        files = [
            item for path in paths for item in _onnx_files(path, flavor, recommend, Path(scratch))
        ]
        entries, metadata = _entries(files, baseline, Path(scratch), settings.session)
        preprocessing = Preprocessing.from_json(json.loads(metadata["marrq.preprocessing"]))
        name = data_for(json.loads(metadata["marrq.source"])["name"], data)
        images = find_images(name, "val", tuple(json.loads(metadata["marrq.labels"])))
        if parity:
            entries = _with_parity(
                entries,
                artifacts,
                images.draw(min(parity_images, len(images)), 0),
                settings.session,
            )
        batches = (
            (pixels.numpy(), targets.numpy())
            for pixels, targets in images.batches(preprocessing, IMAGES_AT_ONCE)
        )
        sessions = rounds * len(entries) * (1 + len(counts))
        with progress_bars(accuracy=len(images), speed=sessions) as [looking, timing]:
            report = run_bench(
                entries,
                batches,
                images.description(),
                settings,
                Progress(looking.advance, timing.advance),
            )
    write_json(json_file, report)
    if page_file is not None:
        write_text(page_file, page(report))
    stdout.print(table(report))
    if throughput:
        stdout.print(throughput_table(report))
    for model in report["models"]:
        if model["parity"] is not None:
            stdout.print(parity_table(model))
    for sentence in (*shortfalls(report), *sentences(report)):
        stdout.print(sentence, highlight=False, soft_wrap=True, markup=False)
    _check_gate(report)


def _with_parity(
    entries: "list[Entry]",
    artifacts: dict[str, Path],
    images: "ImageSet",
    settings: "SessionSettings",
) -> "list[Entry]":
    """The entries, candidates with how they compare with their artifacts. artifacts: by the path
    that the user gave."""
    candidates = [entry for entry in entries if entry.role == "candidate"]
    with progress_bars(parity=len(images) * len(candidates)) as [bar]:
        sections = {
            entry.name: measure_parity(
                artifacts[entry.path], entry.file, images, settings, bar.advance
            )
            for entry in candidates
        }
    return [replace(entry, parity=sections.get(entry.name)) for entry in entries]


def _check_gate(report: dict[str, Any]) -> None:
    """Raise GateError for candidates that failed; warn of those that the images are too few for."""
    from runtime.errors import GateError

    gate = report["gate"] or {"models": []}
    names = {
        verdict: [model["name"] for model in gate["models"] if model["verdict"] == verdict]
        for verdict in ("failed", "undecided")
    }
    if names["undecided"]:
        say(
            f"warning: the gate of {gate['max_drop']:g} points is undecided for "
            f"{', '.join(names['undecided'])}: too few images"
        )
    if names["failed"]:
        raise GateError(
            f"{', '.join(names['failed'])} lost more than {gate['max_drop']:g} points against "
            f"{gate['baseline']}"
        )


def _entries(
    files: list[_File], baselines: list[str], scratch: Path, settings: "SessionSettings"
) -> "tuple[list[Entry], dict[str, str]]":
    """Baselines, exported, and candidates, and the metadata that they share: source, preprocessing,
    labels."""
    from exporters.onnx_file import write_baseline
    from marrq.artifact.folder import REPORTS
    from marrq.models.load import ModelSource, load_source
    from runtime.measure.bench import Entry
    from runtime.session import Model

    candidates: list[Entry] = []
    shared: dict[str, str] = {}
    for given in files:
        opened = Model(given.file, settings)
        metadata = opened.metadata()
        if "marrq.source" not in metadata:
            raise MarrqError(
                f"{str(given.path)!r} was not written by `marrq export`: it does not say how its "
                "images are preprocessed"
            )
        if opened.input.type != "tensor(float)":
            raise MarrqError(
                f"{str(given.path)!r} takes {opened.input.type}, not normalized pixels: bench it "
                "as exported without --preprocess"
            )
        if shared and metadata["marrq.source"] != shared["marrq.source"]:
            raise MarrqError(
                f"{str(given.path)!r} comes from another model than {str(files[0].path)!r}: bench "
                "them apart"
            )
        shared = metadata
        flavor, scheme, method = (
            metadata[f"marrq.{key}"] for key in ("flavor", "scheme", "method")
        )
        name = " ".join(filter(None, (scheme, method, given.variant)))
        if any(entry.name == name for entry in candidates):
            name += f" {given.path.name}"
        quantization = (
            json.loads((given.path / REPORTS).read_text()) if given.path.is_dir() else None
        )
        bits = float(metadata["marrq.bits_per_weight"])
        candidates.append(
            Entry(
                name,
                given.file,
                str(given.path),
                "candidate",
                flavor,
                scheme,
                method,
                bits,
                quantization,
            )
        )
    entries = []
    model = load_source(ModelSource(**json.loads(shared["marrq.source"]))) if baselines else None
    for name in dict.fromkeys(baselines):
        assert model is not None
        say(f"exporting the baseline {name}")
        bits = write_baseline(model, name, scratch / f"{name}.onnx")
        entries.append(
            Entry(
                name,
                scratch / f"{name}.onnx",
                model.source.name,
                "baseline",
                name,
                name,
                "none",
                bits,
            )
        )
    return entries + candidates, shared


def _onnx_files(path: Path, flavor: str | None, recommend: bool, scratch: Path) -> list[_File]:
    """The file itself, or the export of an artifact: in the flavour asked for or the most suitable
    one, or in each that can express it."""
    from exporters.onnx_file import NO_OPTIONS, VARIANTS, suitable_flavor, variants, write
    from marrq.artifact.folder import artifact_hash, load

    if not path.exists():
        raise MarrqError(f"{str(path)!r} does not exist: give an artifact or an ONNX file")
    if path.is_file():
        return [_File(path, path)]
    model = load(path)
    if recommend:
        chosen = {variant: VARIANTS[variant] for variant in variants(model.scheme)}
    else:
        chosen = {"": (flavor or suitable_flavor(model), NO_OPTIONS)}
    files = []
    for variant, (lowered_as, options) in chosen.items():
        say(f"exporting {path} as {variant or lowered_as}")
        files.append(_File(path, scratch / f"{artifact_hash(path)} {variant}.onnx", variant))
        write(model, artifact_hash(path), lowered_as, files[-1].file, options)
    return files
