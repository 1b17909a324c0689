"""The preprocessing of a model gives the pixels of the library that the model comes from, and what
an exported file says, done in numpy and Pillow, gives the same pixels."""

import itertools
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, list_pretrained
from transformers.models.auto import image_processing_auto as auto

from marrq.errors import MarrqError
from marrq.models.preprocessing import Preprocessing, from_image_processor
from marrq.models.processor_check import check_same_pixels
from marrq.models.resizing import CROP_MODES, PILLOW_MODES, TENSOR_MODES
from runtime.errors import BenchError
from runtime.preprocessing import ServedPreprocessing

NORMAL = {
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    4: ((0.4, 0.5, 0.6, 0.7), (0.2, 0.25, 0.3, 0.35)),
}
SIZES = ((61, 43), (24, 24), (33, 97), (11, 14))
"""Widths and heights: wide and odd, square, high, and smaller than the inputs."""


def image(width: int, height: int, mode: str, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def served(described: Preprocessing) -> ServedPreprocessing:
    return ServedPreprocessing.read(json.dumps(asdict(described)))


def terms() -> st.SearchStrategy[dict[str, Any]]:
    """Ways of resampling, each with a crop mode and a filter that it has."""

    def of(resampling: str) -> st.SearchStrategy[dict[str, Any]]:
        filters = PILLOW_MODES if resampling == "pillow" else tuple(TENSOR_MODES)
        return st.fixed_dictionaries(
            {
                "resampling": st.just(resampling),
                "crop_mode": st.sampled_from(CROP_MODES[resampling]),
                "interpolation": st.sampled_from(filters),
                "transparency": st.sampled_from(["drop", "white"]),
                "bgr": st.booleans(),
            }
        )

    return st.sampled_from(list(CROP_MODES)).flatmap(of)


@settings(max_examples=150, deadline=None)
@given(
    given_size=st.tuples(st.integers(1, 61), st.integers(1, 61)),
    channels=st.sampled_from([1, 3, 4]),
    size=st.tuples(st.integers(5, 24), st.integers(5, 24)),
    edge=st.integers(5, 40),
    square=st.booleans(),
    terms=terms(),
    mode=st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "1"]),
    seed=st.integers(0, 9),
)
def test_numpy_and_torch_give_the_same_pixels(
    given_size: tuple[int, int],
    channels: int,
    size: tuple[int, int],
    edge: int,
    square: bool,
    terms: dict[str, Any],
    mode: str,
    seed: int,
):
    if max(given_size) > 8 * min(given_size):  # torch, too, cannot resize to less than half a pixel
        given_size = (given_size[0], given_size[0])
    # torch's antialiased resize takes a column of pixels for one pixel (seen with 2.14.1: of a
    # [1, 1, 4, 1] tensor every row comes out as the first).
    if given_size[0] == 1:
        given_size = (1, 1)
    resized = (edge, edge) if square else (size[0] + 3, size[1] + 2)
    if terms["resampling"] != "pillow" and terms["crop_mode"] != "squash":
        resized = (edge, edge)
    if terms["crop_mode"] == "corner":
        size = (edge, edge)
    described = Preprocessing(
        (channels, *size),
        resized=resized,
        mean=NORMAL[channels][0],
        std=NORMAL[channels][1],
        **(terms | {"bgr": terms["bgr"] and channels > 1}),
    )
    described.check_names()
    # A model of four channels refuses images without a fourth.
    picture = image(*given_size, "RGBA" if channels == 4 else mode, seed)
    mine, expected = served(described)(picture), described.transform()(picture).numpy()
    assert mine.dtype == np.float32
    # Float sums are not in torch's order.
    atol = 2e-5 if terms["resampling"] == "float32-tensor" else 1e-6
    np.testing.assert_allclose(mine, expected, rtol=0, atol=atol)


