"""`marrq export`: an artifact in; an ONNX file, or a model in a repository of Triton Inference
Server, out."""

import json
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marrq.cli.common import ForceOption, OutputOption, say
from marrq.errors import MarrqError

if TYPE_CHECKING:
    from exporters.choices import Options
    from exporters.onnx_file import Export

FORMATS = ("onnx", "triton")
SERVER = "For --format triton"
BENCH_SCHEMA = "marrq.bench/2"


def export(
    artifact: Annotated[Path, typer.Argument(help="A folder that `marrq quantize` wrote.")],
    output: OutputOption,
    format: Annotated[
        str,
        typer.Option(
            help="onnx: a file; triton: a model in a repository, which is made or added to."
        ),
    ] = "onnx",
    flavor: Annotated[
        str | None,
        typer.Option(
            help="integer, matmulnbits, qdq, or a float baseline: fp32, fp16. Left out: what suits the scheme best."
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric",
            help="qdq: only what TensorRT takes; needs a scheme such as W4A16-g128-sym.",
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="matmulnbits: 1 computes in float32 (default), 4 quantizes activations to int8."
        ),
    ] = None,
    fuse: Annotated[
        bool | None,
        typer.Option(
            "--fuse/--no-fuse",
            help="integer, matmulnbits: attention as one operator (default; ONNX Runtime 1.24.1), or as two products.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Of the model, as clients address it.", rich_help_panel=SERVER)
    ] = "vit",
    model_version: Annotated[
        int, typer.Option(help="A server takes the highest.", min=1, rich_help_panel=SERVER)
    ] = 1,
    backend: Annotated[
        str,
        typer.Option(
            help="onnxruntime; or python, which runs onnxruntime where a server lacks that backend.",
            rich_help_panel=SERVER,
        ),
    ] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or gpu.", rich_help_panel=SERVER)] = "cpu",
    instances: Annotated[
        int,
        typer.Option(help="Copies that run at once; on each GPU.", min=1, rich_help_panel=SERVER),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="Of one operator; left out: one a core.", min=1, rich_help_panel=SERVER),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Images in one run at most.", min=1, rich_help_panel=SERVER)
    ] = 8,
    queue_delay: Annotated[
        int,
        typer.Option(
            help="Microseconds that a request may wait for others to join it.",
            min=0,
            rich_help_panel=SERVER,
        ),
    ] = 0,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="A JSON of `marrq bench`: its fastest batch sizes are preferred.",
            rich_help_panel=SERVER,
        ),
    ] = None,
    preprocess: Annotated[
        bool,
        typer.Option(
            "--preprocess",
            help="Take uint8 images, and normalize them in the graph.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Export an artifact: marrq export artifact --format onnx -o model.onnx; or --format triton -o
    repository --name vit"""
    from exporters.flavors import suitable_flavor
    from exporters.onnx_file import Export
    from marrq.artifact.folder import artifact_hash, load

    server = {
        "name": name,
        "model_version": model_version,
        "backend": backend,
        "device": device,
        "instances": instances,
        "threads": threads,
        "max_batch": max_batch,
        "queue_delay": queue_delay,
        "preprocess": preprocess,
    }
    _check_format(format, output, force, {**server, "bench": bench})
    model = load(artifact)
    flavor = flavor or suitable_flavor(model.scheme)
    given = {"symmetric": symmetric, "accuracy_level": accuracy_level, "fuse": fuse}
    options: Options = {option: value for option, value in given.items() if value is not None}
    exported = Export(model, artifact_hash(artifact), flavor, options)
    say(f"tracing {model.source.name} as {flavor}")
    if format == "onnx":
        _export_file(exported, output)
    else:
        _export_to_repository(exported, output, force, bench, server)


def _check_format(format: str, output: Path, force: bool, server: dict[str, Any]) -> None:
    """Raise MarrqError for an unknown format, for an option that the format does not have, and for
    a file that is there."""
    from exporters.external_data import external_data
    from marrq.files import check_output

    if format not in FORMATS:
        raise MarrqError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "onnx":
        for option, value in server.items():
            if value != signature(export).parameters[option].default:
                raise MarrqError(
                    f"--{option.replace('_', '-')} is about a server: use it with --format triton"
                )
        for place in (output, external_data(output)):
            check_output(place, force)


def _export_file(exported: "Export", output: Path) -> None:
    from runtime.audit.graph import size_bytes

    exported.write(output)
    say(f"wrote {output}: {size_bytes(output) / 1e6:.2f} MB")


def _export_to_repository(
    exported: "Export",
    repository: Path,
    force: bool,
    bench: Path | None,
    server: dict[str, Any],
) -> None:
    from exporters.triton.repository import Serving, preferred_batches, write_repository

    preferred = (
        preferred_batches(
            _bench_report(bench), exported.flavor, str(exported.model.scheme), server["max_batch"]
        )
        if bench
        else ()
    )
    serving = Serving(**server, preferred=preferred)
    folder = write_repository(exported, repository, serving, force)
    say(
        f"wrote {folder / str(serving.model_version)}; serve it with: tritonserver "
        f"--model-repository {repository}"
    )


def _bench_report(file: Path) -> dict[str, Any]:
    """What a bench wrote. Raises MarrqError for anything else."""
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        schema = report["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise MarrqError(
            f"{str(file)!r} is no bench: give what `marrq bench --json` wrote"
        ) from error
    if schema != BENCH_SCHEMA:
        raise MarrqError(
            f"{str(file)!r} has schema {schema!r}, not {BENCH_SCHEMA!r}: give what `marrq bench "
            "--json` wrote"
        )
    return report
