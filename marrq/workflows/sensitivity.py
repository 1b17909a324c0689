"""What each linear costs at each width: measured on a copy of the model, or read from a file of
`marrq sensitivity`; and the widths that a limit buys."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from marrq.budget import Budget
from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.models.images import ImageSet
from marrq.models.load import VisionModel
from marrq.pipeline.quantize import RunOptions
from marrq.pipeline.sensitivity import SensitivitySettings, measure_sensitivity
from marrq.quantized_model import CalibrationRecord
from marrq.refinement.teacher import StepDone, no_steps
from marrq.sensitivity import Plan, Sensitivity, sensitivity_from_json
from marrq.workflows.quantize import Recipe, note_of

MEASURING, QUANTIZING, REFINING = "measuring", "quantizing", "refining"
"""The stages of a run."""

NAMES_OF_PARTS = {
    "outputs": "a model with other outputs",
    "weights_sha256": "another model",
    "preprocessing": "a model whose images are prepared otherwise",
    "scheme": "another scheme",
    "method": "another method",
}
"""In what a file of costs may differ from what is wanted."""

Shows = Mapping[str, Callable[[int, int, str], None]]
"""By stage: called with how much is done, of how much, and a note."""


@dataclass(frozen=True)
class Progress:
    """How a run goes, and who is told.

    run: of the pipeline; its `block_done` shows the models that are quantized.
    measured: called after each block of the sensitivity pass with the number of blocks done and the
        number of all blocks.
    step_done: as of `quantize_in_place`.
    """

    run: RunOptions
    measured: Callable[[int, int], None] = lambda done, count: None
    step_done: StepDone = no_steps

    @classmethod
    def of(cls, device: torch.device, processes: Processes, shows: Shows) -> "Progress":
        """A run on a device, whose stages are shown."""
        run = RunOptions(
            device,
            processes,
            block_done=lambda done, count, new: shows[QUANTIZING](done, count, note_of(new)),
        )
        return cls(
            run,
            lambda done, count: shows[MEASURING](done, count, ""),
            shows.get(REFINING, no_steps),
        )


def sensitivity_of(
    model: VisionModel,
    images: ImageSet,
    recipe: Recipe,
    how: Progress,
    budget: Budget | None = None,
) -> Sensitivity:
    """Measure a copy of the model on the images that the recipe draws.

    budget: if no model meets its limit of bits or bytes, MarrqError is raised before anything is
        measured."""
    drawn = images.draw(recipe.samples, recipe.seed)
    run = replace(
        how.run,
        checkpoint=None,
        block_done=lambda done, count, reports: how.measured(done, count),
    )

    def check(sizes: Sensitivity) -> None:
        if budget is not None and budget.max_drop is None:
            plan_within(sizes, budget)

    pixels, settings = drawn.pixels(model.preprocessing), _settings(recipe, drawn)
    return measure_sensitivity(copied(model), pixels, settings, run, check)


def read_sensitivity(
    file: Path, model: VisionModel, images: ImageSet, recipe: Recipe
) -> Sensitivity:
    """What a file of `marrq sensitivity` holds. Raises MarrqError if it is none, or of another
    model, scheme or method; it may be of other images."""
    try:
        found = sensitivity_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MarrqError(f"{str(file)!r} is no file of marrq sensitivity: {error}") from error
    wanted = _settings(recipe, images.draw(recipe.samples, recipe.seed)).about(model)
    for key, words in NAMES_OF_PARTS.items():
        there, here = found.about.get(key), wanted[key]
        if there != here:
            # Schemes and methods are short enough to be named.
            what = f"{there!r}, not {here!r}" if key in ("scheme", "method") else words
            raise MarrqError(
                f"{str(file)!r} is the sensitivity of {what}: measure it again with marrq "
                "sensitivity"
            )
    return found


def _settings(recipe: Recipe, drawn: ImageSet) -> SensitivitySettings:
    """What the costs depend on. drawn: the images that the recipe has drawn."""
    record = CalibrationRecord(drawn.name, recipe.samples, recipe.seed, drawn.sha256)
    return SensitivitySettings(recipe.scheme, recipe.method, record)


def plan_within(sensitivity: Sensitivity, budget: Budget) -> Plan:
    """The widths that a limit of bits or bytes buys. Raises MarrqError if no model is so small."""
    if budget.bits_per_weight is not None:
        return sensitivity.within_bits(budget.bits_per_weight)
    return sensitivity.within_bytes(budget.size_bytes or 0)


def said(plan: Plan) -> str:
    """A plan in a sentence."""
    counts = [
        f"{list(plan.widths.values()).count(bits)} with {bits}"
        for bits in sorted(set(plan.widths.values()))
    ]
    return (
        f"{plan.bits_per_weight:.3f} bits a weight, {plan.size_bytes / 1e6:.2f} MB of tensors; "
        f"linears by their bits: {', '.join(counts)}; expected divergence {plan.divergence:.3g}"
    )


def copied(model: VisionModel) -> VisionModel:
    """The model with a module of its own, which may be changed."""
    return replace(model, module=copy.deepcopy(model.module))
