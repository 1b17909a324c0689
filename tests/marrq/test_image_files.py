"""A file is read for what it is: every mode of Pillow is given rightly, or refused by name.

The oracle is torchvision's own reader, `Image.open(file).convert("RGB")`; where that is wrong, the
numbers that were written.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms
from timm.data import ImageDataset
from torchvision.datasets.folder import pil_loader

from marrq.errors import MarrqError
from marrq.models.images import find_images, read_image
from marrq.models.images.notes import DEPTH, DROPPED, FRAMES, ON_WHITE, ORIENTATION, Notes
from marrq.models.images.pixels import is_transparent
from marrq.models.preprocessing import Preprocessing

RANDOM = np.random.default_rng(0)
PHOTO = Image.fromarray(RANDOM.integers(0, 256, (9, 12, 3), dtype=np.uint8))
GREY = PHOTO.convert("L")
ALPHA = Image.fromarray(RANDOM.integers(0, 256, (9, 12), dtype=np.uint8))
WITH_ALPHA = Image.merge("RGBA", (*PHOTO.split(), ALPHA))
PALETTE = PHOTO.quantize(16)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
DEEP = RANDOM.integers(0, 65536, (9, 12), dtype=np.uint16)
PREPROCESSING = Preprocessing((3, 8, 8), "bicubic", (8, 8), "center", (0.5,) * 3, (0.5,) * 3)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def animated(kind: str) -> bytes:
    return saved(PHOTO, kind, save_all=True, append_images=[Image.new("RGB", PHOTO.size)])


def png(depth: int, colour: int, rows: np.ndarray, *chunks: bytes) -> bytes:
    """A PNG with samples that Pillow does not write. rows: [height, …] of what is stored."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    width = rows.shape[1]
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    extra = b"".join(chunk(one[:4], one[4:]) for one in chunks)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def tiff(bits: int, data: bytes, photometric: int = 1, samples: int = 1) -> bytes:
    """A TIFF of 4 pixels in one row. photometric: 0 if white is 0. samples: 1 unsigned, 2 signed, 3
    floats."""
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: 1}
    tags |= {279: len(data), 339: samples}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + data


