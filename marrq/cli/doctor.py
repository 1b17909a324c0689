"""`marrq doctor`: what this machine has, what an ONNX file or a Triton repository needs, and
whether ONNX Runtime here or on a server loads it."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporters.choices import check_device
from marrq.cli.common import JsonOption, stdout, write_report
from marrq.errors import MarrqError

if TYPE_CHECKING:
    from runtime.doctor.machine import TorchBuild


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE|REPOSITORY",
            help="An ONNX file of any tool, or a Triton repository; default: the machine alone.",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--ort", metavar="VERSION", help="ONNX Runtime of the server that is to load it."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cpu or gpu: what is to run the file; for gpu, which nodes have no CUDA kernel.",
        ),
    ] = None,
    tensorrt: Annotated[
        bool,
        typer.Option(
            "--tensorrt",
            help="Also hold the file against TensorRT's documented rules; TensorRT is not run.",
        ),
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Say what keeps a file from running, here or on a server; exit with 3 if something does.

    marrq doctor model.onnx --ort 1.18
    marrq doctor model.onnx --device gpu
    marrq doctor model.onnx --tensorrt
    """
    if path is None and server is not None:
        raise MarrqError(
            f"--ort {server} is about a file that a server is to load: marrq doctor FILE --ort "
            f"{server}"
        )
    if path is None and tensorrt:
        raise MarrqError("--tensorrt is about a file: marrq doctor FILE --tensorrt")
    if device is not None:
        check_device(device)
    if path is not None and not path.exists():
        raise MarrqError(
            f"{str(path)!r} does not exist: give an ONNX file, a Triton repository, or nothing to "
            "examine the machine alone"
        )
    from runtime.doctor.diagnose import examine
    from runtime.doctor.releases import parse_version
    from runtime.report.diagnosis import diagnosis_table

    if server is not None:
        # Before torch is imported, which takes seconds.
        parse_version(server)
    report = examine(path, server, _torch_build(), tensorrt, device)
    write_report(json_file, report.to_json())
    stdout.print(diagnosis_table(report))
    report.demand_no_problem()


def _torch_build() -> "TorchBuild | None":
    """The CUDA that torch was built for, and whether torch finds a GPU; None without torch."""
    from runtime.doctor.machine import TorchBuild

    if find_spec("torch") is None:
        return None
    import torch

    return TorchBuild(torch.version.cuda, torch.cuda.is_available())
