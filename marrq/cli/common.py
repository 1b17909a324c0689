"""What several commands share: options, the progress bar, the device."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

from marrq.errors import MarrqError

if TYPE_CHECKING:
    import torch

stdout = Console()
stderr = Console(stderr=True)

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="demo, a timm name, hf-hub:…, local-dir:…, or a transformers id or folder."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Folder of class folders of images, train/ and val/ understood; or demo."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
SamplesOption = Annotated[int, typer.Option(help="Calibration images, drawn at random.", min=2)]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Also draw it, as .png or .svg.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="Threads of one operator; ONNX Runtime's choice if left out.", min=1),
]
ProviderOption = Annotated[
    str, typer.Option(help="cpu, cuda or tensorrt; an error where it cannot be had.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result here as JSON.")
]


class Bar:
    """One bar on stderr."""

    def __init__(self, progress: Progress, text: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=total, note="")

    def advance(self, amount: int = 1) -> None:
        """Go on by `amount`."""
        self._progress.advance(self._task, amount)

    def show(self, done: int, total: int, note: str) -> None:
        """Stand at `done` of `total`, with a note at the end of the line."""
        self._progress.update(self._task, completed=done, total=total, note=note)


@contextmanager
def progress_bars(shown: bool = True, **totals: int | None) -> Iterator[list[Bar]]:
    """A bar for each name and total, with time elapsed and left; nothing is drawn where stderr is
    no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        TextColumn("{task.fields[note]}"),
        console=stderr,
        disable=not (shown and stderr.is_terminal),
    ) as progress:
        yield [Bar(progress, text, total) for text, total in totals.items()]


def say(text: str) -> None:
    """A line for people, on stderr, as it stands."""
    stderr.print(text, highlight=False, soft_wrap=True, markup=False)


def write_json(file: Path | None, report: dict[str, Any]) -> None:
    """Write the report where one was asked for."""
    if file is not None:
        write_text(file, json.dumps(report, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a file in one step: what was there stays whole until then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def data_for(model: str, data: str | None) -> str:
    """The data name for a model: the demo brings its own."""
    if data is None and model != "demo":
        raise MarrqError(
            "no images given: pass --data with a folder of class folders (only the model demo "
            "brings its own)"
        )
    return data or "demo"


def choose_device(name: str) -> "torch.device":
    """`auto` takes CUDA where there is one; `cuda` without one is an error."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise MarrqError(f"unknown device {name!r}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise MarrqError(
            "device 'cuda' is not available here: pass --device cpu, or install a torch that finds "
            "the GPU"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def peak_memory() -> Iterator[Callable[[], float | None]]:
    """Inside: a function that gives the largest resident memory of the process since the start of
    the block, in MB, or None where the system does not tell it (it does on Linux)."""
    from runtime.measure.memory import resident_peak_mb

    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # proc(5): sets the peak to what is resident now
    yield resident_peak_mb
