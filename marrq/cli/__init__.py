"""The command line: one file a command. A body parses, calls the library, prints; heavy imports stand inside the bodies, so that
`marrq --help` answers at once."""

import sys

import typer

from marrq.cli.bench import bench
from marrq.cli.demo import demo
from marrq.cli.evaluate import evaluate
from marrq.cli.export import export
from marrq.cli.quantize import quantize
from marrq.errors import MarrqError
from runtime.errors import BenchError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a pretrained vision transformer into a small, fast, accurate low-bit ONNX file, and measure it.",
)
for command in (quantize, export, bench, evaluate, demo):
    app.command()(command)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 wrong usage. Errors are one sentence on stderr."""
    try:
        app(arguments)
    except SystemExit as finished:
        return finished.code if isinstance(finished.code, int) else 0
    except (MarrqError, BenchError) as error:
        typer.echo(f"marrq: {error}", err=True)
    except OSError as error:
        typer.echo(f"marrq: {error.strerror or error}: {error.filename}", err=True)
    return 1


def run() -> None:
    """The console script."""
    sys.exit(main())
