"""What several commands share: their options, the progress bars, lines for people."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from marrq import __version__
from marrq.files import write_json
from marrq.methods.lowrank_spec import LowRankKind
from marrq.methods.registry import method_names_for_help
from marrq.methods.spec import METHOD_SETTINGS
from marrq.models.images.counts import FEWEST_IMAGES
from marrq.outputs import check_report, no_picture, no_report

if TYPE_CHECKING:
    from marrq.methods.spec import MethodSpec

# Results go to stdout, so that they can be piped; progress, warnings and errors go to stderr.
# A path with square brackets is no markup.
stdout = Console(markup=False)
stderr = Console(stderr=True, markup=False)

# Options stand in panels of the help. A panel is one question of the user, and has the same name in
# every command. A metavar says what to write; without it the help would show a type of Python.
# Square brackets would be read as rich's markup, so help texts have none.
input_option = partial(typer.Option, rich_help_panel="Input")
quantization_option = partial(typer.Option, rich_help_panel="Quantization")
run_option = partial(typer.Option, rich_help_panel="Run")
output_option = partial(typer.Option, rich_help_panel="Output")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"marrq {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool,
    # Eager: printed before a command is asked for.
    typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
]

# What is quantized or measured, and the images for it.
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="demo, a timm name, hf-hub:NAME, local-dir:FOLDER, or a transformers id or folder.",
    ),
]
OutputsOption = Annotated[
    str | None,
    input_option(
        metavar="NAMES",
        help="Outputs to take, such as features,tokens of timm or last_hidden_state of "
        "transformers; default: logits, or else features.",
    ),
]
DataOption = Annotated[
    str | None,
    input_option(
        "--data",
        metavar="FOLDER",
        help="Images: any folder to calibrate; one folder for each class to measure accuracy. In "
        "train/ and val/ if these exist. Or demo; the model demo needs none.",
    ),
]
GalleryOption = Annotated[
    int,
    input_option(
        metavar="N",
        help="For embeddings: most images of train/ that k-NN looks among.",
        min=1,
    ),
]
ClassesOption = Annotated[
    Path | None,
    input_option(
        "--classes",
        metavar="FILE",
        help="For a model that gives features: classes that marrq classes wrote.",
    ),
]
SamplesOption = Annotated[
    int | None,
    input_option(
        metavar="N",
        help="Number of calibration images, drawn at random; default: 1024, or all if fewer.",
        min=FEWEST_IMAGES,
    ),
]
SeedOption = Annotated[int, input_option(metavar="N", help="Seed of that random draw.", min=0)]

# Names come from where they are defined, so that the help knows a new one at once.
LOWRANK_KINDS = ", ".join(get_args(LowRankKind))
# Settings that have an option of their own are left out, and `pid.…` stands for all of a kind.
NAMED_SETTINGS = ("alpha", "feedback", "lowrank", "rotate", "refine")
OTHER_SETTINGS = dict.fromkeys(
    f"{key.partition('.')[0]}.…" if "." in key else key
    for key in METHOD_SETTINGS
    if key not in NAMED_SETTINGS
)

# What the codes become: bits and grids, then the method and its settings.
SchemeOption = Annotated[
    str | None,
    quantization_option(
        metavar="WxAy",
        help="Bits of weights (2, 3, 4, 8) and activations (3, 4, 8, 16); default: W4A8, with a "
        "budget WmixA8. Suffixes: -gSIZE groups of inputs, -sym zero points of 0, -mxint blocks of "
        "32 with one power of two, -e8 ends in 8 bits.",
    ),
]
SchemesOption = Annotated[
    list[str],
    quantization_option(
        "--scheme",
        metavar="WxAy",
        help="As for quantize; :per-token behind for dynamic activations. May be repeated.",
    ),
]
ActivationsOption = Annotated[
    str,
    quantization_option(metavar="NAME", help="per-tensor (static) or per-token (dynamic)."),
]
MethodOption = Annotated[
    str,
    quantization_option(
        metavar="NAME",
        help=method_names_for_help(),
    ),
]
MethodsOption = Annotated[
    list[str],
    quantization_option(
        "--method",
        metavar="METHOD",
        help="NAME,KEY=VALUE,… such as marr-gptaq,alpha=grid; default: all. May be repeated.",
    ),
]
AlphaOption = Annotated[
    str | None,
    quantization_option(
        metavar="HOW",
        help="How marr finds α: pid (default), grid or closed; or global=VALUE, one for all.",
    ),
]
FeedbackOption = Annotated[
    str | None,
    quantization_option(
        metavar="NAME",
        help="Judge of α: held-out (default) or calibration.",
    ),
]
LowrankOption = Annotated[
    str | None,
    quantization_option(
        metavar="KIND:RANK",
        help=f"Beside the codes: {LOWRANK_KINDS}. A low-rank branch, in 8 bits with :int8 "
        "behind; serq: second codes of salient columns.",
    ),
]
RotateOption = Annotated[
    bool, quantization_option("--rotate", help="Rotate the residual stream first.")
]
RefineOption = Annotated[
    bool,
    quantization_option(
        "--refine",
        help="Then train scales and norms on more images.",
    ),
]
SettingOption = Annotated[
    list[str],
    quantization_option(
        "--set",
        metavar="KEY=VALUE",
        help=f"Another setting of the method: {', '.join(OTHER_SETTINGS)}. May be repeated.",
    ),
]

# How the work is done; the result does not depend on it, the device apart.
DeviceOption = Annotated[str, run_option(metavar="NAME", help="auto, cpu or cuda.")]
WorkDirOption = Annotated[
    Path | None,
    run_option(
        metavar="FOLDER",
        help="Keep calibration tokens in files of this folder, not in memory.",
        file_okay=False,
    ),
]
ResumeOption = Annotated[
    bool,
    run_option("--resume", help="Go on with a run that was stopped, if it was."),
]
ThreadsOption = Annotated[
    int | None,
    run_option(metavar="N", help="Threads of one operator; default: one a core.", min=1),
]
ProviderOption = Annotated[
    str, run_option(metavar="NAME", help="Execution provider: cpu, cuda or tensorrt.")
]
# What is written.
OutputOption = Annotated[
    Path, output_option("-o", "--output", metavar="PATH", help="Where to write.")
]
ForceOption = Annotated[
    bool, output_option("--force", help="Replace an output that marrq wrote; never anything else.")
]


def _check_json(file: Path | None) -> Path | None:
    # When the command is read, so that no hour of work ends in a refusal.
    if file is not None:
        check_report(file, no_report)
    return file


def _check_picture(file: Path | None) -> Path | None:
    if file is not None:
        check_report(file, no_picture)
    return file


json_option = partial(output_option, "--json", metavar="FILE", callback=_check_json)
picture_option = partial(output_option, metavar="FILE", callback=_check_picture)
JsonOption = Annotated[Path | None, json_option(help="Also write the report as JSON.")]
PlotOption = Annotated[Path | None, picture_option("--plot", help="Also draw it, as .png or .svg.")]


SECONDS_BETWEEN_LINES = 30
"""Where no bar can be drawn, a line says how far a command is, no more often than this."""


class Bar:
    """One progress bar on stderr; or lines, if `in_lines`."""

    def __init__(self, progress: Progress, text: str, total: int | None, in_lines: bool) -> None:
        self._progress, self._in_lines = progress, in_lines
        # `note` is a field that the last column draws.
        self._task = progress.add_task(text, total=total, note="")
        # The time and what was done when the work began, and the time of the last line.
        self._began: tuple[float, float] | None = None
        self._told = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Go on by `amount`."""
        self._progress.advance(self._task, amount)
        self._tell()

    def show(self, done: int, total: int, note: str) -> None:
        """Stand at `done` of `total`, with a note at the end of the line. Another total is another
        pass, whose time counts from its own begin."""
        if total != self._progress.tasks[self._task].total:
            self._began = None
        self._progress.update(self._task, completed=done, total=total, note=note)
        self._tell()

    def _tell(self) -> None:
        task, now = self._progress.tasks[self._task], time.monotonic()
        # Another stage may have come before: no time is known until something of this one is done.
        self._began = self._began or (now, task.completed)
        began, before = self._began
        is_time = now >= self._told + SECONDS_BETWEEN_LINES and task.completed > before
        if not self._in_lines or task.total is None or not is_time:
            return
        self._told = now
        seconds = (now - began) * (task.total - task.completed) / (task.completed - before)
        left = timedelta(seconds=round(seconds))
        say(f"{task.description}: {task.completed:.0f} of {task.total:.0f}, about {left} left")


