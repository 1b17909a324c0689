"""`marrq bench`: accuracy, size and latency of exported files beside their float baselines, under ONNX Runtime, in one run."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marrq.cli.common import DataOption, JsonOption, ProviderOption, ThreadsOption, data_for, progress_bars, say, stdout, write_json
from marrq.cli.parity import artifact_of, measure_parity
from marrq.errors import MarrqError

if TYPE_CHECKING:
    from marrq.data import ImageSet
    from runtime.bench import Entry
    from runtime.session import SessionSettings

IMAGES_AT_ONCE = 8


def bench(
    paths: Annotated[list[Path], typer.Argument(help="Artifacts, or ONNX files that `marrq export` wrote.")],
    data: DataOption = None,
    flavor: Annotated[
        str | None, typer.Option(help="Of artifacts: integer, matmulnbits or qdq; left out: what suits the scheme best.")
    ] = None,
    baseline: Annotated[list[str], typer.Option(help="fp16 or fp32; may be repeated.")] = ["fp16", "fp32"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Batch size to time; may be repeated.", min=1)] = [1, 8],  # noqa: B006
    threads: ThreadsOption = None,
    provider: ProviderOption = "cpu",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds of timing.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="Time on each model, batch size and round.", min=0.0)] = 1.0,
    parity: Annotated[
        bool, typer.Option("--parity", help="Tell what quantization, export and preprocessing lose, and name the first that does.")
    ] = False,
    artifact: Annotated[list[Path], typer.Option(help="What an ONNX file was exported from, for --parity; may be repeated.")] = [],  # noqa: B006
    parity_images: Annotated[int, typer.Option(help="Images that --parity compares, drawn at random.", min=1)] = 256,
    json_file: JsonOption = None,
) -> None:
    """Measure files and artifacts beside their baselines: marrq bench artifact --data demo --json bench.json"""
    from marrq.data import find_images
    from marrq.preprocessing import Preprocessing
    from runtime.bench import BenchSettings, Progress
    from runtime.bench import bench as run_bench
    from runtime.report import parity_lines, parity_table, table
    from runtime.session import SessionSettings

    settings = BenchSettings(SessionSettings(provider, threads), tuple(batch), rounds, seconds)
    artifacts = {str(path): artifact_of(path, artifact, settings.session) for path in paths} if parity else {}
    with tempfile.TemporaryDirectory() as scratch:
        entries, metadata = _entries(paths, flavor, baseline, Path(scratch), settings.session)
        preprocessing = Preprocessing.from_json(json.loads(metadata["marrq.preprocessing"]))
        name = data_for(json.loads(metadata["marrq.source"])["name"], data)
        images = find_images(name, "val", tuple(json.loads(metadata["marrq.labels"])))
        if parity:
            entries = _with_parity(entries, artifacts, images.draw(min(parity_images, len(images)), 0), settings.session)
        batches = ((pixels.numpy(), targets.numpy()) for pixels, targets in images.batches(preprocessing, IMAGES_AT_ONCE))
        with progress_bars(accuracy=len(images), latency=rounds * len(entries)) as [looking, timing]:
            report = run_bench(entries, batches, images.description(), settings, Progress(looking.advance, timing.advance))
    stdout.print(table(report))
    for model in report["models"]:
        if model["parity"] is not None:
            stdout.print(parity_table(model))
            stdout.print("\n".join(parity_lines(model["parity"])), highlight=False, markup=False)
    write_json(json_file, report)


def _with_parity(entries: "list[Entry]", artifacts: dict[str, Path], images: "ImageSet", settings: "SessionSettings") -> "list[Entry]":
    """The entries, candidates with how they compare with their artifacts. artifacts: by the path that the user gave."""
    candidates = [entry for entry in entries if entry.role == "candidate"]
    with progress_bars(parity=len(images) * len(candidates)) as [bar]:
        sections = {entry.name: measure_parity(artifacts[entry.path], entry.file, images, settings, bar.advance) for entry in candidates}
    return [replace(entry, parity=sections.get(entry.name)) for entry in entries]


def _entries(
    paths: list[Path], flavor: str | None, baselines: list[str], scratch: Path, settings: "SessionSettings"
) -> "tuple[list[Entry], dict[str, str]]":
    """Baselines and candidates, exported where they have to be, and the metadata that they share: source, preprocessing, labels."""
    from exporters.onnx_file import write_baseline
    from marrq.models import ModelSource, load_source
    from runtime.bench import Entry
    from runtime.session import Model

    candidates: list[Entry] = []
    shared: dict[str, str] = {}
    for path in paths:
        file = _onnx_file(path, flavor, scratch)
        metadata = Model(file, settings).metadata()
        if "marrq.source" not in metadata:
            raise MarrqError(f"{str(path)!r} was not written by `marrq export`: it does not say how its images are preprocessed")
        if shared and metadata["marrq.source"] != shared["marrq.source"]:
            raise MarrqError(f"{str(path)!r} comes from another model than {str(paths[0])!r}: bench them apart")
        shared = metadata
        name = f"{metadata['marrq.scheme']} {metadata['marrq.method']}"
        if any(entry.name == name for entry in candidates):
            name += f" {path.name}"
        bits = float(metadata["marrq.bits_per_weight"])
        candidates.append(Entry(name, file, str(path), "candidate", metadata["marrq.flavor"], bits))
    entries = []
    model = load_source(ModelSource(**json.loads(shared["marrq.source"]))) if baselines else None
    for name in dict.fromkeys(baselines):
        assert model is not None
        say(f"exporting the baseline {name}")
        bits = write_baseline(model, name, scratch / f"{name}.onnx")
        entries.append(Entry(name, scratch / f"{name}.onnx", model.source.name, "baseline", name, bits))
    return entries + candidates, shared


def _onnx_file(path: Path, flavor: str | None, scratch: Path) -> Path:
    """The file itself, or the export of an artifact."""
    from exporters.onnx_file import suitable_flavor, write
    from marrq.artifact import artifact_hash, load

    if not path.exists():
        raise MarrqError(f"{str(path)!r} does not exist: give an artifact or an ONNX file")
    if path.is_file():
        return path
    model = load(path)
    flavor = flavor or suitable_flavor(model)
    say(f"exporting {path} as {flavor}")
    file = scratch / f"{artifact_hash(path)}.onnx"
    write(model, artifact_hash(path), flavor, file)
    return file
