"""`marrq quantize`: model and calibration images in, artifact out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from marrq.cli.common import (
    DataOption,
    DeviceOption,
    ForceOption,
    ModelArgument,
    OutputOption,
    SamplesOption,
    choose_device,
    data_for,
    progress_bars,
    say,
)
from marrq.errors import MarrqError

if TYPE_CHECKING:
    from marrq.quantized_model import ModuleReport, QuantizedModel
    from marrq.schemes import ActivationStrategy


def quantize(
    model: ModelArgument,
    output: OutputOption,
    scheme: Annotated[
        str,
        typer.Option(
            help="W{2,3,4,8}A{3,4,8,16}: bits of weights and activations; -gSIZE: groups of inputs; -sym, -mxint: grids; "
            "-e8: patch embedding and head in 8 bits."
        ),
    ] = "W4A8",
    activations: Annotated[
        str, typer.Option(help="per-tensor (static) or per-token (dynamic).")
    ] = "per-tensor",
    method: Annotated[
        str,
        typer.Option(
            help="rtn, gptq, gptaq, rescomp, exact, stream, or marr- before one of the last four."
        ),
    ] = "marr",
    alpha: Annotated[
        str | None,
        typer.Option(help="pid, grid or global=VALUE: how the residual strength is found."),
    ] = None,
    feedback: Annotated[
        str | None, typer.Option(help="held-out or calibration: the images that judge it.")
    ] = None,
    lowrank: Annotated[
        str | None,
        typer.Option(
            help="srr:RANK, qera:RANK or lqer:RANK, with :int8 smaller: a branch beside the codes."
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Rotate the residual stream first.")
    ] = False,
    setting: Annotated[
        list[str],
        typer.Option("--set", help="KEY=VALUE, another setting of the method; may be repeated."),
    ] = [],
    data: DataOption = None,
    samples: SamplesOption = 256,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    device: DeviceOption = "auto",
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for calibration tokens, in memory-mapped files, and for the checkpoint.",
            file_okay=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run that was stopped; do nothing where it is complete."
        ),
    ] = False,
    force: ForceOption = False,
) -> None:
    """Quantize a pretrained vision transformer to a low-bit artifact: marrq quantize demo -o
    artifact

    torchrun --nproc-per-node N -m marrq quantize … shares the work out to N processes, for the same
    artifact."""
    from marrq.artifact.checkpoint import FolderCheckpoint, remove_checkpoint
    from marrq.artifact.folder import check_output, description, save
    from marrq.distributed import local_device, process_group
    from marrq.methods.spec import with_settings
    from marrq.models.images import find_images
    from marrq.models.load import load_model
    from marrq.pipeline.block_inputs import in_files, in_memory
    from marrq.pipeline.quantize import RunOptions
    from marrq.pipeline.quantize import quantize as run_pipeline
    from marrq.quantized_model import CalibrationRecord, QuantizationSettings
    from marrq.schemes import parse_scheme

    # Whatever can be wrong is checked before the long part.
    numbers = parse_scheme(scheme, cast("ActivationStrategy", activations))
    options = {
        "alpha": alpha,
        "feedback": feedback,
        "lowrank": lowrank,
        "rotate": "0" if rotate else None,
    }
    settings = {key: value for key, value in options.items() if value is not None}
    spec = with_settings(
        method,
        settings | {key: value for key, _, value in (text.partition("=") for text in setting)},
    )
    work = (output.parent if work_dir is None else work_dir) / f".{output.name}.checkpoint"
    if not resume:
        check_output(output, force)
        _check_checkpoint(work, force)
    target = local_device(choose_device(device))
    name = data_for(model, data)
    loaded = load_model(model)
    images = find_images(name, "train", loaded.labels).draw(samples, seed)
    pixels = images.pixels(loaded.preprocessing)
    with (
        process_group(target) as processes,
        progress_bars(processes.is_first, quantizing=None) as [bar],
    ):
        calibration = CalibrationRecord(images.name, samples, seed, images.sha256)
        chosen = QuantizationSettings(numbers, spec, calibration)
        about = description(loaded, chosen)
        if resume and _is_complete(output, about, force):
            remove_checkpoint(work)
            return
        checkpoint = FolderCheckpoint(work, about | {"device": target.type}, numbers, processes)
        quantized = run_pipeline(
            loaded,
            pixels,
            chosen,
            RunOptions(
                target,
                processes,
                store=in_memory if work_dir is None else in_files(work_dir),
                checkpoint=checkpoint,
                block_done=lambda done, count, reports: bar.show(done, count, _alphas(reports)),
            ),
        )
        if not processes.is_first:
            return
        for warning in _warnings(quantized):
            say(f"warning: {warning}")
        save(quantized, output, overwrite=force)
        checkpoint.remove()
        say(f"wrote {output}")


def _check_checkpoint(folder: Path, overwrite: bool) -> None:
    """Raise MarrqError where an unfinished run would be lost; with `overwrite` remove it."""
    from marrq.artifact.checkpoint import is_checkpoint, remove_checkpoint

    if is_checkpoint(folder):
        if not overwrite:
            raise MarrqError(
                f"an unfinished run is in {str(folder)!r}: pass --resume to go on with it, or "
                "--force to begin again"
            )
        remove_checkpoint(folder)


def _is_complete(output: Path, about: dict[str, Any], overwrite: bool) -> bool:
    """Whether the output is what this run would write. Raises MarrqError where it is something else
    and may not be replaced."""
    from marrq.artifact.folder import check_output, is_artifact, read_config

    if is_artifact(output) and about.items() <= read_config(output).items():
        say(f"{output} is complete")
        return True
    check_output(output, overwrite)
    return False


def _warnings(model: "QuantizedModel") -> list[str]:
    """What was asked for and could not be done, as the reports have it."""
    from marrq.methods.spec import RESIDUAL_STREAM

    reports, method = model.reports, model.method
    found = [f"{report.path}: {report.fallback}" for report in reports if report.fallback]
    if method.wants == RESIDUAL_STREAM and not any(report.writes_stream for report in reports):
        found.append(
            f"no linear writes to a residual stream: {method.name} did what "
            f"{method.name.replace('stream', 'exact')} does"
        )
    return found


def _alphas(reports: "Sequence[ModuleReport]") -> str:
    """The α of a block's linears, for the bar."""
    found = [f"{report.alpha:.2f}" for report in reports if report.alpha is not None]
    return f"α {' '.join(found)}" if found else ""
