"""`marrq export`: artifact in, ONNX file out."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli.common import ForceOption, OutputOption, say


def export(
    artifact: Annotated[Path, typer.Argument(help="A folder that `marrq quantize` wrote.")],
    output: OutputOption,
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    flavor: Annotated[str, typer.Option(help="integer, or a float baseline: fp32, fp16.")] = "integer",
    force: ForceOption = False,
) -> None:
    """Export an artifact as an ONNX file: marrq export artifact --format onnx -o model.onnx"""
    from exporters.onnx_file import check_flavor, write
    from marrq.artifact import artifact_hash, check_output, load
    from marrq.errors import MarrqError

    if format != "onnx":
        raise MarrqError(f"unknown format {format!r}: choose onnx")
    check_output(output, force)
    model = load(artifact)
    check_flavor(model, flavor)
    say(f"tracing {model.source.name} as {flavor}")
    write(model, artifact_hash(artifact), flavor, output)
    say(f"wrote {output}: {output.stat().st_size / 1e6:.2f} MB")
