"""`marrq doctor`: what this machine has, what an ONNX file or a Triton repository needs, and
whether ONNX Runtime here or on a server loads it."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from marrq.cli.common import JsonOption, stdout, write_report
from marrq.errors import MarrqError

if TYPE_CHECKING:
    from runtime.doctor.repository import ServedModel


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE|REPOSITORY",
            help="An ONNX file of any tool, or a Triton repository; left out: the machine alone.",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--ort", metavar="VERSION", help="ONNX Runtime of the server that is to load it."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Say what keeps a file from running, here or on a server; exit with 3 if something does.

    marrq doctor model.onnx --ort 1.18
    """
    if path is None and server is not None:
        raise MarrqError(
            f"--ort {server} is about a file that a server is to load: marrq doctor FILE --ort "
            f"{server}"
        )
    if path is not None and not path.exists():
        raise MarrqError(
            f"{str(path)!r} does not exist: give an ONNX file, a Triton repository, or nothing to "
            "examine the machine alone"
        )

    from runtime.doctor.doctor import (
        diagnose,
        diagnosis,
        examine_file,
        examine_machine,
        parse_version,
    )
    from runtime.errors import GateError

    if server is not None:
        parse_version(server)
    models = _models(path) if path is not None and path.is_dir() else []
    paths = (
        [file for model in models for file in model.files]
        if models
        else [path]
        if path is not None
        else []
    )
    report = diagnose(
        examine_machine(_torch()), [examine_file(file) for file in paths], server, models
    )
    write_report(json_file, report)
    stdout.print(diagnosis(report))
    if report["problems"]:
        raise GateError("; ".join(report["problems"]))


def _models(repository: Path) -> "list[ServedModel]":
    from runtime.doctor.repository import examine_repository

    return examine_repository(repository)


def _torch() -> dict[str, Any] | None:
    """What torch knows of CUDA; None where torch is not installed."""
    if find_spec("torch") is None:
        return None
    import torch

    return {"cuda": torch.version.cuda, "cuda_found": torch.cuda.is_available()}
