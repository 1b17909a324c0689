"""Logits of a model in torch over an image set, and what they say about accuracy.

Accuracy itself is computed in one place, runtime/measure/accuracy.py, for torch and ONNX Runtime
alike. `watch_linears` and `nudged` serve the comparison of torch with an export
(marrq/workflows/parity.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from marrq.artifact.folder import is_artifact, load
from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.models.blocks import hooked
from marrq.models.images import ImageSet
from marrq.models.load import VisionModel, load_model
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import QuantizedModel
from marrq.quantizers.linear import quantized_linears
from marrq.workflows.float_model import find_float_model
from runtime.errors import BenchError
from runtime.measure.accuracy import Accuracy, measure_accuracy

BATCH_SIZE = 16

FLOAT = "float"
"""The title of the float model."""

AnyModel = VisionModel | QuantizedModel


@dataclass(frozen=True)
class Candidates:
    """The models to evaluate, by title, the float model first; and sentences about how the float
    model was read, or that it is not at hand."""

    models: dict[str, AnyModel]
    warnings: tuple[str, ...] = ()


def load_candidates(name: str) -> Candidates:
    """The models to evaluate.

    name: a model as `load_model` takes it, or an artifact's folder, which is evaluated beside the
    float model that it was made from, if that is at hand. Raises MarrqError if it cannot be loaded.
    """
    # A folder may also be a transformers checkpoint; an artifact says that it is an artifact.
    if not is_artifact(Path(name)):
        model = load_model(name)
        return Candidates({FLOAT: model}, model.notes)
    quantized = load(Path(name))
    title = f"{quantized.scheme.description} {quantized.method.name}"
    # An artifact has all of its own tensors: the float model is there to be compared with.
    original, reason = find_float_model(quantized.source)
    if original is None:
        return Candidates({title: quantized}, (f"evaluated without the float model: {reason}",))
    return Candidates({FLOAT: original, title: quantized}, original.notes)


def evaluate(
    models: Mapping[str, AnyModel],
    images: ImageSet,
    device: torch.device,
    images_done: Callable[[int], None] = lambda count: None,
    processes: Processes = ONE_PROCESS,
) -> dict[str, Accuracy]:
    """Top-1, top-5, and agreement with the float model, of each model by its title.

    images_done: called with the number of images of each batch. Raises MarrqError if there are more
    processes than batches, and if the images have no targets; and BenchError for logits that are
    not finite.
    """
    targets = np.array(images.labelled())
    found: dict[str, Accuracy] = {}
    reference = None
    # An artifact stores its preprocessing; its float model must see the same pixels.
    preprocessing = list(models.values())[-1].preprocessing
    for title, model in models.items():
        logits = predict(
            model.module, images, preprocessing, device, images_done, processes
        ).numpy()
        # Agreement and divergence of every model are taken against the float model, the first one.
        reference = logits if title == FLOAT else reference
        try:
            found[title] = measure_accuracy(logits, targets, reference)
        except BenchError as error:
            raise BenchError(f"{title}: {error}") from error
    return found


@torch.no_grad()
def predict(
    module: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    images_done: Callable[[int], None] = lambda count: None,
    processes: Processes = ONE_PROCESS,
) -> Tensor:
    """Logits float32 [images, classes] on the CPU, the same in every process.

    images_done: called with the number of images of each batch, of all processes together.
    processes: each computes some of the batches. Raises MarrqError if there are more processes than
    batches.
    """
    module = module.to(device)
    starts = range(0, len(images), BATCH_SIZE)
    if processes.size > len(starts):
        raise MarrqError(
            f"{processes.size} processes for {len(starts)} batches of images: start fewer"
        )
    # Consecutive batches for each process: gathered by rank, the logits are in order.
    mine = processes.share(starts)
    # The last batch may be shorter; a slice stops at the end by itself.
    rows = slice(mine[0], mine[-1] + BATCH_SIZE)
    logits = []
    for pixels in images.subset(rows).batches(preprocessing, BATCH_SIZE):
        logits.append(module(pixels.to(device)).float().cpu())
        # The other processes are about as far, so the bar of the first one counts for all.
        images_done(len(pixels) * processes.size)
    return processes.all_gather(torch.cat(logits))


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
