"""The options of `marrq bench` that say what files run on, in a panel of its help."""

from functools import partial
from typing import Annotated

import typer

from exporters.choices import option_help

placed = partial(typer.Option, rich_help_panel="What it runs on")

Device = Annotated[
    str | None,
    placed(
        metavar="NAME",
        help="cpu or gpu: what artifacts and baselines are exported for, and run on. Default: cpu.",
    ),
]
Provider = Annotated[
    str | None,
    placed(
        metavar="NAME",
        help="Execution provider: cpu, cuda or tensorrt. Default: by the device.",
    ),
]
CudaGraph = Annotated[
    bool, placed("--cuda-graph", help="With --device gpu: time recorded CUDA graphs.")
]
WeightsOnly = Annotated[bool, placed("--weights-only", help=option_help("weights_only"))]
