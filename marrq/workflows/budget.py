"""Quantize within a budget: measure what each linear costs, solve for the widths, quantize.

With a limit of accuracy in place of a size (`--budget auto --max-drop 1.0`) the size is found by
bisection: models of ever closer sizes are quantized and judged on the validation images, until the
smallest one is known whose drop surely stays within the limit. The drop is held to fall as the size
grows; sizes lie STEP bits apart.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from marrq.artifact.folder import save
from marrq.budget import Budget
from marrq.distributed import Processes
from marrq.errors import MarrqError
from marrq.models.images import ImageSet, find_images
from marrq.models.images.gallery import MeasuredSets, find_measured
from marrq.models.load import VisionModel
from marrq.pipeline.quantize import RunOptions
from marrq.pipeline.sensitivity import SensitivitySettings, measure_sensitivity
from marrq.quantized_model import CalibrationRecord, QuantizedModel
from marrq.refinement.teacher import StepDone, no_steps
from marrq.sensitivity import Plan, Sensitivity, sensitivity_from_json
from marrq.workflows.destination import Destination
from marrq.workflows.evaluate import CLASSES, FLOAT, Evaluating, answers, judge, judged
from marrq.workflows.feasible import check_feasible
from marrq.workflows.quantize import (
    Recipe,
    note_of,
    quantize_in_place,
    quantize_to_folder,
    shortfalls,
    store_of,
)
from runtime.measure.accuracy import PairedDrop, hits, paired_drop
from runtime.measure.embedded import Embedded, Embedding

STEP = 0.25
"""Bits a weight between the sizes that are tried for a limit of accuracy."""

MADE = "made"
"""The title of a model that was made, beside the float model."""

MEASURING, QUANTIZING, REFINING = "measuring", "quantizing", "refining"
"""The stages of a run."""

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


def sensitivity_of(
    model: VisionModel, images: ImageSet, recipe: Recipe, how: Progress
) -> Sensitivity:
    """Measure a copy of the model on the images that the recipe draws."""
    drawn = images.draw(recipe.samples, recipe.seed)
    record = CalibrationRecord(images.name, recipe.samples, recipe.seed, drawn.sha256)
    settings = SensitivitySettings(recipe.scheme, recipe.method, record)
    run = replace(
        how.run,
        checkpoint=None,
        block_done=lambda done, count, reports: how.measured(done, count),
    )
    pixels = drawn.pixels(model.preprocessing)
    return measure_sensitivity(copied(model), pixels, settings, run)


def read_sensitivity(file: Path, model: VisionModel, recipe: Recipe) -> Sensitivity:
    """What a file of `marrq sensitivity` holds. Raises MarrqError if it is none, or of another
    model or scheme."""
    try:
        found = sensitivity_from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise MarrqError(f"{str(file)!r} is no file of marrq sensitivity: {error}") from error
    wanted = {
        "weights_sha256": model.source.weights_sha256,
        "scheme": recipe.scheme.description,
    }
    for key, value in wanted.items():
        if found.about.get(key) != value:
            what = "another model" if key == "weights_sha256" else f"{found.about.get(key)!r}"
            raise MarrqError(
                f"{str(file)!r} is the sensitivity of {what}: measure it again with marrq "
                "sensitivity"
            )
    return found


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
    # Before the costs are measured, which takes as long as to quantize.
    check_feasible(model)
    if images.judged is not None:
        judged(model)
    how = replace(how, run=replace(how.run, store=store_of(destination)))
    sensitivity = (
        sensitivity_of(model, train, recipe, how)
        if budget.sensitivity is None
        else read_sensitivity(budget.sensitivity, model, recipe)
    )
    if budget.max_drop is not None and images.judged is not None:
        search = _Search(model, train, images.judged, recipe, budget.max_drop, how)
        return _save_smallest(search, sensitivity, destination)
    plan = plan_within(sensitivity, budget)
    planned = replace(recipe, widths=plan.widths)
    sentences = quantize_to_folder(model, train, planned, destination, how.run, how.step_done)
    # Of several processes the first one alone has sentences.
    return [*sentences, said(plan)] if sentences else []


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


@dataclass(frozen=True)
class _Search:
    """The search for the smallest model that loses at most `max_drop` points of top-1, or of the
    top-1 of k-NN if the model gives embeddings."""

    model: VisionModel
    train: ImageSet
    judged_by: MeasuredSets
    recipe: Recipe
    max_drop: float
    how: Progress

    def smallest(self, plans: list[Plan]) -> tuple[QuantizedModel, Plan, list[str]]:
        """The model, its plan, and a sentence for each model that was made.

        plans: by size. Raises MarrqError if the largest one loses too much."""
        reference = self._answers(self.model)
        kept: tuple[QuantizedModel, Plan] | None = None
        sentences: list[str] = []
        # All plans before `first` lose too much; the plan `last` and those behind it do not, or
        # have not been tried.
        first, last = 0, len(plans)
        while first < last:
            plan = plans[(first + last) // 2]
            quantized = self._quantized(plan)
            drop = self._drop(reference, self._answers(quantized))
            holds = drop.drop_high <= self.max_drop / 100
            low, middle, high = (100 * x for x in (drop.drop_low, drop.drop, drop.drop_high))
            sentences.append(
                f"{plan.bits_per_weight:.3f} bits a weight: lost {middle:.1f} points "
                f"({low:.1f}…{high:.1f}), {'held' if holds else 'not surely held'}"
            )
            if holds:
                kept, last = (quantized, plan), (first + last) // 2
            else:
                first = (first + last) // 2 + 1
        if kept is None:
            raise MarrqError(
                f"no model surely loses at most {self.max_drop:g} points on "
                f"{len(self.judged_by.measured):,} images ({sentences[-1]}): raise --max-drop, or "
                "give more images"
            )
        return *kept, sentences

    def _quantized(self, plan: Plan) -> QuantizedModel:
        recipe = replace(self.recipe, widths=plan.widths)
        return quantize_in_place(
            copied(self.model), self.train, recipe, self.how.run, self.how.step_done
        )

    def _answers(self, model: VisionModel | QuantizedModel) -> Embedded:
        run = self.how.run
        evaluating = Evaluating(run.device, processes=run.processes)
        return answers(model, self.judged_by, self.model.preprocessing, evaluating)

    def _drop(self, reference: Embedded, found: Embedded) -> PairedDrop:
        """What is lost against the float model. reference, found: answers of both."""
        _, kind = judged(self.model)
        if kind == CLASSES:
            targets = np.array(self.judged_by.measured.labelled())
            return paired_drop(hits(reference.measured, targets), hits(found.measured, targets))
        found_by = judge({FLOAT: reference, MADE: found}, self.judged_by, kind)[MADE]
        # The classes of the images are known, so neighbours have been looked for in both models.
        assert isinstance(found_by, Embedding)
        assert found_by.retrieval is not None
        lost = found_by.retrieval.knn20.against
        assert lost is not None
        return lost


def _save_smallest(
    search: _Search, sensitivity: Sensitivity, destination: Destination
) -> list[str]:
    """Find the smallest model that holds the limit, and save it."""
    if search.how.run.processes.size > 1 and search.recipe.method.refinement.on:
        raise MarrqError(
            "--budget auto judges refined models, which one process alone has: start one process, "
            "or leave out --refine"
        )
    least, largest = sensitivity.curve(2)[0], sensitivity.curve(2)[-1]
    count = int((largest.bits_per_weight - least.bits_per_weight) / STEP)
    # From the smallest model in equal steps, and the largest.
    budgets = [least.bits_per_weight + STEP * place for place in range(count + 1)]
    plans = [least, *map(sensitivity.within_bits, budgets[1:]), largest]
    distinct = list({plan.size_bytes: plan for plan in plans}.values())
    quantized, plan, tried = search.smallest(distinct)
    if not search.how.run.processes.is_first:
        return []
    save(quantized, destination.folder, overwrite=destination.overwrite)
    warnings = (*search.model.notes, *shortfalls(quantized), *search.train.noted())
    return [
        *(f"warning: {warning}" for warning in warnings),
        *tried,
        f"{len(tried)} models were made and judged on {len(search.judged_by.measured):,} images",
        f"wrote {destination.folder}",
        said(plan),
    ]


def copied(model: VisionModel) -> VisionModel:
    """The model with a module of its own, which may be changed."""
    return replace(model, module=copy.deepcopy(model.module))
