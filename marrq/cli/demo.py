"""`marrq demo`: the whole path on the ViT that travels inside the package, without a network."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli.bench import bench
from marrq.cli.common import ForceOption, say
from marrq.cli.export import export
from marrq.cli.quantize import quantize


def demo(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the artifact, the ONNX file and the report."
        ),
    ] = Path("marrq-demo"),
    force: ForceOption = False,
) -> None:
    """Quantize, export and measure the built-in ViT on 1,000 held-out digits, in under two
    minutes."""
    import runtime.session  # noqa: F401  (says at once when ONNX Runtime is missing)

    artifact, file, report = output / "artifact", output / "model.onnx", output / "bench.json"
    quantize("demo", artifact, force=force)
    export(artifact, file, force=force)
    bench([file], json_file=report)
    say(f"files are in {output}: {', '.join(path.name for path in (artifact, file, report))}")
