"""The options of `marrq export`, in the panels of its help.

Each option about the server is a field of Serving (exporters/triton/serving.py).
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exporters.choices import flavor_help, option_help
from marrq.cli import common

lowered = partial(typer.Option, rich_help_panel="Flavour")
served = partial(typer.Option, rich_help_panel="Server, with --format triton")

Flavor = Annotated[
    str | None,
    lowered(metavar="NAME", help=f"{flavor_help()} Default: by scheme and device."),
]
Device = Annotated[
    str, lowered(metavar="NAME", help="cpu or gpu: what the model runs on; gpu writes folded.")
]
Symmetric = Annotated[bool | None, lowered("--symmetric", help=option_help("symmetric"))]
Level = Annotated[int | None, lowered(metavar="N", help=option_help("accuracy_level"))]
Fuse = Annotated[bool | None, lowered("--fuse/--no-fuse", help=option_help("fuse"))]
Float32 = Annotated[bool | None, lowered("--float32", help=option_help("float32"))]
WeightsOnly = Annotated[bool | None, lowered("--weights-only", help=option_help("weights_only"))]
Format = Annotated[
    str, common.output_option(metavar="NAME", help="onnx: a file; triton: a server's repository.")
]

Name = Annotated[str, served(metavar="NAME", help="Name of the model, for clients.")]
Version = Annotated[int, served(metavar="N", help="Version; a server takes the highest.", min=1)]
Backend = Annotated[
    str,
    served(
        metavar="NAME",
        help="onnxruntime; or python, which runs onnxruntime on servers without that backend.",
    ),
]
Instances = Annotated[int, served(metavar="N", help="Copies that run at once, on each GPU.", min=1)]
Threads = Annotated[
    int | None, served(metavar="N", help="Threads of one operator; default: one a core.", min=1)
]
MaxBatch = Annotated[int, served(metavar="N", help="Most images in one run.", min=1)]
QueueDelay = Annotated[
    int, served(metavar="MICROSECONDS", help="How long a request may wait.", min=0)
]
Bench = Annotated[
    Path | None,
    served(metavar="FILE", help="JSON of marrq bench; prefer its best batches."),
]
Preprocess = Annotated[
    bool, served("--preprocess", help="Take uint8 images; the model normalizes them.")
]