@contextmanager
def progress_bars(shown: bool = True, **totals: int | None) -> Iterator[list[Bar]]:
    """A bar for each name and total, with the time elapsed and left.

    Nothing is drawn if `shown` is off. If stderr is no terminal there are lines in place of bars. A
    total of None is not known yet: `Bar.show` tells it.
    """
    # What is done, how far, since when, and how long it will still take.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # In a log file the bars would be hundreds of lines.
    in_lines = shown and not stderr.is_terminal
    with Progress(*columns, console=stderr, disable=not shown or in_lines) as progress:
        yield [Bar(progress, text, total, in_lines) for text, total in totals.items()]


def method_spec(
    method: str, texts: list[str], named: dict[str, str | None], rotate: bool, refine: bool = False
) -> "MethodSpec":
    """The method with the settings that the options give. Raises MarrqError as `with_settings`.

    texts: KEY=VALUE of --set. named: settings that have an option of their own."""
    from marrq.methods.spec import read_settings, with_settings

    # What a setting is if its flag is given; that of the rotation is a seed.
    flags = {"rotate": "0" if rotate else None, "refine": "on" if refine else None}
    return with_settings(method, read_settings({**named, **flags}, texts))


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of a list with commas; none for None."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def say(text: str) -> None:
    """A line for people, on stderr, as it stands."""
    # A path may have square brackets, and must not be cut where the terminal ends.
    stderr.print(text, highlight=False, soft_wrap=True)


def warn(sentences: Iterable[str]) -> None:
    """A warning for each sentence, on stderr."""
    for sentence in sentences:
        say(f"warning: {sentence}")


def write_report(file: Path | None, report: object) -> None:
    """Write a report as JSON if the user asked for the file (`--json`), and say so."""
    if file is not None:
        write_json(file, report)
        say(f"wrote {file}")
