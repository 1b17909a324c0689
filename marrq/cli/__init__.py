"""The command line: its entry, and what becomes of an error. The commands are in app.py."""

import sys

import typer

from marrq.errors import MarrqError
from marrq.workflows.checks import check_packages

STOPPED = 130
"""The exit code of a command that Ctrl-C ended: 128 and the number of the signal."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 3 a demand
    was not met. An error is one sentence on stderr."""
    try:
        check_packages()
        # Before that check these may be somebody else's `exporters` and `runtime`.
        from marrq.cli.app import app
        from runtime.errors import BenchError, GateError
    except MarrqError as error:
        return _failed(str(error))
    try:
        app(arguments)
        return 0
    # Typer ends a command by SystemExit: with 0 after --help, with 2 for wrong usage.
    except SystemExit as finished:
        # Ctrl-C: Typer says nothing.
        if finished.code == STOPPED:
            return _failed("stopped", STOPPED)
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
