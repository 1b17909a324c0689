"""Compare methods × schemes × seeds on one model: every run is done once, and is in the JSON file
(schema marrq.compare/2) as soon as it is done.

A run quantizes the model with one scheme and method on the images that one seed draws, and measures
the result on the images of val/. Who does a run changes nothing but its time: this process does the
runs one after the other (`Runner`), or workers of Ray do (marrq/workflows/compare_on_ray.py).
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from marrq.artifact.config import PACKAGES
from marrq.files import write_json
from marrq.methods.spec import MethodSpec, text_of
from marrq.models.blocks import find_blocks
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.images import find_images
from marrq.models.images.counts import GALLERY_IMAGES
from marrq.models.images.gallery import find_measured
from marrq.models.load import load_model
from marrq.pipeline.full_precision import FullPrecisionInputs, FullPrecisionKey
from marrq.pipeline.quantize import RunOptions, check_groups
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import bits_per_weight
from marrq.schemes import Scheme
from marrq.workflows.checks import check_comparison
from marrq.workflows.devices import peak_memory
from marrq.workflows.evaluate import (
    FLOAT,
    AnyModel,
    Evaluating,
    Evaluation,
    answers,
    judge,
    judged,
)
from marrq.workflows.judging import flattered
from marrq.workflows.quantize import Recipe, check_apart, quantize_in_place, shortfalls
from marrq.zero_shot import with_classes
from runtime.environment import describe_machine
from runtime.errors import BenchError
from runtime.measure.accuracy import Accuracy
from runtime.measure.embedded import Embedded, Embedding
from runtime.report.comparison import SCHEMA

RUN = "run"
"""The title of a run's model beside the float model."""


@dataclass(frozen=True)
class Task:
    """What all runs have in common.

    model: as `load_model` takes it. data: as `find_images` takes it. samples: calibration images of
    a run, None for the default number. device: cpu or cuda.
    gallery_images: of train/ that k-NN looks among, at most.
    outputs: as `load_model` takes them.
    classes: that a model which gives features is judged by; None for what it gives itself.
    """

    model: str
    data: str
    samples: int | None
    device: str
    gallery_images: int = GALLERY_IMAGES
    outputs: tuple[str, ...] = ()
    classes: ClassEmbeddings | None = None


@dataclass(frozen=True)
class Combination:
    """Seed, scheme and method of a run."""

    seed: int
    scheme: Scheme
    method: MethodSpec

    @property
    def key(self) -> dict[str, Any]:
        """What tells this run from the others of a report, as JSON."""
        # The description has the activations' strategy, which `str(scheme)` has not. A method is
        # known by its settings too.
        return {
            "scheme": self.scheme.description,
            "method": text_of(self.method),
            "seed": self.seed,
        }

    def is_in(self, run: dict[str, Any]) -> bool:
        """Whether a run of a report is this one."""
        return self.key.items() <= run.items()


Distribute = Callable[[Task, list[Combination]], Iterator[dict[str, Any]]]
"""Does the runs of a task elsewhere, and gives them as they are done."""


def compare(
    task: Task,
    combinations: list[Combination],
    file: Path,
    show: Callable[[int, int, str], None] = lambda done, count, note: None,
    distribute: Distribute | None = None,
) -> dict[str, Any]:
    """Do the runs that the file does not hold yet; return the report with the runs asked for.

    file: the JSON; it is written after every run, so that a command that was stopped can go on.
    show: called with the number of runs done, the number of all, and what is being done.
    distribute: who does the runs; None: this process.

    Raises MarrqError if the file is of another model, other images or another number of samples,
    and whatever a run raises. Runs that were done before that are in the file.
    """
    # Also if others do the runs: the report names weights and images, and a wrong name of either is
    # told before workers start.
    runner = Runner(task)
    report = ReportFile(file, runner, combinations)
    missing, count = report.missing(), len(combinations)
    runner.check(missing)
    present = count - len(missing)
    show(present, count, "")

    def announced() -> Iterator[Combination]:
        for done, one in enumerate(missing, present):
            note = f"{one.scheme.description} {text_of(one.method)}, seed {one.seed}"
            show(done, count, note)
            yield one

    # The generator is read one by one, so a run is announced when it begins.
    runs = map(runner.run, announced()) if distribute is None else distribute(task, missing)
    for done, run in enumerate(runs, present + 1):
        # On the disk at once: whatever stops the command, this run is not done again.
        report.add(run)
        show(done, count, "")
    return report.selected()


