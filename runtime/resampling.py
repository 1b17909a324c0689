"""What torchvision makes of a tensor of pixels if it resizes it with antialiasing, in NumPy.

Rows and columns are resized one after the other. An output pixel i is a sum over input pixels j,

    y_i = Σ_j w_ij x_j,    w_ij = f((j + 1/2 - c_i) / max(s, 1)) / Σ_j f(…),    c_i = s (i + 1/2)

    s         input pixels for one output pixel
    f         1 - |t| for bilinear; Keys's cubic with a = -1/2 for bicubic; sinc(t) sinc(t / 3) for
              lanczos

Of 8-bit pixels torch does it in integers (aten/src/ATen/native/cpu/UpSampleKernel.cpp,
`_compute_index_ranges_int16_weights`): with the largest p for which the largest weight times 2^p
fits into 16 bits,

    y_i = clip(⌊(Σ_j round(2^p w_ij) x_j + 2^(p-1)) / 2^p⌋, 0, 255)

and y is rounded to 8 bits between columns and rows. The sums here are in float64, which holds these
integers exactly, so the pixels are the same bits as torch's on a processor with AVX2 or NEON. On
others torch resizes bilinearly in float32 and rounds, which may differ by one level of 255.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

MAX_PRECISION = 22
"""Largest p that torch uses."""

BLOCK = 32
"""Output pixels of one product: they share most of the input pixels that they read."""


def _linear(t: Numbers) -> Numbers:
    return np.where(np.abs(t) < 1, 1 - np.abs(t), 0)


def _cubic(t: Numbers) -> Numbers:
    t = np.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1
    return np.where(t < 1, near, np.where(t < 2, -0.5 * (((t - 5) * t + 8) * t - 4), 0))


def _lanczos(t: Numbers) -> Numbers:
    return np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)


FILTERS: dict[str, tuple[Callable[[Numbers], Numbers], float]] = {
    "bilinear": (_linear, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""f, and how far it reaches to each side."""

INTERPOLATIONS = ("nearest", *FILTERS)


def resize(
    pixels: NDArray[np.uint8] | NDArray[np.float32], height: int, width: int, interpolation: str
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """The pixels [height, width, channels], uint8 or float32, as torchvision resizes them.

    interpolation: one of INTERPOLATIONS.
    """
    for axis, size in ((1, width), (0, height)):
        given = pixels.shape[axis]
        if given == size:
            continue
        if interpolation == "nearest":
            # The input pixel in whose area the middle of the output pixel lies; torch computes it
            # in float32.
            middles = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(
                given / size
            )
            pixels = pixels.take(np.minimum(middles.astype(int), given - 1), axis)
        else:
            along = np.moveaxis(pixels, axis, -1)
            pixels = np.moveaxis(_one_axis(along, size, interpolation), -1, axis)
    return pixels


def _one_axis(
    pixels: NDArray[np.uint8] | NDArray[np.float32], size: int, interpolation: str
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Pixels [..., given] resized to [..., size]."""
    integers = pixels.dtype == np.uint8
    # torch finds the weights in float64 for integers, and in float32 for float32.
    kind = "float64" if integers else "float32"
    weights, starts, ends = _weights(pixels.shape[-1], size, interpolation, kind)
    precision = 0
    if integers:
        precision = _precision(weights.max())
        # torch rounds halves away from zero.
        scaled = weights * 2.0**precision
        weights = np.trunc(scaled + np.copysign(0.5, scaled))
    # Blocks of output pixels, since a product with all weights would multiply zeros.
    result = np.empty((*pixels.shape[:-1], size), pixels.dtype)
    for first in range(0, size, BLOCK):
        rows = slice(first, first + BLOCK)
        # All other weights of these rows are zero.
        read = slice(starts[rows].min(), ends[rows].max())
        sums = pixels[..., read].astype(np.float64) @ weights[rows, read].T
        if integers:
            sums = np.clip(np.floor((sums + 2.0 ** (precision - 1)) / 2.0**precision), 0, 255)
        result[..., rows] = sums
    return result


@lru_cache(maxsize=16)
def _weights(
    given: int, size: int, interpolation: str, kind: str
) -> tuple[Numbers, NDArray[np.int64], NDArray[np.int64]]:
    """The weights w [size, given], the first input pixel that each output pixel reads, and the last
    plus one. kind: type in which they are computed."""
    weigh, reach = FILTERS[interpolation]
    number = np.dtype(kind).type
    step = number(given / size)
    # An image that gets smaller is averaged over more pixels; one that gets larger is not.
    stretch = max(step, number(1))
    centres = step * (np.arange(size, dtype=kind) + number(0.5))
    half = number(reach) * stretch
    starts = np.maximum((centres - half + number(0.5)).astype(np.int64), 0)
    ends = np.minimum((centres + half + number(0.5)).astype(np.int64), given)
    weights = np.zeros((size, given))
    for row, (start, end, centre) in enumerate(zip(starts, ends, centres, strict=True)):
        places = np.arange(start, end, dtype=kind)
        values = weigh((places - centre + number(0.5)) / stretch)
        weights[row, start:end] = values / values.sum()
    return weights, starts, ends


def _precision(largest: float) -> int:
    """The exponent p for the largest weight."""
    precision = 0
    while precision < MAX_PRECISION and int(0.5 + largest * 2 ** (precision + 1)) < 2**15:
        precision += 1
    return precision
