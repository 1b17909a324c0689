"""The options of `marrq bench`, in the panels of its help."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exporters.choices import BASELINES, quantized_flavors
from marrq.cli import common
from marrq.models.images.counts import PARITY_IMAGES

compared = partial(typer.Option, rich_help_panel="What is compared")
timed = partial(typer.Option, rich_help_panel="How latency is measured")
checked = partial(typer.Option, rich_help_panel="Checks and advice")

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="ARTIFACT|FILE", help="Artifacts, or ONNX files of marrq export."),
]

Flavor = Annotated[
    str | None,
    compared(
        metavar="NAME",
        help=f"For artifacts: {', '.join(quantized_flavors())}; default: by the scheme.",
    ),
]
Baselines = Annotated[
    list[str],
    compared(
        "--baseline",
        metavar="NAME|FILE",
        help=f"{' or '.join(BASELINES)}, the float model; an ONNX file with an export of it; or "
        "none. May be repeated. Default: fp16 and fp32, if the float model is at hand.",
        show_default=False,
    ),
]

Batches = Annotated[
    list[int], timed("--batch", metavar="N", help="Batch size. May be repeated.", min=1)
]
Rounds = Annotated[int, timed(metavar="N", help="Rounds; each times every model in turn.", min=1)]
Seconds = Annotated[
    float,
    timed(metavar="N", help="Seconds a model, batch size and round; at most 200 runs.", min=0.0),
]
Throughput = Annotated[
    bool, timed("--throughput", help="Also images per second: 1, 2, 4 … threads, up to --threads.")
]

Parity = Annotated[
    bool, checked("--parity", help="Find what loses: quantization, export or preprocessing.")
]
Artifacts = Annotated[
    list[Path],
    checked(
        "--artifact",
        metavar="ARTIFACT",
        help="For --parity: what an ONNX file was exported from. May be repeated.",
    ),
]
ParityImages = Annotated[
    int | None,
    checked(
        metavar="N", help=f"Images for --parity, drawn at random; default: {PARITY_IMAGES}.", min=1
    ),
]
Recommend = Annotated[
    bool, checked("--recommend", help="Measure every flavour of an artifact; name the best.")
]

Page = Annotated[
    Path | None,
    common.picture_option("--report", help="Also write the report as one HTML page."),
]
