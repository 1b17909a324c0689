"""What `marrq bench --parity` joins: torch's side of the comparison (marrq/workflows/evaluate.py)
and ONNX Runtime's (runtime/measure/parity.py)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marrq.errors import MarrqError

if TYPE_CHECKING:
    from torch import Tensor

    from marrq.models.images import ImageSet
    from marrq.quantized_model import QuantizedModel
    from runtime.session import SessionSettings

IMAGES_AT_ONCE = 8
LINEAR_IMAGES = 8
"""Images that the linears are compared on: a few hundred tokens tell what one would."""


def artifact_of(path: Path, artifacts: Sequence[Path], settings: "SessionSettings") -> Path:
    """The artifact to compare with: the folder itself, or the one among `artifacts` that an ONNX
    file was exported from. Raises MarrqError when it is none of them."""
    from marrq.artifact.folder import artifact_hash, read_config
    from runtime.session import Model

    if not path.is_file():
        return path
    found = Model(path, settings).metadata().get("marrq.artifact")
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
    settings: "SessionSettings",
    images_done: Callable[[int], None],
) -> dict[str, Any]:
    """The section `parity` of the bench's JSON for a file and the artifact it was exported from.
    images_done: called after each batch."""
    import numpy as np
    import torch

    from marrq.artifact.folder import load
    from marrq.models.images import read_image
    from marrq.models.load import load_source
    from marrq.workflows.evaluate import nudged
    from runtime.measure.parity import Logits, parity
    from runtime.preprocessing import Preprocessing
    from runtime.session import Model

    model, session = load(folder), Model(file, settings)
    original = load_source(model.source).module
    preprocess = Preprocessing.read(session.metadata()["marrq.preprocessing"])
    rows: list[list[np.ndarray]] = []
    pixel_difference = 0.0
    for start, (pixels, _) in zip(
        range(0, len(images), IMAGES_AT_ONCE),
        images.batches(model.preprocessing, IMAGES_AT_ONCE),
        strict=True,
    ):
        served = np.stack(
            [
                preprocess(read_image(place))
                for place in images.files[start : start + IMAGES_AT_ONCE]
            ]
        )
        pixel_difference = max(pixel_difference, float(np.abs(served - pixels.numpy()).max()))
        with torch.no_grad():
            torchs = [original(pixels), model.module(pixels), model.module(nudged(pixels, start))]
        rows.append(
            [
                *(logits.numpy() for logits in torchs),
                session.run(pixels.numpy()),
                session.run(served),
            ]
        )
        images_done(len(pixels))
    logits = Logits(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))
    errors = linear_errors(
        model, file, images.pixels(model.preprocessing)[:LINEAR_IMAGES], settings
    )
    return parity(logits, np.array(images.targets), errors, pixel_difference)


def linear_errors(
    model: "QuantizedModel", file: Path, pixels: "Tensor", settings: "SessionSettings"
) -> dict[str, float]:
    """Relative error of each quantized linear of the file, alone, on what enters it in torch.
    pixels: [images, channels, height, width]."""
    from marrq.workflows.evaluate import watch_linears
    from runtime.measure.parity import LinearsAlone, relative_error

    linears, tensors = LinearsAlone(file, settings), model.module.state_dict()
    errors: dict[str, float] = {}

    def seen(path: str, x: "Tensor", y: "Tensor") -> None:
        scale = linears.scale(path)
        expected = y if scale is None else y * tensors[scale]
        errors[path] = relative_error(linears.run(path, x.numpy()), expected.numpy())

    watch_linears(model.module, pixels, seen)
    return errors
