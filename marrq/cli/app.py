"""All commands, one file each: a command parses, calls a workflow and prints.

Heavy imports stand inside the bodies of the commands, so that `marrq --help` answers at once, and
behind the checks that need none of them, so that a mistake does too.
"""

import typer

from marrq.cli.bench import bench
from marrq.cli.classes import classes
from marrq.cli.common import VersionOption
from marrq.cli.compare import compare
from marrq.cli.demo import demo
from marrq.cli.doctor import doctor
from marrq.cli.evaluate import evaluate
from marrq.cli.export import export
from marrq.cli.inspect import inspect
from marrq.cli.quantize import quantize
from marrq.cli.sensitivity import sensitivity

# A bug shows Python's own traceback, which can be pasted into a report. An error that marrq raises
# on purpose never gets there, see `main`.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def program(version: VersionOption = False) -> None:
    """Turn a pretrained vision transformer into a low-bit ONNX file, and measure it."""


def _spelled(name: str) -> str:
    """An option's name as the commands spell it: --flavour is taken for --flavor."""
    return "flavor" if name == "flavour" else name


# In the order of the help: from a model to a file, then what looks at models and files.
MAKING = (quantize, classes, export)
LOOKING = (bench, evaluate, inspect, doctor, compare, sensitivity, demo)
for command in MAKING + LOOKING:
    app.command(context_settings={"token_normalize_func": _spelled})(command)
