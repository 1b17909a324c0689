"""The command line: one file a command. A body parses, calls the library, prints; heavy imports
stand inside the bodies, so that `marrq --help` answers at once."""

import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from marrq.cli.bench import bench
from marrq.cli.compare import compare
from marrq.cli.demo import demo
from marrq.cli.doctor import doctor
from marrq.cli.evaluate import evaluate
from marrq.cli.export import export
from marrq.cli.inspect import inspect
from marrq.cli.quantize import quantize
from marrq.errors import MarrqError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a pretrained vision transformer into a small, fast, accurate low-bit ONNX file, and measure it.",
)
for command in (quantize, export, bench, evaluate, inspect, doctor, compare, demo):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 3 a gate did
    not hold. Errors are one sentence on stderr."""
    try:
        check_packages()
        from runtime.errors import BenchError, GateError
    except MarrqError as error:
        return _failed(str(error))
    try:
        app(arguments)
        return 0
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    except (MarrqError, BenchError) as error:
        return _failed(str(error))
    except GateError as error:
        return _failed(str(error), code=3)
    except OSError as error:
        return _failed(
            f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        )


def _failed(sentence: str, code: int = 1) -> int:
    typer.echo(f"marrq: {sentence}", err=True)
    return code


def check_packages() -> None:
    """`exporters` and `runtime` are common names: another package of that name, found first, must
    not be taken for ours."""
    for name in ("exporters", "runtime"):
        ours = Path(__file__).parents[2] / name / "__init__.py"
        found = find_spec(name)
        if found is None or found.origin != str(ours):
            place = found.origin if found else "nothing"
            raise MarrqError(
                f"marrq's package {name!r} is shadowed by {place}: run from another folder, or "
                "remove that package"
            )


def run() -> None:
    """The console script."""
    sys.exit(main())