def timm_configs(count: int) -> list[dict[str, Any]]:
    """The most different ways of preprocessing among timm's pretrained configs, made small."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in list_pretrained():
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        _, height, width = config["input_size"]
        kind = (config["crop_mode"], config["interpolation"], height == width, config["crop_pct"])
        small = (3, 2 * height // 19 + 1, 2 * width // 19 + 1)
        kinds.setdefault(kind, config | {"input_size": small})
    return [kinds[kind] for kind in sorted(kinds)][:count]


def test_every_kind_of_timm_config_gives_timms_own_pixels():
    configs = timm_configs(1000)
    assert len(configs) > 20
    assert {config["crop_mode"] for config in configs} == {"center", "squash", "border"}
    for config in configs:
        described = Preprocessing.from_timm(config)
        mine, theirs = described.transform(), create_transform(**config)
        for size in SIZES:
            picture = image(*size, "RGB")
            assert torch.equal(mine(picture), theirs(picture)), config


@pytest.mark.slow
def test_every_pretrained_config_of_timm_gives_timms_own_pixels():
    configs = {}
    for name in list_pretrained():
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        configs[repr(config)] = config
    for size, config in zip(itertools.cycle(SIZES), configs.values()):
        picture = image(*size, "RGB")
        mine = Preprocessing.from_timm(config).transform()(picture)
        assert torch.equal(mine, create_transform(**config)(picture)), config


@pytest.mark.slow
def test_every_image_processor_of_transformers_gives_its_own_pixels_or_is_refused_by_name():
    names = {
        backends.get("torchvision") or backends["pil"]
        for backends in auto.IMAGE_PROCESSOR_MAPPING_NAMES.values()
    }
    expressed, refused = set(), {}
    # It takes its settings from a checkpoint of timm.
    for name in sorted(names - {"TimmWrapperImageProcessor"}):
        processor = auto.get_image_processor_class_from_name(name)()
        try:
            check_same_pixels(processor, from_image_processor(processor.to_dict()))
            expressed.add(name)
        except MarrqError as error:
            refused[name] = str(error)
    assert all(name in sentence for name, sentence in refused.items())
    plain = {name for name, _ in PROCESSORS} - {"YolosImageProcessor", "DetrImageProcessor"}
    assert plain <= expressed


@pytest.mark.parametrize("channels", [1, 4])
def test_timm_models_of_other_channels_get_timms_own_pixels(channels: int):
    mean, std = NORMAL[channels]
    config = {
        "input_size": (channels, 24, 20), "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": "center", "mean": mean, "std": std,
    }  # fmt: skip
    described = Preprocessing.from_timm(config)
    for size in SIZES:
        picture = image(*size, {1: "L", 4: "RGBA"}[channels])
        assert torch.equal(described.transform()(picture), create_transform(**config)(picture))


def small(**size: int) -> dict[str, Any]:
    return {"size": size}


CROP = {"do_center_crop": True, "crop_size": {"height": 17, "width": 20}}
PROCESSORS = [
    ("ViTImageProcessor", small(height=24, width=31)),
    ("ViTImageProcessor", small(height=24, width=24) | {"resample": 0}),
    ("ViTImageProcessor", small(height=24, width=24) | {"resample": 1}),
    ("ViTImageProcessor", small(height=24, width=24) | {"do_normalize": False}),
    ("ViTImageProcessor", small(height=24, width=24) | {"do_rescale": False}),
    ("ViTImageProcessor", {"do_resize": False} | CROP),
    ("ViTImageProcessor", small(height=24, width=24) | {"do_convert_rgb": True}),
    (
        "ViTImageProcessor",
        small(height=24, width=24)
        | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ),
    ("DeiTImageProcessor", small(height=25, width=25) | CROP),
    ("BeitImageProcessor", small(height=25, width=25) | CROP | {"do_reduce_labels": True}),
    ("CLIPImageProcessor", small(shortest_edge=24) | CROP),
    ("CLIPImageProcessor", small(shortest_edge=15) | CROP),
    ("CLIPImageProcessor", small(height=25, width=32) | CROP),
    ("BitImageProcessor", small(shortest_edge=25) | CROP),
    ("SiglipImageProcessor", small(height=24, width=24)),
    ("ChameleonImageProcessor", small(shortest_edge=24) | CROP),
    ("ConvNextImageProcessor", small(shortest_edge=29) | {"crop_pct": 0.875}),
    ("ConvNextImageProcessor", small(shortest_edge=384)),
    ("LevitImageProcessor", small(shortest_edge=19) | CROP),
    ("LevitImageProcessor", small(height=19, width=23) | CROP),
    ("PoolFormerImageProcessor", small(shortest_edge=19) | CROP),
    ("PoolFormerImageProcessor", small(height=19, width=19) | CROP),
    ("PoolFormerImageProcessor", small(height=19, width=23) | CROP),
    ("MobileViTImageProcessor", small(shortest_edge=19) | CROP),
    ("MobileNetV2ImageProcessor", small(shortest_edge=19) | CROP),
    ("EfficientNetImageProcessor", small(height=24, width=24)),
    ("EfficientNetImageProcessor", small(height=24, width=24) | {"rescale_offset": True}),
    ("EfficientNetImageProcessor", small(height=24, width=24) | {"include_top": False}),
    ("DINOv3ViTImageProcessor", small(height=24, width=31)),
    ("DPTImageProcessor", small(height=24, width=24) | {"ensure_multiple_of": 7}),
    ("SegformerImageProcessor", small(height=24, width=24)),
    ("PvtImageProcessor", small(height=24, width=24)),
    ("YolosImageProcessor", small(height=24, width=24)),
    ("DetrImageProcessor", small(height=24, width=24)),
    ("SamImageProcessor", {**small(longest_edge=24), "pad_size": {"height": 24, "width": 24}}),
]


@pytest.mark.parametrize(("name", "changes"), PROCESSORS)
def test_an_image_processor_of_transformers_is_expressed_exactly(
    name: str, changes: dict[str, Any]
):
    processor = getattr(transformers, name)(**changes)
    described = from_image_processor(processor.to_dict())
    check_same_pixels(processor, described)
    again = Preprocessing.from_json(json.loads(json.dumps(asdict(described))))
    assert again == described
    again.check_names()
    modes = ["RGB", "RGBA", "P"] if processor.do_convert_rgb else ["RGB"]
    for size in SIZES:
        for mode in modes:
            picture = image(*size, mode)
            [theirs] = processor(images=picture, return_tensors="pt")["pixel_values"].numpy()
            # Without rescaling, the input is in 0 … 255 and float32 rounds to 255 times more.
            atol = 5e-6 if processor.do_rescale else 1e-4
            for mine in (described.transform()(picture).numpy(), served(described)(picture)):
                assert mine.shape == theirs.shape
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_transformers_models_of_other_channels_get_their_pixels(channels: int, mode: str):
    mean, std = NORMAL[channels]
    processor = transformers.ViTImageProcessor(
        size={"height": 24, "width": 20}, image_mean=list(mean), image_std=list(std)
    )
    described = from_image_processor(processor.to_dict(), channels)
    check_same_pixels(processor, described)
    picture = image(61, 43, mode)
    [theirs] = processor(images=picture, return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(served(described)(picture), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("VideoMAEImageProcessor", {}, "a video or several parts"),
        ("VivitImageProcessor", {}, "a video or several parts"),
        ("LlavaNextImageProcessor", {}, "a video or several parts"),
        ("Cohere2VisionImageProcessor", {}, "a video or several parts"),
        ("DetrImageProcessor", {}, r"different sizes \(size .*longest_edge"),
        ("YolosImageProcessor", {}, r"different sizes \(size .*longest_edge"),
        ("ViltImageProcessor", {}, r"different sizes \(size .*shortest_edge"),
        ("Siglip2ImageProcessor", {}, "different sizes .*patch_size"),
        ("Qwen2VLImageProcessor", {}, "different sizes .*longest_edge"),
        ("DPTImageProcessor", {"keep_aspect_ratio": True}, "different sizes .*keep_aspect_ratio"),
        ("CLIPImageProcessor", {"do_center_crop": False}, "different sizes"),
        ("ViTImageProcessor", {"do_resize": False}, "different sizes"),
        ("ViTImageProcessor", {"resample": 4}, "filter 4"),
        ("ImageGPTImageProcessor", {}, "do_color_quantize"),
        ("DonutImageProcessor", {}, "do_thumbnail"),
        ("PerceiverImageProcessor", {}, "does what its settings do not tell"),
        ("ViTImageProcessor", {"image_mean": [0.5, 0.5]}, "image_mean .* 2 numbers"),
        (
            "ConvNextImageProcessor",
            {"size": {"shortest_edge": 224}} | CROP,
            "crops twice",
        ),
        (
            "ViTImageProcessor",
            {"do_pad": True, "pad_size": {"height": 256, "width": 256}},
            "fills images",
        ),
    ],
)
def test_an_image_processor_that_cannot_be_expressed_is_refused_by_name(
    name: str, changes: dict[str, Any], reason: str
):
    processor = getattr(transformers, name)(**changes)
    with pytest.raises(MarrqError, match=reason) as refusal:
        check_same_pixels(processor, from_image_processor(processor.to_dict()))
    assert name in str(refusal.value)


def test_a_step_that_no_setting_tells_is_found_by_its_pixels():
    class Brighter(transformers.ViTImageProcessor):
        def rescale_and_normalize(self, images: Any, *arguments: Any) -> Any:
            return super().rescale_and_normalize(images, *arguments) + 0.02

    processor = Brighter(size={"height": 24, "width": 24})
    with pytest.raises(MarrqError, match="Brighter does what its settings do not tell"):
        check_same_pixels(processor, from_image_processor(processor.to_dict()))


def test_a_wrapper_of_timm_has_timms_terms():
    config = {"input_size": (3, 24, 24), "crop_pct": 0.9, "interpolation": "bilinear"}
    processor = transformers.TimmWrapperImageProcessor(config)
    described = from_image_processor(processor.to_dict())
    assert described.resampling == "pillow"
    check_same_pixels(processor, described)


DESCRIBED = Preprocessing((3, 8, 8), "bicubic", (9, 9), "center", *NORMAL[3])


def test_the_terms_of_earlier_artifacts_and_files_are_read():
    earlier = {
        "input_size": [3, 32, 24], "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    described = Preprocessing.from_json(earlier)
    assert described.resized == (35, 26)
    picture = image(61, 43, "RGB")
    expected = create_transform(**earlier)(picture)
    assert torch.equal(described.transform()(picture), expected)
    np.testing.assert_allclose(
        ServedPreprocessing.read(json.dumps(earlier))(picture), expected.numpy(), atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation 'cubic'"),
        ({"crop_mode": "corner of it"}, "crop_mode 'corner of it'"),
        ({"resampling": "by hand"}, "resampling 'by hand'"),
        ({"resampling": "uint8-tensor", "interpolation": "box"}, "interpolation 'box'"),
        ({"transparency": "black"}, "transparency 'black'"),
        ({"gamma": 2}, "cannot be read"),
        ({"crop_pct": 0}, "cannot be read"),
    ],
)
def test_an_unknown_step_in_the_metadata_of_a_file_is_refused(
    change: dict[str, object], message: str
):
    with pytest.raises(BenchError, match=message):
        ServedPreprocessing.read(json.dumps(asdict(DESCRIBED) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"interpolation": "cubic"},
        {"crop_mode": "corner"},
        {"resampling": "by hand"},
        {"resampling": "uint8-tensor", "interpolation": "box"},
        {"resampling": "uint8-tensor", "resized": (9, 8)},
        {"transparency": "black"},
        {"bgr": 1},
        {"bgr": True, "input_size": (1, 8, 8)},
    ],
)
def test_a_term_of_an_artifact_that_has_no_meaning_is_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"\w"):
        replace(DESCRIBED, **change).check_names()


def test_an_image_without_a_fourth_channel_is_refused_where_the_model_takes_one():
    described = Preprocessing((4, 8, 8), "bicubic", (8, 8), "center", *NORMAL[4])
    assert described.transform()(image(9, 9, "RGBA")).shape == (4, 8, 8)
    for transform, kind in ((described.transform(), MarrqError), (served(described), BenchError)):
        with pytest.raises(kind, match="takes 4 channels, and an image of mode RGB"):
            transform(image(9, 9, "RGB"))


def test_a_number_of_channels_that_no_image_has_is_refused_by_name():
    described = Preprocessing((6, 8, 8), "bicubic", (8, 8), "center", (0.5,) * 6, (0.5,) * 6)
    with pytest.raises(MarrqError, match="6 channels, and image files have 1, 3 or 4"):
        described.transform()
    with pytest.raises(BenchError, match="6 channels"):
        served(described)(image(9, 9, "RGB"))


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_pixels_of_more_than_eight_bits_are_refused_by_name(mode: str):
    picture = Image.new(mode, (9, 9))
    with pytest.raises(BenchError, match=f"mode {mode} has no 8-bit pixels"):
        served(DESCRIBED)(picture)
