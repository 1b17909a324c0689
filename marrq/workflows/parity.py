"""What `marrq bench --parity` joins: torch's side of the comparison (marrq/workflows/evaluate.py)
and ONNX Runtime's side (runtime/measure/parity.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from marrq.errors import MarrqError
from runtime.audit.linears import examine
from runtime.audit.rows import audit
from runtime.measure.linears_alone import LinearsAlone, relative_error
from runtime.measure.parity import Parity, compare_stages
from runtime.measure.stages import ComparedOutput, StageOutput, compared, joined
from runtime.preprocessing import ServedPreprocessing
from runtime.session import WHOLE_GRAPH_PROVIDERS, Model, SessionSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from marrq.models.images import ImageSet
    from marrq.quantized_model import QuantizedModel

IMAGES_AT_ONCE = 8
# Images that the linears are compared on: a few hundred tokens tell what a single one would.
LINEAR_IMAGES = 8


def artifact_of(path: Path, artifacts: Sequence[Path], settings: SessionSettings) -> Path:
    """The artifact that a file is compared with.

    path: an artifact, which is returned, or an ONNX file.
    artifacts: folders; the file must have been exported from one of them as it is now.

    Raises MarrqError if the file was exported from none of them.
    """
    from marrq.artifact.folder import artifact_hash, read_config

    if not path.is_file():
        return path
    # The exporter stamps the hash of the artifact into the file.
    found = Model(path, settings).metadata().artifact
    if found is None:
        raise MarrqError(
            f"{str(path)!r} was not exported from an artifact, so there is nothing to compare it "
            "with: bench it without --parity"
        )
    if not artifacts:
        raise MarrqError(
            f"--parity compares {str(path)!r} with the artifact that it was exported from: name "
            "that by --artifact"
        )
    for folder in artifacts:
        # A folder that is no artifact is a mistake of its own, and has an error of its own.
        read_config(folder)
        if artifact_hash(folder) == found:
            return folder
    names = " or ".join(repr(str(folder)) for folder in artifacts)
    raise MarrqError(
        f"{str(path)!r} was not exported from {names} as it is now: export it again, or name its "
        "own by --artifact"
    )


def measure_parity(
    folder: Path,
    file: Path,
    images: "ImageSet",
    settings: SessionSettings,
    images_done: Callable[[int], None],
) -> Parity:
    """Compare a file with the artifact that it was exported from.

    folder: the artifact. file: the ONNX file.
    images_done: called with the number of images of each batch.
    """
    from exporters.classes import classes_in
    from marrq.artifact.folder import load
    from marrq.models.images import read_image
    from marrq.quantizers.weights_only import weights_only
    from marrq.workflows.float_model import find_float_model
    from marrq.zero_shot import with_classes

    model, session = load(folder), Model(file, settings)
    # What a file leaves out of the artifact, the simulation leaves out too.
    if session.metadata().weights_only:
        model = weights_only(model)
    # What a file was given, and the artifact has not, all stages are given.
    classes = classes_in(file)
    if classes is not None:
        model = with_classes(model, classes)
    original, _ = find_float_model(model.source, classes)
    sides = _Sides(None if original is None else original.module, model.module, session)
    preprocess = ServedPreprocessing.read(session.metadata().preprocessing)
    # Of each output, what is known of each batch.
    batches: dict[str, list[ComparedOutput]] = {}
    pixel_difference, start = 0.0, 0
    for pixels in images.batches(model.preprocessing, IMAGES_AT_ONCE):
        files = images.files[start : start + len(pixels)]
        # What a server makes of the same images, by the terms in the file.
        served = np.stack([preprocess(read_image(place)) for place in files])
        pixel_difference = max(pixel_difference, float(np.abs(served - pixels.numpy()).max()))
        for name, found in sides.compared(pixels, served, start).items():
            batches.setdefault(name, []).append(found)
        start += len(pixels)
        images_done(len(pixels))
    # Targets of images for embeddings are no indices of outputs.
    targets = np.array(images.targets) if model.labels and images.targets else None
    # Linears are compared on few images: each of their channels has hundreds of tokens.
    first = images.pixels(model.preprocessing)[:LINEAR_IMAGES]
    errors = linear_errors(model, file, first, settings)
    return compare_stages(
        {name: joined(parts) for name, parts in batches.items()},
        targets,
        errors,
        pixel_difference,
        _saturating(file, settings),
        LinearsAlone(file, settings).float16,
    )


def _saturating(file: Path, settings: SessionSettings) -> set[str]:
    """The linears whose sums can saturate on this processor."""
    # Such a provider is not the CPU, whose kernels saturate.
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        return set()
    return {row.linear for row in audit(examine(file, settings)) if row.saturates == "here"}


@dataclass(frozen=True)
class _Sides:
    """The float model, None if it is not at hand, and the quantized model in torch, and the file
    under ONNX Runtime."""

    original: "nn.Module | None"
    quantized: "nn.Module"
    session: Model

    def compared(
        self, pixels: "Tensor", served: np.ndarray, seed: int
    ) -> dict[str, ComparedOutput]:
        """The outputs of a batch, by name. pixels: of torch; served: of the file's own
        preprocessing, both [images, channels, height, width]. seed: of the nudge."""
        import torch

        from marrq.workflows.evaluate import nudged

        with torch.no_grad():
            original = self._of_torch(self.original, pixels)
            simulated = self._of_torch(self.quantized, pixels)
            moved = self._of_torch(self.quantized, nudged(pixels, seed))
        exported, given = self.session.run_all(pixels.numpy()), self.session.run_all(served)
        return {
            output.name: compared(
                StageOutput(
                    original.get(output.name),
                    simulated[output.name],
                    moved[output.name],
                    exported[output.name],
                    given[output.name],
                ),
                output.kind,
            )
            for output in self.session.outputs
        }

    def _of_torch(self, module: "nn.Module | None", pixels: "Tensor") -> dict[str, np.ndarray]:
        """What a model gives, by the names of the file; nothing for a model that is not there."""
        from marrq.models.named_outputs import as_tuple

        if module is None:
            return {}
        names = [output.name for output in self.session.outputs]
        found = as_tuple(module(pixels))
        return {name: output.numpy() for name, output in zip(names, found, strict=True)}


def linear_errors(
    model: "QuantizedModel", file: Path, pixels: "Tensor", settings: SessionSettings
) -> dict[str, float]:
    """Relative error of each quantized linear of the file, alone, on the input that it has in
    torch. pixels: [images, channels, height, width]."""
    from marrq.workflows.evaluate import watch_linears

    linears, tensors = LinearsAlone(file, settings), model.module.state_dict()
    errors: dict[str, float] = {}

    def seen(path: str, x: "Tensor", y: "Tensor") -> None:
        bias = tensors.get(f"{path}.bias")
        if bias is not None and linears.lacks_bias(path):
            y = y - bias
        # The file has LayerScale multiplied into the linear; torch applies it after the linear.
        scale = linears.scale(path)
        expected = y if scale is None else y * tensors[scale]
        errors[path] = relative_error(linears.run(path, x.numpy()), expected.numpy())

    watch_linears(model.module, pixels, seen)
    return errors
