"""The options that say how large a quantized model may be (marrq/budget.py)."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from marrq.cli.common import OTHER_SETTINGS, quantization_option

budgeted = partial(typer.Option, rich_help_panel="Budget")

Budget = Annotated[
    str | None,
    budgeted(
        metavar="BITS|auto",
        help="Bits a weight in all, scales included: each linear gets 2, 3, 4 or 8 bits (scheme "
        "WmixA8). Or auto: the smallest model within --max-drop.",
    ),
]
MaxSize = Annotated[
    str | None,
    budgeted(
        metavar="SIZE",
        help="The same by the size of all tensors, such as 10MB.",
    ),
]
MaxDrop = Annotated[
    float | None,
    budgeted(
        metavar="POINTS",
        help="For auto: points of top-1 (of k-NN for embeddings) that may be lost on val/.",
        min=0.0,
    ),
]
SensitivityFile = Annotated[
    Path | None,
    budgeted(
        "--sensitivity",
        metavar="FILE",
        help="What marrq sensitivity --json wrote: not measured again.",
        dir_okay=False,
        exists=True,
    ),
]

# Options of `marrq sensitivity`, where they differ from those of `quantize`.
MixedScheme = Annotated[
    str | None,
    quantization_option(
        "--scheme",
        metavar="WmixAy",
        help="Bits of activations behind Wmix; default: WmixA8. Suffixes as for quantize.",
    ),
]
COSTS_FOLLOW = [key for key in OTHER_SETTINGS if not key.startswith("refine")]
SettingOfCosts = Annotated[
    list[str],
    quantization_option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Another setting of the method: {', '.join(COSTS_FOLLOW)}. May be repeated.",
    ),
]
