"""The command line: one file a command, which parses, calls a workflow and prints.

Heavy imports stand inside the bodies of the commands, so that `marrq --help` answers at once, and
behind the checks that need none of them, so that a mistake does too.
"""

import sys

import typer

from marrq.cli.bench import bench
from marrq.cli.common import VersionOption
from marrq.cli.compare import compare
from marrq.cli.demo import demo
from marrq.cli.doctor import doctor
from marrq.cli.evaluate import evaluate
from marrq.cli.export import export
from marrq.cli.inspect import inspect
from marrq.cli.quantize import quantize
from marrq.errors import MarrqError
from marrq.workflows.checks import check_packages

# A bug shows Python's own traceback, which can be pasted into a report. An error that marrq raises
# on purpose never gets there, see `main`.
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def program(version: VersionOption = False) -> None:
    """Turn a pretrained vision transformer into a low-bit ONNX file, and measure it."""


# In the order of the help: from a model to a file, then what looks at models and files.
for command in (quantize, export, bench, evaluate, inspect, doctor, compare, demo):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 3 a gate did
    not hold. An error is one sentence on stderr."""
    try:
        check_packages()
        # Before that check this may be somebody else's `runtime`.
        from runtime.errors import BenchError, GateError
    except MarrqError as error:
        return _failed(str(error))
    try:
        app(arguments)
        return 0
    # Typer ends a command by SystemExit: with 0 after --help, with 2 for wrong usage.
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    except (MarrqError, BenchError) as error:
        return _failed(str(error))
    except GateError as error:
        return _failed(str(error), code=3)
    # A disk that is full, a folder that may not be written to: the user needs reason and place.
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _failed(f"{error.strerror or error}{place}")


def _failed(sentence: str, code: int = 1) -> int:
    typer.echo(f"marrq: {sentence}", err=True)
    return code


def run() -> None:
    """The console script."""
    sys.exit(main())
