"""The preprocessing of an exported file, done in numpy and Pillow, gives the pixels that torch
calibrated and evaluated the model with."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from marrq.models.preprocessing import Preprocessing
from runtime.errors import BenchError
from runtime.preprocessing import CROP_MODES, INTERPOLATIONS, ServedPreprocessing

NORMAL = {1: ((0.449,), (0.226,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def image(width: int, height: int, mode: str, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@settings(max_examples=300, deadline=None)
@given(
    given_size=st.tuples(st.integers(1, 61), st.integers(1, 61)),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(5, 24), st.integers(5, 24))
    | st.integers(5, 24).map(lambda side: (side, side)),
    interpolation=st.sampled_from(list(INTERPOLATIONS)),
    crop_pct=st.floats(0.5, 1.0),
    crop_mode=st.sampled_from(CROP_MODES),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1"]),
    seed=st.integers(0, 9),
)
def test_numpy_and_torch_give_the_same_pixels(
    given_size: tuple[int, int],
    channels: int,
    size: tuple[int, int],
    interpolation: str,
    crop_pct: float,
    crop_mode: str,
    mode: str,
    seed: int,
):
    if max(given_size) > 8 * min(given_size):  # torch, too, cannot resize to less than half a pixel
        given_size = (given_size[0], given_size[0])
    mean, std = NORMAL[channels]
    described = Preprocessing((channels, *size), interpolation, crop_pct, crop_mode, mean, std)
    picture = image(*given_size, mode, seed)
    mine = ServedPreprocessing.read(json.dumps(asdict(described)))(picture)
    expected = described.transform()(picture).numpy()
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "cubic"}, "resizes by 'cubic'"),
        ({"crop_mode": "corner"}, "crops by 'corner'"),
        ({"gamma": 2}, "cannot be read"),
    ],
)
def test_an_unknown_step_in_the_metadata_of_a_file_is_refused(
    change: dict[str, object], message: str
):
    described = Preprocessing((3, 8, 8), "bicubic", 1.0, "center", *NORMAL[3])
    with pytest.raises(BenchError, match=message):
        ServedPreprocessing.read(json.dumps(asdict(described) | change))
