"""What models answer in torch over an image set, and how right that is.

Accuracy and the worth of embeddings are computed in one place, runtime/measure, for torch and ONNX
Runtime alike. `watch_linears` and `nudged` serve the comparison of torch with an export
(marrq/workflows/parity.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from marrq.artifact.config import PACKAGES
from marrq.artifact.folder import artifact_hash, is_artifact, load
from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.models.blocks import hooked
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.images import ImageSet
from marrq.models.images.gallery import MeasuredSets
from marrq.models.load import VisionModel, load_model
from marrq.models.named_outputs import OutputKind, as_tuple, output_kind
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.workflows.float_model import find_float_model
from marrq.workflows.judging import flattered_by_record
from marrq.zero_shot import labels_without_classes, with_classes
from runtime.errors import BenchError
from runtime.measure.accuracy import Accuracy, measure_accuracy
from runtime.measure.embedded import (
    FEWEST,
    Embedded,
    Embedding,
    KnownClasses,
    compare_embeddings,
)
from runtime.measure.judge import agreement
from runtime.measure.measured import Agreement

BATCH_SIZE = 16

SCHEMA = "marrq.evaluate/1"

FLOAT = "float"
"""The title of the float model."""

AnyModel = VisionModel | QuantizedModel
Evaluation = Accuracy | Agreement | Embedding

CLASSES: OutputKind = "classes"
FEATURES: OutputKind = "features"


@dataclass(frozen=True)
class Candidates:
    """The models to evaluate, by title, the float model first.

    name: what the user gave.
    warnings: how the float model was read, or that it is not at hand.
    artifact: the hash of the artifact, if one is evaluated.
    """

    name: str
    models: dict[str, AnyModel]
    warnings: tuple[str, ...] = ()
    artifact: str | None = None

    def classified(self, classes: ClassEmbeddings | None) -> "Candidates":
        """The same models, each with these classes if there are any. Raises MarrqError as
        `with_classes`."""
        if classes is None:
            return self
        models = {title: with_classes(model, classes) for title, model in self.models.items()}
        return replace(self, models=models)

    def flattered_by(self, judging: ImageSet) -> list[str]:
        """A sentence if some of the images have calibrated the artifact."""
        return [
            sentence
            for model in self.models.values()
            if isinstance(model, QuantizedModel)
            for sentence in flattered_by_record(
                model.calibration, labels_without_classes(model), judging
            )
        ]


def load_candidates(name: str, outputs: tuple[str, ...] = ()) -> Candidates:
    """The models to evaluate.

    name: a model as `load_model` takes it, or an artifact's folder, which is evaluated beside the
    float model that it was made from, if that is at hand.
    outputs: of a model, as `load_model` takes them; an artifact has its own.
    Raises MarrqError if it cannot be loaded, and for outputs of an artifact.
    """
    # A folder may also be a transformers checkpoint; an artifact says that it is an artifact.
    if not is_artifact(Path(name)):
        model = load_model(name, outputs)
        return Candidates(name, {FLOAT: model}, model.notes)
    if outputs:
        raise MarrqError(
            f"the artifact {name!r} has the outputs that it was quantized with: leave out "
            "--outputs, or quantize the model with it"
        )
    quantized, identity = load(Path(name)), artifact_hash(Path(name))
    title = f"{quantized.scheme.description} {quantized.method_name}"
    # An artifact has all of its own tensors: the float model is there to be compared with.
    original, reason = find_float_model(quantized.source)
    if original is None:
        alone = f"evaluated without the float model: {reason}"
        return Candidates(name, {title: quantized}, (alone,), identity)
    both: dict[str, AnyModel] = {FLOAT: original, title: quantized}
    return Candidates(name, both, original.notes, identity)


def report(
    candidates: Candidates,
    images: MeasuredSets,
    found: Mapping[str, Evaluation],
    device: torch.device,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """What was found of each candidate, by title, as JSON (schema marrq.evaluate/1)."""
    first = next(iter(candidates.models.values()))
    return {
        "schema": SCHEMA,
        "model": first.source.name,
        "path": candidates.name,
        "artifact": candidates.artifact,
        "device": device.type,
        "versions": {name: version(name) for name in PACKAGES},
        "data": images.measured.description(),
        "gallery": None if images.gallery is None else images.gallery.description(),
        "models": {title: one.to_json() for title, one in found.items()},
        "warnings": list(warnings),
    }


@torch.no_grad()
def judged(model: AnyModel) -> tuple[nn.Module, OutputKind]:
    """The model as a module that returns its logits or else its first embedding, and which of the
    two that is. Raises MarrqError if all of its outputs are dense."""
    device = next(model.module.parameters()).device
    trial = torch.zeros(1, *model.preprocessing.input_size, device=device)
    kinds = [
        output_kind(name, output.dim(), model.labels)
        for name, output in zip(model.outputs, as_tuple(model.module(trial)), strict=True)
    ]
    for kind in (CLASSES, FEATURES):
        if kind in kinds:
            return _OneOutput(model.module, kinds.index(kind)), kind
    raise MarrqError(
        f"{model.source.name!r} gives dense outputs alone, {', '.join(model.outputs)}, which are "
        "measured on exported files: export it, and run marrq bench"
    )


class _OneOutput(nn.Module):
    """A model of which one output is asked."""

    def __init__(self, model: nn.Module, place: int) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, pixels: Tensor) -> Tensor:
        return as_tuple(self.model(pixels))[self.place]


@dataclass(frozen=True)
class Evaluating:
    """How models are evaluated.

    images_done: called with the number of images of each batch, of all processes together.
    processes: each computes some of the batches.
    """

    device: torch.device
    images_done: Callable[[int], None] = lambda count: None
    processes: Processes = ONE_PROCESS


def evaluate(
    models: Mapping[str, AnyModel], images: MeasuredSets, how: Evaluating
) -> dict[str, Evaluation]:
    """What is known of each model's answers, by its title.

    Of a classifier that is top-1, top-5 and agreement with the float model; if the classes of the
    images are not known, the agreement alone, of all models but the float one. Of a model that
    gives embeddings it is how like they are to the float model's, and what they find.

    Raises MarrqError if nothing can be measured, and if there are more processes than batches; and
    BenchError for outputs that are not finite.
    """
    if len(models) == 1:
        # There is nothing that it could be compared with, so its right answers are counted.
        images.measured.labelled()
    # An artifact stores its preprocessing; its float model must see the same pixels.
    preprocessing = list(models.values())[-1].preprocessing
    _, kind = judged(next(iter(models.values())))
    found = {}
    for title, model in models.items():
        try:
            found[title] = answers(model, images, preprocessing, how)
        except BenchError as error:
            raise BenchError(f"{title}: {error}") from error
    return judge(found, images, kind)


def answers(
    model: AnyModel, images: MeasuredSets, preprocessing: Preprocessing, how: Evaluating
) -> Embedded:
    """Logits, or embeddings, of all images. Raises BenchError if they are not finite."""
    module, kind = judged(model)
    # Nobody looks for neighbours of a classifier's answers.
    among = images.gallery if kind == FEATURES else None
    found = [
        predict(module, chosen, preprocessing, how).numpy()
        for chosen in (images.measured, among)
        if chosen is not None
    ]
    if not all(np.isfinite(part).all() for part in found):
        raise BenchError(
            "the model gives NaN or infinite outputs: its numbers overflow, so they mean nothing"
        )
    return Embedded(*found)


def judge(
    found: Mapping[str, Embedded], images: MeasuredSets, kind: OutputKind
) -> dict[str, Evaluation]:
    """What is known of each model's answers, by its title.

    kind: of the answers. Raises MarrqError for logits if neither classes nor a float model tell
    what is right, and for embeddings of a single image; BenchError for logits that are not finite.
    """
    float_model, measured = found.get(FLOAT), images.measured
    if kind == FEATURES:
        if len(measured) < FEWEST:
            raise MarrqError(
                f"embeddings are judged on {FEWEST} images or more, and {measured.name!r} has "
                f"{len(measured)}: add images"
            )
        reference = FLOAT if FLOAT in found else None
        return {**compare_embeddings(found, known_classes(images), reference, reference)}
    logits = None if float_model is None else float_model.measured
    if logits is None or measured.targets:
        targets = np.array(measured.labelled())
        return {title: measure_accuracy(x.measured, targets, logits) for title, x in found.items()}
    others = {title: x for title, x in found.items() if title != FLOAT}
    return {title: agreement(logits, x.measured) for title, x in others.items()}


def known_classes(images: MeasuredSets) -> KnownClasses | None:
    """The classes of the images, for `compare_embeddings`; None if they are not known."""
    if not images.measured.targets:
        return None
    among = None if images.gallery is None else np.array(images.gallery.targets)
    return KnownClasses(np.array(images.measured.targets), among)


@torch.no_grad()
def predict(
    module: nn.Module, images: ImageSet, preprocessing: Preprocessing, how: Evaluating
) -> Tensor:
    """Logits, or embeddings, float32 [images, …] on the CPU, the same in every process.

    Raises MarrqError if there are more processes than batches.
    """
    module, processes = module.to(how.device), how.processes
    starts = range(0, len(images), BATCH_SIZE)
    if processes.size > len(starts):
        raise MarrqError(
            f"{processes.size} processes for {len(starts)} batches of images: start fewer"
        )
    # Consecutive batches for each process: gathered by rank, the outputs are in order.
    mine = processes.share(starts)
    # The last batch may be shorter; a slice stops at the end by itself.
    rows = slice(mine[0], mine[-1] + BATCH_SIZE)
    found = []
    for pixels in images.subset(rows).batches(preprocessing, BATCH_SIZE):
        found.append(module(pixels.to(how.device)).float().cpu())
        # The other processes are about as far, so the bar of the first one counts for all.
        how.images_done(len(pixels) * processes.size)
    return processes.all_gather(torch.cat(found))


@torch.no_grad()
def watch_linears(
    module: nn.Module, pixels: Tensor, seen: Callable[[str, Tensor, Tensor], None]
) -> None:
    """Run a batch, and call `seen` with path, input [..., in] and output [..., out] of each
    quantized linear in turn.

    Nothing is kept: inputs and outputs of all linears together may be larger than the model.
    """

    # A hook of torch gets the module, the tuple of its arguments and its output.
    def leave(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, arguments, output: seen(path, arguments[0], output)

    linears = quantized_linears(module)
    with hooked([linear.register_forward_hook(leave(path)) for path, linear in linears.items()]):
        module(pixels)


def nudged(pixels: Tensor, seed: int) -> Tensor:
    """Every value changed by about a millionth of itself, as float sums in another order differ."""
    # Relative to each value, and far above the spacing of float32, 1.2e-7.
    generator = torch.Generator().manual_seed(seed)
    return pixels * (1 + 1e-6 * torch.randn(pixels.shape, generator=generator))