AS_TORCHVISION: dict[str, bytes] = {
    "PNG": saved(PHOTO, "PNG"),
    "JPEG": saved(PHOTO, "JPEG"),
    "JPEG, grey": saved(GREY, "JPEG"),
    "JPEG, a colour profile": saved(PHOTO, "JPEG", icc_profile=PROFILE),
    "JPEG, CMYK": saved(PHOTO.convert("CMYK"), "JPEG"),
    "WebP": saved(PHOTO, "WEBP"),
    "WebP, alpha": saved(WITH_ALPHA, "WEBP", lossless=True, exact=True),
    "GIF": saved(PALETTE, "GIF"),
    "GIF, transparent": saved(PALETTE, "GIF", transparency=3),
    "GIF, animated": animated("GIF"),
    "WebP, animated": animated("WEBP"),
    "APNG": animated("PNG"),
    "MPO": saved(PHOTO, "MPO", save_all=True, append_images=[GREY.convert("RGB")]),
    "BMP": saved(PHOTO, "BMP"),
    "BMP, palette": saved(PALETTE, "BMP"),
    "TIFF": saved(PHOTO, "TIFF"),
    "TIFF, pages": animated("TIFF"),
    "TIFF, alpha": saved(WITH_ALPHA, "TIFF"),
    "TIFF, CMYK": saved(PHOTO.convert("CMYK"), "TIFF"),
    "TIFF, YCbCr": saved(PHOTO.convert("YCbCr"), "TIFF"),
    "TIFF, palette with alpha": saved(PALETTE.convert("PA"), "TIFF"),
    "TIFF, padded": saved(PHOTO.convert("RGBX"), "TIFF"),
    "TIFF, white is 0": tiff(8, bytes([0, 9, 200, 255]), photometric=0),
    "PPM": saved(PHOTO, "PPM"),
    "PGM": saved(GREY, "PPM"),
    "PBM": saved(GREY.convert("1"), "PPM"),
    "PPM, 16 bits": b"P6 2 1 65535\n" + DEEP[0, :6].astype(">u2").tobytes(),
    "PGM, 4 bits": b"P5 4 1 15\n" + bytes([0, 1, 8, 15]),
    "JPEG 2000": saved(PHOTO, "JPEG2000"),
    "PNG, 1 bit": saved(GREY.convert("1"), "PNG"),
    "PNG, 1 bit, transparent": saved(GREY.convert("1"), "PNG", transparency=255),
    "PNG, 2 bits": png(2, 0, np.array([[0x1B]], np.uint8)),
    "PNG, grey": saved(GREY, "PNG"),
    "PNG, grey with alpha": saved(Image.merge("LA", (GREY, ALPHA)), "PNG"),
    "PNG, alpha": saved(WITH_ALPHA, "PNG"),
    "PNG, grey, a transparent value": saved(GREY, "PNG", transparency=GREY.getpixel((2, 3))),
    "PNG, a transparent colour": saved(PHOTO, "PNG", transparency=PHOTO.getpixel((2, 3))),
    "PNG, palette": saved(PALETTE, "PNG"),
    "PNG, palette, a transparent colour": saved(PALETTE, "PNG", transparency=3),
    "PNG, palette, alphas": saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "PNG, 16 bits": png(16, 2, DEEP[:, :12].astype(">u2").reshape(9, 4, 3)),
    "PNG, 16 bits with alpha": png(16, 6, DEEP.astype(">u2").reshape(9, 3, 4)),
    "PNG, grey, 16 bits with alpha": png(16, 4, DEEP.astype(">u2").reshape(9, 6, 2)),
}
"""Files that torchvision reads rightly."""


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x"])
@pytest.mark.parametrize("content", AS_TORCHVISION.values(), ids=AS_TORCHVISION)
def test_a_file_is_read_as_torchvision_and_timm_read_it_whatever_it_is_called(
    tmp_path: Path, content: bytes, name: str
):
    (tmp_path / name).write_bytes(content)
    rounded = 1 if content is AS_TORCHVISION["TIFF, YCbCr"] else 0
    image = read_image(tmp_path / name)
    assert image.mode in ("L", "LA", "RGB", "RGBA")
    assert not image.info.get("transparency")
    with warnings.catch_warnings():
        # Pillow warns of palettes with alphas when torchvision converts them.
        warnings.simplefilter("ignore")
        expected = np.asarray(pil_loader(tmp_path / name))
        grey = np.asarray(Image.open(tmp_path / name).convert("L"))
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
    # The grey of YCbCr is its Y; by way of RGB it is rounded once more.
    np.testing.assert_allclose(np.asarray(image.convert("L")).astype(int), grey, atol=rounded)
    if name == "x.jpg":
        (tmp_path / "a").mkdir()
        (tmp_path / name).rename(tmp_path / "a" / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            [(theirs, _)] = ImageDataset(str(tmp_path))
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(theirs))


ALPHAS: dict[str, tuple[bytes, Callable[[], np.ndarray]]] = {
    "alpha": (saved(WITH_ALPHA, "PNG"), lambda: np.asarray(ALPHA)),
    "grey": (saved(Image.merge("LA", (GREY, ALPHA)), "PNG"), lambda: np.asarray(ALPHA)),
    "a value": (
        saved(GREY, "PNG", transparency=GREY.getpixel((2, 3))),
        lambda: np.where(np.asarray(GREY) == GREY.getpixel((2, 3)), 0, 255),
    ),
    "a palette's colour": (
        saved(PALETTE, "PNG", transparency=3),
        lambda: np.where(np.asarray(PALETTE) == 3, 0, 255),
    ),
    "a palette's alphas": (
        saved(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
        lambda: np.asarray(PALETTE).astype(int) * 16,
    ),
    "a value of 16 bits": (
        png(16, 0, DEEP.astype(">u2"), b"tRNS" + DEEP[:1, 4].astype(">u2").tobytes()),
        lambda: 255 - 255 * np.isin(DEEP, DEEP[0, 4]).astype(int),
    ),
}


@pytest.mark.parametrize(("content", "expected"), ALPHAS.values(), ids=ALPHAS)
def test_transparency_is_kept_for_the_preprocessing_to_decide(
    tmp_path: Path, content: bytes, expected: Callable[[], np.ndarray]
):
    (tmp_path / "x.png").write_bytes(content)
    image = read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(image.getchannel("A")), expected())
    assert is_transparent(image)


