"""The options of `marrq compare` alone."""

from pathlib import Path
from typing import Annotated

from marrq.cli import common

SEEDS = "Number of random draws of the calibration images."
OUTPUT = "JSON file. Runs that it holds are not done again."
RAY = "Do the runs on Ray, one on each CPU or GPU: local, or the address of a cluster."
Seeds = Annotated[int, common.input_option(metavar="N", help=SEEDS, min=1)]
Output = Annotated[Path, common.output_option("-o", "--output", metavar="FILE", help=OUTPUT)]
Ray = Annotated[str | None, common.run_option(metavar="ADDRESS", help=RAY)]
