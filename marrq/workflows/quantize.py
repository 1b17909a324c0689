"""Quantize a model on images, into an artifact for the command line.

`quantize_in_place` draws the calibration images and runs marrq/pipeline; the Python API calls it
too (in_memory.py). The artifact is a function of model, image files, `Recipe`, device kind and
package versions alone; processes, checkpoints and the place of the tokens leave no trace in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from marrq.artifact.checkpoint import FolderCheckpoint, is_checkpoint_of, remove_checkpoint
from marrq.artifact.config import description
from marrq.artifact.folder import save
from marrq.errors import MarrqError
from marrq.methods.registry import RESIDUAL_STREAM
from marrq.methods.setting import SEED
from marrq.methods.spec import MethodSpec
from marrq.models.images import ImageSet
from marrq.models.images.counts import FEWEST_IMAGES
from marrq.models.load import VisionModel
from marrq.pipeline.block_inputs import Store, in_files, in_memory
from marrq.pipeline.quantize import RunOptions
from marrq.pipeline.quantize import quantize as run_pipeline
from marrq.quantized_model import (
    CalibrationRecord,
    ModuleReport,
    QuantizationSettings,
    QuantizedModel,
)
from marrq.refinement.refine import refine
from marrq.refinement.teacher import StepDone, Teacher, no_steps
from marrq.schemes import Scheme
from marrq.workflows.destination import Destination
from marrq.workflows.feasible import check_feasible
from runtime.quantization import Refinement


@dataclass(frozen=True)
class Recipe:
    """What the user chooses about the codes.

    samples: number of calibration images, at least 2.
    seed: of the random draw of these images.
    widths: for a mixed scheme the weight bits of each linear, by path (marrq/workflows/budget.py).
    """

    scheme: Scheme
    method: MethodSpec
    samples: int
    seed: int = 0
    widths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < FEWEST_IMAGES:
            raise MarrqError(
                f"calibration needs {FEWEST_IMAGES} images or more: got samples={self.samples}"
            )
        if not SEED.allows(self.seed):
            raise MarrqError(f"the seed must be {SEED.values}: got {self.seed}")

    def settings(self, images: ImageSet) -> QuantizationSettings:
        """The settings of the pipeline. images: the images that this recipe has drawn."""
        # Name, seed and the hash of the file names: enough to draw the same images again, and to
        # see that they are the same.
        calibration = CalibrationRecord(images.name, self.samples, self.seed, images.sha256)
        return QuantizationSettings(self.scheme, self.method, calibration, self.widths)

    def fresh(self, images: ImageSet) -> ImageSet:
        """The images of the refinement: those that the draw gives after the calibration images.

        Raises MarrqError if there are too few.
        """
        spec = self.method.refinement
        wanted = self.samples + spec.all_images
        if wanted > len(images):
            raise MarrqError(
                f"{self.samples} images calibrate, the refinement learns from {spec.images} others "
                f"and is judged by {spec.held_out} more, and {images.name!r} has {len(images)}: "
                "lower --samples, refine.images or refine.held-out, together by "
                f"{wanted - len(images)}, or add images"
            )
        return images.draw(wanted, self.seed).subset(slice(self.samples, None))


def quantize_in_place(
    model: VisionModel,
    images: ImageSet,
    recipe: Recipe,
    run: RunOptions,
    step_done: StepDone = no_steps,
) -> QuantizedModel:
    """Draw the calibration images, quantize, and refine if the method says so; the linears of
    `model` itself are replaced.

    step_done: called while the model is refined. Of several processes the first one alone refines;
        the others return the model without.
    """
    # The draw is a list of files. The pipeline reads the images batch by batch.
    drawn = images.draw(recipe.samples, recipe.seed)
    pixels, settings = drawn.pixels(model.preprocessing), recipe.settings(drawn)
    if not recipe.method.refinement.on:
        return run_pipeline(model, pixels, settings, run)
    # The full-precision model is asked before the pipeline changes it.
    model.module.to(run.device)
    fresh = recipe.fresh(images)
    # All processes share this pass, so that none waits long for another.
    teacher = Teacher.of(
        model, fresh.pixels(model.preprocessing), fresh.sha256, step_done, run.processes
    )
    quantized = run_pipeline(model, pixels, settings, run)
    return refine(quantized, teacher, step_done) if run.processes.is_first else quantized


def quantize_to_folder(
    model: VisionModel,
    images: ImageSet,
    recipe: Recipe,
    destination: Destination,
    run: RunOptions,
    step_done: StepDone = no_steps,
) -> list[str]:
    """Quantize `model` in place and save the artifact; return sentences for people.

    Every process of torchrun calls this; the first one alone refines, writes, and has sentences.
    The caller has called `destination.check()` before it loaded the model.
    """
    # The draw is repeated inside `quantize_in_place`, and gives the same files: the hash of their
    # names has to be known before the checkpoint is opened.
    settings = recipe.settings(images.draw(recipe.samples, recipe.seed))
    of_blocks = settings_of_blocks(model, settings, run.device)
    if destination.is_complete(description(model, settings)):
        # The run was stopped between saving the artifact and removing the checkpoint. A checkpoint
        # of another run is not this run's to remove.
        if is_checkpoint_of(destination.checkpoint, of_blocks):
            remove_checkpoint(destination.checkpoint)
        return [f"{destination.folder} is complete"]
    check_feasible(model)
    unrefined = replace(settings, method=settings.method.unrefined)
    checkpoint = FolderCheckpoint(destination.checkpoint, of_blocks, unrefined, run.processes)
    run = replace(run, store=store_of(destination), checkpoint=checkpoint)
    quantized = quantize_in_place(model, images, recipe, run, step_done)
    # All processes have the same model, and have agreed on every block of it.
    if not run.processes.is_first:
        return []
    save(quantized, destination.folder, overwrite=destination.overwrite)
    # The artifact is whole and on the disk: only now may the blocks go.
    checkpoint.remove()
    # What is noted of the images is known when they have been read.
    found = (*model.notes, *shortfalls(quantized), *images.noted())
    warnings = [f"warning: {warning}" for warning in found]
    return [*warnings, *refined(quantized), f"wrote {destination.folder}"]


def check_apart(train: ImageSet, judging: ImageSet) -> None:
    """Raise MarrqError if a refinement would learn from images that judge it."""
    if set(train.files) & set(judging.files):
        raise MarrqError(
            f"the refinement would learn from images of {judging.name!r} that it is judged by: put "
            "images to judge by into val/, others into train/"
        )


def store_of(destination: Destination) -> Store:
    """Where tokens are kept."""
    # Tokens of a large model may need more memory than there is.
    return in_memory if destination.work_dir is None else in_files(destination.work_dir)


def settings_of_blocks(
    model: VisionModel, settings: QuantizationSettings, device: torch.device
) -> dict[str, Any]:
    """What the blocks of a run are a function of, for its checkpoint."""
    # No block depends on the refinement: a run may go on with another one, or without.
    blocks = replace(settings, method=settings.method.unrefined)
    # The device kind is no part of the artifact's description, but it may change the last bits, and
    # blocks of two kinds must not get into one artifact.
    return description(model, blocks) | {"device": device.type}


def refined(model: QuantizedModel) -> Iterator[str]:
    """What the refinement did, if there was one, in the words of `marrq inspect`."""
    if model.refinement is not None:
        yield f"refined {Refinement(**asdict(model.refinement)).sentence}"


def shortfalls(model: QuantizedModel) -> Iterator[str]:
    """Sentences about what was asked for and could not be done, from the reports of the linears."""
    reports, method, refinement = model.reports, model.method.name, model.refinement
    for report in reports:
        if report.fallback:
            yield f"{report.path}: {report.fallback}"
    raised = [
        report.path
        for report in reports
        if report.damping > model.method.damping
        or (report.target_damping or 0) > model.method.target_damping
    ]
    if raised:
        yield (
            f"{len(raised)} of {len(reports)} linears needed more damping than asked for, as their "
            f"inputs are dependent (quantization.json has it): {', '.join(raised)}"
        )
    # `stream` aims at the sum of the residual stream, which needs a linear that writes to it.
    aims_at_stream = model.method.wants == RESIDUAL_STREAM
    if aims_at_stream and not any(report.writes_stream for report in reports):
        yield (
            f"no linear writes to a residual stream: {method} did what "
            f"{method.replace('stream', 'exact')} does"
        )
    if model.method.balance == "on" and not any(report.balanced for report in reports):
        yield "balance is on, and no linear reads the values of heads alone: nothing is balanced"
    alike = [report.path for report in reports if not report.weighted]
    if model.method.token_weights and alike:
        yield (
            f"the tokens of {len(alike)} of {len(reports)} linears have no weights, as they do not "
            f"lie image by image or no output depends on them: {', '.join(alike)}"
        )
    if refinement is not None and not refinement.helped:
        yield (
            f"the refinement was taken back: the loss on {refinement.held_out} held-out images "
            f"went from {refinement.loss_before:.3f} to {refinement.loss_after:.3f}"
        )


def note_of(reports: Sequence[ModuleReport]) -> str:
    """The α of a block's linears in short, for a progress bar."""
    # Only the methods with a residual strength have an α.
    found = [f"{report.alpha:.2f}" for report in reports if report.alpha is not None]
    return f"α {' '.join(found)}" if found else ""