def test_an_alpha_that_is_opaque_everywhere_is_no_transparency(tmp_path: Path):
    PHOTO.convert("RGBA").save(tmp_path / "x.png")
    assert not is_transparent(read_image(tmp_path / "x.png"))
    PHOTO.save(tmp_path / "x.png")
    assert not is_transparent(read_image(tmp_path / "x.png"))


ROW = np.array([0, 255, 32768, 65535], np.uint16)
DEEP_GREY = {
    "PNG": (png(16, 0, ROW[None].astype(">u2")), [0, 0, 128, 255]),
    "TIFF": (tiff(16, ROW.tobytes()), [0, 0, 128, 255]),
    "TIFF, big endian": (
        saved(Image.frombytes("I;16B", (4, 1), ROW.astype(">u2").tobytes()), "TIFF"),
        [0, 0, 128, 255],
    ),
    "TIFF, 12 bits": (tiff(12, bytes([0, 0x00, 0xFF, 0x80, 0x0F, 0xFF])), [0, 15, 128, 255]),
    "PGM": (b"P5 4 1 65535\n" + ROW.astype(">u2").tobytes(), [0, 0, 128, 255]),
    "PGM, 10 bits": (
        b"P5 4 1 1023\n" + np.array([0, 4, 512, 1023], ">u2").tobytes(),
        [0, 1, 128, 255],
    ),
}


@pytest.mark.parametrize(("content", "expected"), DEEP_GREY.values(), ids=DEEP_GREY)
def test_grey_in_more_than_8_bits_becomes_its_upper_8_bits(
    tmp_path: Path, content: bytes, expected: list[int]
):
    (tmp_path / "x.png").write_bytes(content)
    image = read_image(tmp_path / "x.png")
    assert image.mode == "L"
    assert np.asarray(image).ravel().tolist() == expected
    # torchvision clips: all above 255 is white.
    assert np.asarray(pil_loader(tmp_path / "x.png"))[0, 2].tolist() == [255, 255, 255]


def test_16_bits_of_grey_are_the_same_as_16_bits_of_colour(tmp_path: Path):
    (tmp_path / "grey.png").write_bytes(png(16, 0, DEEP.astype(">u2")))
    colour = np.stack([DEEP] * 3, -1).astype(">u2")
    (tmp_path / "colour.png").write_bytes(png(16, 2, colour))
    images = [read_image(tmp_path / name).convert("RGB") for name in ("grey.png", "colour.png")]
    np.testing.assert_array_equal(*map(np.asarray, images))


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="this Pillow may refuse to convert LAB"
)
def test_lab_is_converted_as_its_definition_says(tmp_path: Path):
    lab = np.array([[[100, 50, 200], [200, 0, 0], [128, 10, 246], [60, 200, 60]]], np.uint8)
    Image.fromarray(lab, "LAB").save(tmp_path / "x.tif")
    found = np.asarray(read_image(tmp_path / "x.tif")).astype(int)
    np.testing.assert_allclose(found[0], [lab_to_rgb(*pixel) for pixel in lab[0]], atol=1)


def lab_to_rgb(lightness: int, a: int, b: int) -> np.ndarray:
    """CIE L*a*b* under D50, as TIFF stores it, in sRGB."""
    y = (lightness / 255 * 100 + 16) / 116
    x, z = y + (a - 256 * (a > 127)) / 500, y - (b - 256 * (b > 127)) / 200
    linear = [t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in (x, y, z)]
    # From D50 to sRGB with Bradford's adaptation (B. Lindbloom's matrix).
    rows = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    rgb = np.clip(np.array(rows) @ (np.array(linear) * [0.9642, 1, 0.8249]), 0, 1)
    return 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


