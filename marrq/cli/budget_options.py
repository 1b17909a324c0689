"""The options that say how large a quantized model may be (marrq/budget.py)."""

from pathlib import Path
from typing import Annotated

from marrq.cli import common

Budget = Annotated[
    str | None,
    common.quantization_option(
        metavar="BITS|auto",
        help="Give each linear 2, 3, 4 or 8 bits, so that all take so many bits a weight, scales "
        "included; or auto, for the smallest model within --max-drop. The scheme is then WmixA8.",
    ),
]
MaxSize = Annotated[
    str | None,
    common.quantization_option(
        metavar="SIZE",
        help="The same by the size of all tensors of the artifact, such as 10MB.",
    ),
]
MaxDrop = Annotated[
    float | None,
    common.quantization_option(
        metavar="POINTS",
        help="For --budget auto: points of top-1 that may be lost on the images in val/.",
        min=0.0,
    ),
]
SensitivityFile = Annotated[
    Path | None,
    common.quantization_option(
        "--sensitivity",
        metavar="FILE",
        help="For a budget: what marrq sensitivity --json wrote, in place of measuring again.",
        dir_okay=False,
        exists=True,
    ),
]
