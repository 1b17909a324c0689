"""The options of `marrq inspect`. Some are for a file alone, others for an artifact alone."""

from pathlib import Path
from typing import Annotated

import typer

from marrq.cli import common

FileOrArtifact = Annotated[
    Path, typer.Argument(metavar="FILE|ARTIFACT", help="ONNX file of any tool, or artifact.")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Exit with 3 if a linear runs in float against its scheme."),
]
Optimization = Annotated[
    str,
    common.run_option(metavar="LEVEL", help="Graph optimization: none, basic, extended or all."),
]
Json = Annotated[
    Path | None,
    common.json_option(help="For a file: also write the report as JSON."),
]
Plot = Annotated[
    Path | None,
    common.picture_option("--plot", help="For an artifact: draw the search of α, as .png or .svg."),
]
