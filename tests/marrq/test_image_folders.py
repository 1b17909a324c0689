"""Every layout of images calibrates; where there are classes, each image has its target."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marrq.cli import main
from marrq.errors import MarrqError
from marrq.files import check_data_folder
from marrq.models.images import ImageSet, find_images
from marrq.models.images.folders import SYSTEM_NAMES, too_few
from marrq.quantized_model import CalibrationRecord
from marrq.workflows.judging import calibrated_on, flattered, flattered_by_record

LABELS = ("cat", "dog", "eel")


def put(root: Path, *paths: str) -> Path:
    """Images at these paths of a folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(path), 80, 9)).save(root / path, format="PNG")
    return root


def targets(images: ImageSet) -> dict[str, int]:
    return dict(zip(images.paths, images.targets, strict=True))


def test_train_and_val_are_told_apart_and_targets_follow_the_labels(image_folder: Path):
    labels = ("dog", "bee", "eel", "cat")
    images = find_images(str(image_folder), "val", labels)
    assert len(images) == 24
    assert all(
        labels[target] == file.parent.name
        for file, target in zip(images.files, images.targets, strict=True)
    )
    assert all("val" in file.parts for file in images.files if isinstance(file, Path))


@pytest.mark.parametrize("labels", [None, (), LABELS, ("0", "1", "2")])
def test_files_and_hash_of_class_folders_do_not_depend_on_who_reads_them(
    image_folder: Path, labels: tuple[str, ...] | None
):
    images = find_images(str(image_folder), "train", labels)
    names = [f"{name}/{number}.png" for name in LABELS for number in range(8)]
    assert images.paths == tuple(names)
    # Hashes in artifacts are made of these names.
    assert images.sha256 == hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert images.files == tuple(image_folder / "train" / name for name in names)
    assert images.targets == (() if not labels else tuple(np.repeat([0, 1, 2], 8)))


def test_the_draw_is_random_repeatable_and_hashed(image_folder: Path):
    images = find_images(str(image_folder), "train", LABELS)
    first, again, other = images.draw(10, seed=1), images.draw(10, seed=1), images.draw(10, seed=2)
    assert first.files == again.files
    assert first.sha256 == again.sha256
    assert len(set(first.files)) == 10
    assert first.sha256 != other.sha256
    assert [LABELS[target] for target in first.targets] == [
        file.parent.name for file in first.files
    ]


def test_the_hashes_of_the_demo_are_those_of_earlier_artifacts():
    images = find_images("demo", "train", tuple("0123456789"))
    assert images.sha256.startswith("6c6c44fefcc225c0")
    assert len(images) == 512


def test_1024_images_calibrate_or_all_if_there_are_fewer():
    few, many = (ImageSet("images", tuple(map(Path, "x" * n)), (), ()) for n in (300, 1500))
    assert [few.samples(None), many.samples(None)] == [300, 1024]
    assert not few.noted()
    fewer = ImageSet("images", (Path("x"),) * 255, (), ())
    assert fewer.samples(None) == 255
    assert fewer.noted() == (
        "'images' has 255 images to calibrate on, and fewer than 256 cost accuracy: give more",
    )
    assert [few.samples(16), many.samples(1500)] == [16, 1500]


def test_too_few_images_to_calibrate_at_all_ask_for_images_and_not_for_fewer_samples():
    told = str(too_few("one", 1, 2))
    assert told == "'one' has 1 of the 2 images that calibration needs at least: add images"


def test_more_samples_than_images_is_an_error(image_folder: Path):
    with pytest.raises(MarrqError, match="24 images for calibration, fewer than the 25 samples"):
        find_images(str(image_folder), "train", LABELS).draw(25, seed=0)


LAYOUTS = {
    "flat": ("0.png", "1.png", "2.png"),
    "one folder": ("images/0.png", "images/1.png", "images/2.png"),
    "nested": ("a/b/0.png", "a/b/c/1.png", "2.png"),
    "other classes": ("yak/0.png", "yak/1.png", "zebu/2.png"),
    "flat splits": ("train/0.png", "train/1.png", "train/2.png", "val/3.png"),
    "capitals": ("Train/a/0.PNG", "Train/1.JPG", "Train/2.jpeg", "Test/3.png"),
}


@pytest.mark.parametrize("labels", [None, (), LABELS, ("0", "1", "2", "3"), ("train", "dog")])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_images_for_calibration_need_no_classes(
    tmp_path: Path, layout: tuple[str, ...], labels: tuple[str, ...] | None
):
    images = find_images(str(put(tmp_path, *layout)), "train", labels)
    assert len(images) == len(images.draw(3, 0)) == 3
    assert images.targets == ()
    with pytest.raises(MarrqError, match=r"^accuracy cannot be measured: .+"):
        images.labelled()


