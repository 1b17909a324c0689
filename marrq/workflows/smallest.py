"""The smallest model within a limit of accuracy (`--budget auto --max-drop 1.0`).

Its size is found by bisection: models of ever closer sizes are quantized and judged on the
validation images, until the smallest one is known whose drop surely stays within the limit. The
drop is held to fall as the size grows; sizes lie STEP bits apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from marrq.artifact.folder import save
from marrq.errors import MarrqError
from marrq.models.images import ImageSet
from marrq.models.images.gallery import MeasuredSets
from marrq.models.load import VisionModel
from marrq.quantized_model import QuantizedModel
from marrq.sensitivity import Plan, Sensitivity
from marrq.workflows.destination import Destination
from marrq.workflows.evaluate import CLASSES, FLOAT, Evaluating, answers, judge, judged
from marrq.workflows.judging import flattered
from marrq.workflows.quantize import Recipe, quantize_in_place, refined, shortfalls
from marrq.workflows.sensitivity import Progress, copied, said
from runtime.measure.accuracy import PairedDrop, hits, paired_drop
from runtime.measure.embedded import Embedded, Embedding

STEP = 0.25
"""Bits a weight between the sizes that are tried."""

MADE = "made"
"""The title of a model that was made, beside the float model."""


@dataclass(frozen=True)
class Search:
    """The search for the smallest model that loses at most `max_drop` points of top-1, or of the
    top-1 of k-NN if the model gives embeddings.

    train: to calibrate on. judged_by: to judge on. reference: what the float model answers.
    """

    model: VisionModel
    train: ImageSet
    judged_by: MeasuredSets
    reference: Embedded
    recipe: Recipe
    max_drop: float
    how: Progress

    @classmethod
    def of(
        cls,
        model: VisionModel,
        images: tuple[ImageSet, MeasuredSets],
        recipe: Recipe,
        max_drop: float,
        how: Progress,
    ) -> "Search":
        """Ask the float model. images: to calibrate on, and to judge on.

        Raises MarrqError if nothing can be judged, and BenchError for outputs that are not finite.
        """
        train, judged_by = images
        _, kind = judged(model)
        reference = _answers(model, judged_by, model, how)
        # Whatever cannot be judged is told now, and not when the first model has been made.
        judge({FLOAT: reference}, judged_by, kind)
        return cls(model, train, judged_by, reference, recipe, max_drop, how)

    def smallest(self, plans: list[Plan]) -> tuple[QuantizedModel, Plan, list[str]]:
        """The model, its plan, and a sentence for each model that was made.

        plans: by size. Raises MarrqError if the largest one loses too much."""
        kept: tuple[QuantizedModel, Plan] | None = None
        sentences: list[str] = []
        # All plans before `first` lose too much; the plan `last` and those behind it do not, or
        # have not been tried.
        first, last = 0, len(plans)
        while first < last:
            plan = plans[(first + last) // 2]
            quantized = self._quantized(plan)
            drop = self._drop(_answers(quantized, self.judged_by, self.model, self.how))
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

    @property
    def notes(self) -> Iterator[str]:
        """What is to be known of the images."""
        measured = self.judged_by.measured
        yield from flattered([self.train.draw(self.recipe.samples, self.recipe.seed)], measured)
        yield from self.judged_by.notes
        yield from (*self.train.noted(), *measured.noted())

    def _quantized(self, plan: Plan) -> QuantizedModel:
        recipe = replace(self.recipe, widths=plan.widths)
        return quantize_in_place(
            copied(self.model), self.train, recipe, self.how.run, self.how.step_done
        )

    def _drop(self, found: Embedded) -> PairedDrop:
        """What is lost against the float model. found: answers of the model that was made."""
        _, kind = judged(self.model)
        if kind == CLASSES:
            targets = np.array(self.judged_by.measured.labelled())
            right = hits(self.reference.measured, targets)
            return paired_drop(right, hits(found.measured, targets))
        found_by = judge({FLOAT: self.reference, MADE: found}, self.judged_by, kind)[MADE]
        # The classes of the images are known, so neighbours have been looked for in both models.
        assert isinstance(found_by, Embedding)
        assert found_by.retrieval is not None
        lost = found_by.retrieval.knn20.against
        assert lost is not None
        return lost


def _answers(
    model: VisionModel | QuantizedModel, images: MeasuredSets, original: VisionModel, how: Progress
) -> Embedded:
    """What a model answers; original: the float model, by which images are prepared."""
    evaluating = Evaluating(how.run.device, processes=how.run.processes)
    return answers(model, images, original.preprocessing, evaluating)


def save_smallest(search: Search, sensitivity: Sensitivity, destination: Destination) -> list[str]:
    """Find the smallest model that holds the limit, and save it; return sentences for people."""
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
    warnings = (*search.model.notes, *shortfalls(quantized), *search.notes)
    return [
        *(f"warning: {warning}" for warning in warnings),
        *tried,
        *refined(quantized),
        f"{len(tried)} models were made and judged on {len(search.judged_by.measured):,} images",
        f"wrote {destination.folder}",
        said(plan),
    ]