class Runner:
    """Does runs one after the other, in this process.

    They share the float model, its answers and the images. Runs that follow each other with the
    same seed, rotation, first and last layers and balance share the full-precision tokens too.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.device = task, torch.device(task.device)
        # Loaded once: every run quantizes a copy.
        self.original = load_model(task.model, task.outputs)
        self.train = find_images(task.data, "train", self.original.labels)
        self.samples = self.train.samples(task.samples)
        # What answers: classes are no part of what is quantized.
        self.answering = self._classified(self.original)
        self.images = find_measured(task.data, self.answering.labels, task.gallery_images)
        _, self.kind = judged(self.answering)
        self.shared: FullPrecisionInputs | None = None

    def check(self, combinations: list[Combination]) -> None:
        """Raise MarrqError, before the first run, if a method does not go with its scheme, if there
        are too few images, or if the groups of a scheme do not fit the model."""
        for one in combinations:
            recipe = self._recipe(one)
            recipe.settings(self.train.draw(recipe.samples, recipe.seed))
            if one.method.refinement.on:
                recipe.fresh(self.train)
                check_apart(self.train, self.images.measured)
        grouped = {one.scheme for one in combinations if one.scheme.weight.group_size}
        if not grouped:
            return
        # The trial forwards of `find_blocks` add noise to this image.
        size = self.original.preprocessing.input_size
        blocks = find_blocks(self.original.module, torch.zeros(1, *size))
        for scheme in sorted(grouped, key=str):
            check_groups(blocks, scheme)

    def run(self, combination: Combination) -> dict[str, Any]:
        """Quantize and measure: the run as the report has it, and under `float` the accuracy of the
        float model."""
        # The float model answers once, and not on the time of the first run.
        float_model = self.float_model
        # Time and memory are those of quantizing alone, without measuring.
        start = time.perf_counter()
        with peak_memory() as peak:
            model = self._quantized(combination)
        seconds = time.perf_counter() - start
        try:
            measured = self._measured(model)
        except BenchError as error:
            # The other combinations have no part in it, so the user has to know which one to drop.
            named = f"{combination.scheme.description} {combination.method.name}"
            raise BenchError(f"{named}, seed {combination.seed}: {error}") from error
        return {
            **combination.key,
            **measured,
            "shortfalls": list(shortfalls(model)),
            "seconds": seconds,
            "peak_memory_mb": peak(),
            "float": float_model,
        }

    def notes(self, seeds: Iterable[int]) -> list[str]:
        """How the weights were read, and what cannot be measured on the images, with the draws of
        some seeds."""
        why = self.images.measured.why_unlabelled
        unlabelled = [f"classes are not known: {why}"] if why else []
        draws = [self.train.draw(self.samples, seed) for seed in seeds]
        both = flattered(draws, self.images.measured)
        return [*self.original.notes, *both, *unlabelled, *self.images.notes]

    @cached_property
    def reference(self) -> Embedded:
        """What the float model answers: logits or embeddings of the held-out images, and for
        embeddings of the gallery's."""
        return self._answers(self.answering)

    @cached_property
    def float_model(self) -> dict[str, Any]:
        """The float model as the report has it: the number of images, and top-1 or what embeddings
        find, if the classes of the images are known."""
        found, images = self._judged(self.reference), {"images": len(self.images.measured)}
        if isinstance(found, Accuracy):
            return {"top1": found.top1, **images}
        if isinstance(found, Embedding) and found.retrieval is not None:
            seen = found.retrieval
            return {"knn20": seen.knn20.share, "retrieval": seen.to_json(), **images}
        return images

    def _recipe(self, combination: Combination) -> Recipe:
        scheme, method = combination.scheme, combination.method
        return Recipe(scheme, method, self.samples, combination.seed)

    def _quantized(self, combination: Combination) -> QuantizedModel:
        # Quantizing replaces linears in place, and the next run needs the float model again.
        copied = replace(self.original, module=copy.deepcopy(self.original.module))
        recipe = self._recipe(combination)
        settings = recipe.settings(self.train.draw(recipe.samples, recipe.seed))
        key = FullPrecisionKey.of(self.original, settings, self.device)
        # Tokens of a model are large, and combinations come in the order of their seeds: only the
        # tokens of the last key are kept.
        if self.shared is None or self.shared.key != key:
            self.shared = FullPrecisionInputs(key)
        run = RunOptions(self.device, shared=self.shared)
        return quantize_in_place(copied, self.train, recipe, run)

    def _measured(self, model: QuantizedModel) -> dict[str, Any]:
        # Errors J of layers differ by orders of magnitude, so their sum is about the largest. The
        # mean of the relative errors counts every layer alike.
        reports, answering = model.reports, self._classified(model)
        found = self._judged(self._answers(answering))
        return {
            **({"embedding": found.to_json()} if isinstance(found, Embedding) else found.to_json()),
            "error": sum(report.error for report in reports),
            "relative_error": sum(report.relative_error for report in reports) / len(reports),
            "bits_per_weight": bits_per_weight(model.module),
            "alphas": {report.path: report.alpha for report in reports},
            "fallbacks": {report.path: report.fallback for report in reports if report.fallback},
        }

    def _classified(self, model: AnyModel) -> AnyModel:
        return model if self.task.classes is None else with_classes(model, self.task.classes)

    def _answers(self, model: AnyModel) -> Embedded:
        return answers(model, self.images, self.original.preprocessing, Evaluating(self.device))

    def _judged(self, found: Embedded) -> Evaluation:
        # The float model beside itself has lost nothing.
        both = {FLOAT: self.reference, RUN: found}
        return judge(both, self.images, self.kind)[RUN]