@pytest.mark.parametrize(
    ("has_classes", "layout"),
    [
        (False, ("cat/0.png", "dog/1.png", "2.png")),
        (True, LAYOUTS["nested"]),
    ],
)
def test_quantize_takes_images_without_classes_for_every_model(
    tmp_path: Path, tiny: str, embedder: str, has_classes: bool, layout: tuple[str, ...]
):
    images = put(tmp_path / "images", *layout)
    options = ["--data", str(images), "--samples", "3", "--method", "rtn", "--scheme", "W8A16"]
    name = tiny if has_classes else embedder
    assert main(["quantize", name, *options, "-o", str(tmp_path / "artifact")]) == 0


def test_evaluate_says_in_one_sentence_why_it_cannot(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str]
):
    put(tmp_path, "0.png", "1.png")
    assert main(["evaluate", tiny, "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "accuracy cannot be measured: the images in" in said
    assert "one folder for each class" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "lost+found"])
@pytest.mark.parametrize("labels", [LABELS, ("0", "1", "2")], ids=["named", "numbered"])
@pytest.mark.parametrize("filled", [True, False])
def test_hidden_and_system_folders_are_passed_over_at_every_level(
    tmp_path: Path, name: str, labels: tuple[str, ...], filled: bool
):
    root = put(tmp_path, "val/cat/0.png", "val/dog/x/0.png", "val/eel/0.png", "val/eel/._0.png")
    for place in ("", "val/", "val/cat/", "val/dog/x/"):
        (root / place / name).mkdir()
        if filled:
            put(root, f"{place}{name}/0.png")
    expected = {"cat/0.png": 0, "dog/x/0.png": 1, "eel/0.png": 2}
    assert targets(find_images(str(root), "val", labels)) == expected
    assert find_images(str(root), "val").paths == tuple(expected)


def test_names_of_systems_are_known_in_upper_and_lower_case(tmp_path: Path):
    put(tmp_path, *(f"{name.upper()}/0.png" for name in SYSTEM_NAMES))
    with pytest.raises(MarrqError, match="no images in"):
        find_images(str(tmp_path), "val", LABELS)


def test_a_hidden_folder_that_the_user_names_is_read(tmp_path: Path):
    root = put(tmp_path / ".cache" / "__MACOSX", "cat/0.png")
    assert targets(find_images(str(root), "val", LABELS)) == {"cat/0.png": 0}


def test_a_hidden_folder_does_not_make_up_for_a_class_that_is_missing(tmp_path: Path):
    root = put(tmp_path, "cat/0.png", "dog/0.png", ".ipynb_checkpoints/0.png")
    assert find_images(str(root), "val", ("0", "1", "2")).targets == ()


def test_images_of_a_class_may_lie_deeper_as_in_tiny_imagenet(tmp_path: Path):
    root = put(tmp_path, "cat/images/1.png", "cat/0.png", "eel/images/1.png")
    images = find_images(str(root), "val", LABELS)
    assert targets(images) == {"cat/0.png": 0, "cat/images/1.png": 0, "eel/images/1.png": 2}


def test_images_beside_class_folders_are_of_no_class(tmp_path: Path):
    root = put(tmp_path, "cat/0.png", "montage.png")
    assert targets(find_images(str(root), "val", LABELS)) == {"cat/0.png": 0}
    # Without classes nothing is beside anything.
    assert find_images(str(root), "val").paths == ("cat/0.png", "montage.png")


