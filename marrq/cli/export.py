"""`marrq export`: artifact in, ONNX file out."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli.common import ForceOption, OutputOption, say


def export(
    artifact: Annotated[Path, typer.Argument(help="A folder that `marrq quantize` wrote.")],
    output: OutputOption,
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    flavor: Annotated[
        str | None,
        typer.Option(help="integer, matmulnbits, qdq, or a float baseline: fp32, fp16. Left out: what suits the scheme best."),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric", help="qdq: only what TensorRT takes; needs a scheme such as W4A16-g128-sym.")
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="matmulnbits: 1 computes in float32 (default), 4 quantizes activations to int8.")
    ] = None,
    fuse: Annotated[
        bool | None,
        typer.Option(
            "--fuse/--no-fuse", help="integer, matmulnbits: attention as one operator (default; ONNX Runtime 1.24.1), or as two products."
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Export an artifact as an ONNX file: marrq export artifact --format onnx -o model.onnx"""
    from exporters.onnx_file import check_flavor, external_data, suitable_flavor, write
    from marrq.artifact import artifact_hash, check_output, load
    from marrq.errors import MarrqError
    from runtime.graph import size_bytes

    if format != "onnx":
        raise MarrqError(f"unknown format {format!r}: choose onnx")
    for place in (output, external_data(output)):
        check_output(place, force)
    model = load(artifact)
    flavor = flavor or suitable_flavor(model)
    given = {"symmetric": symmetric, "accuracy_level": accuracy_level, "fuse": fuse}
    options = {name: value for name, value in given.items() if value is not None}
    check_flavor(model, flavor, options)
    say(f"tracing {model.source.name} as {flavor}")
    write(model, artifact_hash(artifact), flavor, output, options)
    say(f"wrote {output}: {size_bytes(output) / 1e6:.2f} MB")
