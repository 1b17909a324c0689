"""Whether a float16 file overflows: checked when it is exported, since its outputs are NaN then.

The images are those that the artifact was calibrated on, if they are still where they were. An
artifact holds no images, so without them noise, black and white are tried: weights that are too
large for float16 show on any image, activations that grow on few images may not.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from marrq.errors import MarrqError
from marrq.models.preprocessing import Preprocessing
from marrq.quantized_model import QuantizedModel
from marrq.workflows.judging import calibrated_on
from marrq.zero_shot import labels_without_classes
from runtime.measure.overflow import first_overflow

IMAGES = 4


def overflow_warning(
    model: QuantizedModel, file: Path, takes_images: bool, is_symmetric: bool
) -> str | None:
    """A sentence that names the first operator of the file that overflows; None if none does.

    takes_images: the graph takes uint8 images and normalizes them itself. is_symmetric: it is the
    form for TensorRT, which has no form in float32.
    """
    pixels = _calibration_images(model)
    of_what = "calibration images"
    if pixels is None:
        pixels, of_what = _synthetic_images(model.preprocessing), "noise, black and white"
    # The file's own input: a graph for servers may take images as they are.
    given = _images(pixels, model.preprocessing) if takes_images else pixels
    found = first_overflow(file, given)
    if found is None:
        return None
    way = "in float32, as --flavor fp32, or as --flavor folded --float32"
    return (
        f"{str(file)!r} gives NaN or infinity: on {of_what} the {found.sentence}; export it "
        f"{'without --symmetric' if is_symmetric else way}"
    )


def _calibration_images(model: QuantizedModel) -> NDArray[np.float32] | None:
    """Some images that the artifact was calibrated on, as inputs [images, channels, height, width];
    None if they are gone, or are other ones now."""
    # Without the classes of an export, as the artifact was calibrated.
    drawn = calibrated_on(model.calibration, labels_without_classes(model))
    if drawn is None:
        return None
    try:
        found: NDArray[np.float32] = drawn.pixels(model.preprocessing)[:IMAGES].numpy()
    # A file that cannot be read any more is no fault of an export.
    except MarrqError:
        return None
    return found


def _synthetic_images(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Two images of noise, a black and a white one, as inputs."""
    random, shape = np.random.default_rng(0), preprocessing.input_size
    images = np.stack([random.random(shape), random.random(shape), np.zeros(shape), np.ones(shape)])
    mean, std = (np.reshape(x, (-1, 1, 1)) for x in (preprocessing.mean, preprocessing.std))
    normalized: NDArray[np.float32] = ((images - mean) / std).astype(np.float32)
    return normalized


def _images(pixels: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """The images uint8 [images, height, width, channels] that a graph normalizes to the pixels."""
    images = pixels.transpose(0, 2, 3, 1) * np.array(preprocessing.std) + preprocessing.mean
    # The graph exchanges red and blue before it normalizes.
    if preprocessing.bgr:
        images = images[..., [2, 1, 0, *range(3, images.shape[-1])]]
    found: NDArray[np.uint8] = np.clip(np.rint(255 * images), 0, 255).astype(np.uint8)
    return found