def test_links_are_followed_and_circles_are_not(tmp_path: Path):
    root = put(tmp_path / "root", "cat/0.png")
    put(tmp_path / "elsewhere", "1.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "up").symlink_to(root)
    images = find_images(str(root), "val", LABELS)
    assert targets(images) == {"cat/0.png": 0, "dog/1.png": 1}


def test_a_name_of_no_valid_unicode_is_hashed(tmp_path: Path):
    put(tmp_path, "0.png")
    (tmp_path / "0.png").rename(tmp_path / "\udcff.png")
    images = find_images(str(tmp_path), "train")
    assert images.sha256 == hashlib.sha256(b"\xff.png").hexdigest()


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test", "Val", "TEST"])
def test_measurement_takes_the_subfolder_for_it(tmp_path: Path, name: str):
    root = put(tmp_path, "train/cat/0.png", f"{name}/cat/1.png", f"{name}/dog/2.png")
    assert targets(find_images(str(root), "val", LABELS)) == {"cat/1.png": 0, "dog/2.png": 1}
    assert targets(find_images(str(root), "train", LABELS)) == {"cat/0.png": 0}


def test_test_is_measured_on_only_if_there_is_nothing_else(tmp_path: Path):
    root = put(tmp_path, "train/cat/0.png", "test/cat/1.png", "valid/cat/2.png")
    assert find_images(str(root), "val", LABELS).paths == ("cat/2.png",)


@pytest.mark.parametrize("split", ["train", "val"])
def test_two_subfolders_for_one_purpose_are_refused(tmp_path: Path, split):
    other = {"train": "Train", "val": "validation"}[split]
    root = put(tmp_path, f"{split}/cat/0.png", f"{other}/cat/0.png")
    with pytest.raises(MarrqError, match="either may be meant"):
        find_images(str(root), split, LABELS)


def test_images_to_measure_on_are_not_taken_for_calibration_without_a_word(tmp_path: Path):
    put(tmp_path / "a", "val/cat/0.png")
    with pytest.raises(MarrqError, match=r"has val/, and no train/ to calibrate on: give .*a/val'"):
        find_images(str(tmp_path / "a"), "train", LABELS)
    put(tmp_path / "b", "train/cat/0.png")
    with pytest.raises(MarrqError, match="no val/ or validation/ or valid/ or test/ to measure on"):
        find_images(str(tmp_path / "b"), "val", LABELS)


def test_train_may_be_a_class_as_in_cifar_100(tmp_path: Path):
    labels = ("bus", "train", "tractor")
    root = put(tmp_path / "a", "bus/0.png", "train/0.png", "tractor/0.png")
    expected = {"bus/0.png": 0, "tractor/0.png": 2, "train/0.png": 1}
    for split in ("train", "val"):
        assert targets(find_images(str(root), split, labels)) == expected
    # A model without names knows the place of each folder.
    assert find_images(str(root), "val", ("0", "1", "2")).targets == (0, 1, 2)
    # A model without classes cannot tell.
    with pytest.raises(MarrqError, match="may be for 'train' alone, or a class beside 'bus'"):
        find_images(str(root), "train")
    nested = put(tmp_path / "b", "train/train/0.png", "train/bus/0.png", "val/train/1.png")
    assert targets(find_images(str(nested), "train", labels)) == {"bus/0.png": 0, "train/0.png": 1}
    assert targets(find_images(str(nested), "val", labels)) == {"train/1.png": 1}


def test_a_split_beside_other_folders_is_a_split(tmp_path: Path):
    root = put(tmp_path, "train/cat/0.png", "val/cat/1.png", "masks/cat/2.png", "overview.png")
    assert find_images(str(root), "train", LABELS).paths == ("cat/0.png",)


def test_a_folder_that_is_no_class_is_no_obstacle_to_calibration(tmp_path: Path):
    root = put(tmp_path, "cat/0.png", "yak/0.png")
    images = find_images(str(root), "train", LABELS)
    assert images.paths == ("cat/0.png", "yak/0.png")
    with pytest.raises(MarrqError, match="yak' is not among the model's 3 classes"):
        images.labelled()


def test_a_folder_without_images_of_a_class_or_of_none_is_passed_over(tmp_path: Path):
    root = put(tmp_path, "cat/0.png", "eel/0.png")
    (root / "dog").mkdir()
    (root / "annotations").mkdir()
    (root / "annotations" / "0.xml").touch()
    assert find_images(str(root), "val", LABELS).targets == (0, 2)


def test_a_folder_without_images_is_named_with_what_it_has(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(MarrqError, match=f"no images in '{tmp_path}'"):
        find_images(str(tmp_path), "val", LABELS)
    (tmp_path / "cat" / "0.HEIC").touch()
    with pytest.raises(MarrqError, match=r"must hold files of PNG, JPEG.*it has 1 \.heic files"):
        find_images(str(tmp_path), "val", LABELS)


def test_a_data_folder_that_is_a_file_or_nothing_is_refused(tmp_path: Path):
    zipfile.ZipFile(tmp_path / "images.zip", "w").close()
    with pytest.raises(MarrqError, match=r"images\.zip' is a file: give a folder of images"):
        check_data_folder(str(tmp_path / "images.zip"))
    with pytest.raises(MarrqError, match="does not exist"):
        check_data_folder(str(tmp_path / "no"))


def test_images_that_calibrate_and_judge_are_counted_by_whatever_name_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = [f"{number}.png" for number in range(6)]
    put(tmp_path / "one", *names)
    put(tmp_path / "apart", *(f"{split}/{name}" for split in ("train", "val") for name in names))
    monkeypatch.chdir(tmp_path)
    one = find_images("one", "train")
    record = CalibrationRecord("one", 4, 0, one.draw(4, 0).sha256)
    calibrating, judging = calibrated_on(record, ()), find_images(str(tmp_path / "one"), "val")
    assert calibrating is not None
    [sentence] = flattered([calibrating], judging)
    assert sentence.startswith("4 of the 6 images that judge have calibrated too, so the figures")
    train, val = (find_images("apart", split) for split in ("train", "val"))
    assert flattered([train], val) == []
    # Images that are gone, or others by now, cannot be told.
    for changed in (replace(record, data="gone"), replace(record, files_sha256="")):
        assert flattered_by_record(changed, (), judging) == []