UNKNOWN_RANGE = {
    "floats": saved(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "TIFF"),
    "PFM": b"Pf\n2 1\n-1.0\n" + np.array([0.5, 2], "<f4").tobytes(),
    "32 bits": tiff(32, np.array([0, 1, 2**31, 2**32 - 1], np.uint32).tobytes()),
    "signed, 32 bits": tiff(32, np.arange(4, dtype=np.int32).tobytes(), samples=2),
    "signed, 16 bits": tiff(16, np.arange(4, dtype=np.int16).tobytes(), samples=2),
    "signed, 8 bits": tiff(8, np.array([0, 1, -1, 127], np.int8).tobytes(), samples=2),
    "white is 0, 16 bits": tiff(16, ROW.tobytes(), photometric=0),
    "JPEG 2000, 16 bits": saved(Image.fromarray(DEEP), "JPEG2000"),
}


@pytest.mark.parametrize("content", UNKNOWN_RANGE.values(), ids=UNKNOWN_RANGE)
def test_pixels_without_a_known_white_are_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(MarrqError, match=r"cannot read image .*x\.png': .*white.*; remove or"):
        read_image(tmp_path / "x.png")


WHOLE = saved(PHOTO.resize((64, 64)), "PNG")
BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
    "PNG, half": WHOLE[: len(WHOLE) // 2],
    "JPEG, half": saved(PHOTO.resize((64, 64)), "JPEG")[:900],
    "GIF, half": saved(PHOTO.resize((64, 64)), "GIF")[:1500],
    "no pixels": b"P5 0 4 255\n",
    "5 channels": tiff(8, bytes(20)).replace(
        struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 277, 3, 1, 5)
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_whole_image_is_named_in_one_sentence(tmp_path: Path, content: bytes):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(
        MarrqError, match=r"^cannot read image '.*bad\.jpg': [^\n]+; remove"
    ) as told:
        read_image(tmp_path / "bad.jpg")
    # Not the address of an object in memory.
    assert " at 0x" not in str(told.value)
    with pytest.raises(MarrqError, match=r"bad\.jpg"):
        find_images(str(tmp_path), "val").pixels(PREPROCESSING)[:]


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    for name in ("pipe.png", "link.png", "no.png"):
        with pytest.raises(MarrqError, match=f"{name}': there is no such file"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_exif_orientation_is_noted_and_left_as_torchvision_leaves_it(
    tmp_path: Path, kind: str, orientation: int
):
    exif = PHOTO.getexif()
    exif[274] = orientation
    PHOTO.save(tmp_path / "x.jpg", kind, exif=exif)
    notes = Notes()
    image = read_image(tmp_path / "x.jpg", notes)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(pil_loader(tmp_path / "x.jpg")))
    # Of a TIFF Pillow itself turns the image.
    turned = kind == "TIFF" and orientation == 6
    assert image.size == (PHOTO.size[::-1] if turned else PHOTO.size)
    assert set(notes.found) == ({ORIENTATION} if kind != "TIFF" and orientation != 1 else set())


def test_what_a_viewer_would_show_otherwise_is_noted_once_for_each_file(tmp_path: Path):
    contents = {
        "0.png": saved(PHOTO, "PNG"),
        "1.gif": animated("GIF"),
        "2.png": animated("PNG"),
        "3.png": png(16, 0, DEEP.astype(">u2")),
        "4.png": saved(WITH_ALPHA, "PNG"),
        "5.png": saved(PHOTO.convert("RGBA"), "PNG"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    images = find_images(str(tmp_path), "train")
    assert images.noted() == ()
    for _ in range(2):
        images.subset([0, 1, 2, 3, 4, 5]).pixels(PREPROCESSING)[:]
    assert images.noted() == (
        f"1 of the 6 images that were read {DEPTH}",
        f"1 of the 6 images that were read {DROPPED}",
        f"2 of the 6 images that were read {FRAMES}",
    )
    again = find_images(str(tmp_path), "train")
    again.pixels(Preprocessing(**{**vars(PREPROCESSING), "transparency": "white"}))[4:]
    assert again.noted() == (f"1 of the 2 images that were read {ON_WHITE}",)