class ReportFile:
    """The report in its file, and the runs that it is to have."""

    def __init__(self, file: Path, runner: Runner, combinations: list[Combination]) -> None:
        """Read the file if it exists. Raises MarrqError if it holds something else."""
        self.file, self.combinations = file, combinations
        self.added: list[dict[str, Any]] = []
        measured, gallery = runner.images.measured, runner.images.gallery
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "model": runner.task.model,
            "weights": runner.original.source.weights_sha256,
            "outputs": list(runner.answering.outputs),
            "data": measured.description(),
            # Neighbours among other images, and other classes, cannot stand in one table either.
            "gallery": None if gallery is None else gallery.description(),
            "classes": None if runner.task.classes is None else runner.task.classes.sha256,
            "calibration": runner.train.sha256,
            "samples": runner.samples,
            "device": runner.task.device,
            "versions": {name: version(name) for name in PACKAGES},
        }
        # The machine of the command; times can be compared within one file alone.
        environment = {**describe_machine().to_json(), "torch": version("torch")}
        found = check_comparison(file, about) or {"environment": environment, "runs": []}
        # Files of earlier versions have no warnings.
        notes = runner.notes({one.seed for one in combinations})
        self.report = {**about, "warnings": notes, **found}

    def missing(self) -> list[Combination]:
        """The combinations that the file does not hold."""
        # Runs are known by their keys: the file may have been written on another machine.
        return [one for one in self.combinations if not any(map(one.is_in, self.report["runs"]))]

    def add(self, run: dict[str, Any]) -> None:
        """Write a run to the file, after the runs that the file had before.

        New runs stand in the order of the combinations, whichever was done first.
        """
        # Every run brings the accuracy of the float model; the report has it once.
        self.report["float"] = run.pop("float")
        self.added.append(run)
        # Workers finish in any order; the file must not depend on who was fast.
        self.added.sort(key=self._place)
        write_json(self.file, {**self.report, "runs": self._runs()})

    def selected(self) -> dict[str, Any]:
        """The report with the runs that were asked for, whatever else the file holds."""
        # The file may hold runs of an earlier command with other methods or more seeds.
        wanted = [run for run in self._runs() if any(one.is_in(run) for one in self.combinations)]
        fell_short = [
            f"{run['scheme']} {run['method']}, seed {run['seed']}: {sentence}"
            for run in wanted
            for sentence in run["shortfalls"]
        ]
        warnings = [*self.report["warnings"], *fell_short]
        return {**self.report, "runs": wanted, "warnings": warnings}

    def _runs(self) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self.report["runs"]
        return runs + self.added

    def _place(self, run: dict[str, Any]) -> int:
        return next(place for place, one in enumerate(self.combinations) if one.is_in(run))
