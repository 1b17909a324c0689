"""Quantize, within a budget if there is one: measure what each linear costs, solve for the widths,
quantize; or search the smallest model (smallest.py)."""

from dataclasses import dataclass, replace
from typing import Any

from marrq.artifact.checkpoint import check_checkpoint, costs_in, keep_costs
from marrq.artifact.config import description
from marrq.budget import Budget
from marrq.errors import MarrqError
from marrq.models.images import ImageSet, find_images
from marrq.models.images.gallery import MeasuredSets, find_measured
from marrq.models.load import VisionModel
from marrq.quantized_model import QuantizationSettings
from marrq.schemes import WEIGHT_BITS
from marrq.sensitivity import Sensitivity, sensitivity_from_json
from marrq.workflows.destination import Destination
from marrq.workflows.feasible import check_feasible
from marrq.workflows.quantize import (
    Recipe,
    check_apart,
    quantize_to_folder,
    settings_of_blocks,
    store_of,
)
from marrq.workflows.sensitivity import (
    MEASURING,
    QUANTIZING,
    REFINING,
    Progress,
    plan_within,
    read_sensitivity,
    said,
    sensitivity_of,
)
from marrq.workflows.smallest import Search, save_smallest

UNKNOWN = "unknown"
"""Stands for the linears whose widths are not known."""


def stages_of(recipe: Recipe, budget: Budget | None) -> tuple[str, ...]:
    """The stages of a run, in their order."""
    is_measured = budget is not None and budget.sensitivity is None
    return (
        *((MEASURING,) if is_measured else ()),
        QUANTIZING,
        *((REFINING,) if recipe.method.refinement.on else ()),
    )


@dataclass(frozen=True)
class RunImages:
    """The images that a run reads. train: to calibrate on; judged: to judge models by, if the limit
    is one of accuracy."""

    train: ImageSet
    judged: MeasuredSets | None = None


def images_for(name: str, labels: tuple[str, ...], budget: Budget | None) -> RunImages:
    """Raises MarrqError if the images are not there, or if those to judge by have no classes.

    labels: of the model, whose names say which folders there may be; none of a model that gives
        embeddings, which are judged by the classes of the folders."""
    train = find_images(name, "train", labels)
    if budget is None or budget.max_drop is None:
        return RunImages(train)
    judged_by = find_measured(name, labels)
    # Before hours of work: right answers cannot be counted without classes.
    judged_by.measured.labelled()
    return RunImages(train, judged_by)


def quantize_within(
    model: VisionModel,
    images: RunImages,
    recipe: Recipe,
    budget: Budget | None,
    destination: Destination,
    how: Progress,
) -> list[str]:
    """Quantize, within a budget if there is one, and save the artifact; return sentences for
    people.

    images: as `images_for` finds them.
    Raises MarrqError as `quantize_to_folder`, and if no model is small or accurate enough.
    """
    train = images.train
    if budget is None:
        return quantize_to_folder(model, train, recipe, destination, how.run, how.step_done)
    _check_first(model, images, recipe, destination, how)
    how = replace(how, run=replace(how.run, store=store_of(destination)))
    if budget.max_drop is not None and images.judged is not None:
        search = Search.of(model, (train, images.judged), recipe, budget.max_drop, how)
        return save_smallest(search, _costs(model, train, recipe, budget, how), destination)
    plan = plan_within(_kept_costs(model, train, recipe, budget, destination, how), budget)
    planned = replace(recipe, widths=plan.widths)
    sentences = quantize_to_folder(model, train, planned, destination, how.run, how.step_done)
    # Of several processes the first one alone has sentences.
    return [*sentences, said(plan)] if sentences else []


def _costs(
    model: VisionModel, train: ImageSet, recipe: Recipe, budget: Budget, how: Progress
) -> Sensitivity:
    """What each linear costs at each width: read or measured, as the budget says."""
    if budget.sensitivity is None:
        return sensitivity_of(model, train, recipe, how, budget)
    return read_sensitivity(budget.sensitivity, model, train, recipe)


def _kept_costs(
    model: VisionModel,
    train: ImageSet,
    recipe: Recipe,
    budget: Budget,
    destination: Destination,
    how: Progress,
) -> Sensitivity:
    """The same. What was measured is kept with the blocks of the run, for --resume."""
    if budget.sensitivity is not None:
        return _costs(model, train, recipe, budget, how)
    folder = destination.checkpoint
    about = _of_blocks(model, _unplanned(recipe, train), how)
    kept = costs_in(folder, about) if destination.resume else None
    if kept is not None:
        return sensitivity_from_json(kept)
    measured = _costs(model, train, recipe, budget, how)
    if how.run.processes.is_first:
        keep_costs(folder, about, measured.to_json())
    return measured


def _check_first(
    model: VisionModel, images: RunImages, recipe: Recipe, destination: Destination, how: Progress
) -> None:
    """Raise MarrqError for whatever would fail later, before the costs are measured, which takes as
    long as to quantize."""
    check_feasible(model)
    refines = recipe.method.refinement.on
    if refines:
        recipe.fresh(images.train)
    if images.judged is not None:
        if refines:
            check_apart(images.train, images.judged.measured)
        if refines and how.run.processes.size > 1:
            raise MarrqError(
                "--budget auto judges refined models, which one process alone has: start one "
                "process, or leave out --refine"
            )
    # The widths are not known yet; all else tells an artifact or a run of other settings.
    settings = _unplanned(recipe, images.train)
    destination.is_complete(_without_widths(description(model, settings)))
    if images.judged is None:
        check_checkpoint(destination.checkpoint, _of_blocks(model, settings, how))


def _unplanned(recipe: Recipe, train: ImageSet) -> QuantizationSettings:
    """The settings of a run before its widths are known."""
    some = replace(recipe, widths={UNKNOWN: WEIGHT_BITS[0]})
    return some.settings(train.draw(recipe.samples, recipe.seed))


def _of_blocks(model: VisionModel, settings: QuantizationSettings, how: Progress) -> dict[str, Any]:
    """All but the widths that the blocks of a run are a function of."""
    return _without_widths(settings_of_blocks(model, settings, how.run.device))


def _without_widths(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "widths"}
