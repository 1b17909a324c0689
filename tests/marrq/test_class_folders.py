"""Names of folders and classes of a model meet as people name them, or are refused with both
readings."""

import random
import unicodedata

import pytest
from timm.data.imagenet_info import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets.folder import find_classes

from marrq.errors import MarrqError
from marrq.models.images.classes import Folders, classes_of
from marrq.models.images.imagenet import is_imagenet

ANIMALS = ("cat", "dog", "sea lion")
INFO = ImageNetInfo()
SYNSETS = tuple(INFO.label_names())
WORDS = tuple(INFO.label_descriptions())
# As many checkpoints of transformers have them.
FIRST_WORDS = tuple(label.split(",")[0] for label in WORDS)
# As timm's own wrapper writes them.
DETAILED = tuple(INFO.label_descriptions(detailed=True))
LABELS = {"synsets": SYNSETS, "words": WORDS, "first words": FIRST_WORDS, "detailed": DETAILED}


def read(folders: list[str], labels: tuple[str, ...], empty: tuple[str, ...] = ()) -> list[int]:
    found = classes_of(Folders("images", tuple(sorted(folders)), empty), labels)
    return [found[folder] for folder in folders]


def numbered(count: int) -> tuple[str, ...]:
    return tuple(str(place) for place in range(count))


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize(
    "name",
    [
        lambda place: SYNSETS[place],
        lambda place: str(place),
        lambda place: f"{place:04}",
        lambda place: WORDS[place].split(",")[0],
        lambda place: WORDS[place].split(",")[-1].strip(),
        lambda place: WORDS[place].split(",")[0].replace(" ", "_").lower(),
        lambda place: WORDS[place],
    ],
    ids=["synset", "number", "four digits", "first word", "last word", "snake case", "all words"],
)
def test_the_folders_of_imagenet_have_the_names_of_any_list(name, labels: tuple[str, ...]):
    # None of these shares a name with another class.
    places = [0, 1, 2, 9, 207, 404, 999]
    assert read([name(place) for place in places], labels) == places


def test_imagenet_is_known_by_its_labels_in_their_order():
    assert all(is_imagenet(labels) for labels in LABELS.values())
    # Some checkpoints correct the second "crane" and "maillot".
    corrected = [*FIRST_WORDS]
    corrected[517], corrected[639] = "crane bird", "tank suit"
    assert is_imagenet(tuple(corrected))
    shuffled = random.Random(0).sample(FIRST_WORDS, 1000)
    assert not is_imagenet(tuple(shuffled))
    assert not is_imagenet(FIRST_WORDS[:999])


def test_a_name_that_two_classes_have_is_refused_with_both_and_another_name_is_given():
    for labels in (FIRST_WORDS, WORDS):
        with pytest.raises(
            MarrqError,
            match=r"'crane' .* may be class 134, 'crane', or class 517, .* number, 0 … 999, or by "
            "WordNet synset",
        ):
            read(["crane", "goldfish"], labels)
    assert read([SYNSETS[134], SYNSETS[517]], FIRST_WORDS) == [134, 517]
    assert read(["134", "517"], FIRST_WORDS) == [134, 517]
    with pytest.raises(MarrqError, match=r"class 0, 'bank', or class 2, 'bank': .* 0 … 2$"):
        read(["bank", "river"], ("bank", "river", "bank"))


def test_a_label_comes_before_a_name_in_another_label():
    assert read(["missile", "maillot"], WORDS) == [657, 638]
    assert read(["missile"], SYNSETS) == [657]
    # Only the second of several names, of two classes.
    with pytest.raises(MarrqError, match=r"'panther' .* may be class 286, .*, or class 290"):
        read(["panther"], WORDS)


@pytest.mark.parametrize(
    ("folder", "label"),
    [
        ("Cat", "cat"),
        ("sea_lion", "sea lion"),
        ("sea-lion", "Sea Lion"),
        ("Sea  Lion", "sea_lion"),
        (unicodedata.normalize("NFD", "Zürich"), unicodedata.normalize("NFC", "Zürich")),
        (unicodedata.normalize("NFC", "がん"), unicodedata.normalize("NFD", "がん")),
        ("ｃａｔ", "cat"),
        ("ﬁsh", "fish"),
        ("STRASSE", "straße"),
        ("AC_DC", "AC/DC"),
        ("n\u00a0b", "n b"),
    ],
)
def test_names_that_look_alike_are_alike(folder: str, label: str):
    assert read([folder], ("other", label)) == [1]


def test_the_closest_name_counts_and_none_is_guessed():
    assert read(["Cat", "cat"], ("cat", "Cat")) == [1, 0]
    with pytest.raises(MarrqError, match=r"'CAT' .* may be class 0, 'cat', or class 1, 'Cat'"):
        read(["CAT"], ("cat", "Cat"))
    with pytest.raises(MarrqError, match=r"'sea-lion' and 'sea_lion' .* are both class 2"):
        read(["sea_lion", "sea-lion"], ANIMALS)
    with pytest.raises(MarrqError, match=r"'01' and '1' .* are both class 1"):
        read(["1", "01"], numbered(3))


@pytest.mark.parametrize(
    "missing", [(), (5,), (0,), (10,), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)], ids=str
)
@pytest.mark.parametrize("form", ["{}", "{:02}", "LABEL_{}", "label_{}", "LABEL_\uff10{}"])
def test_a_number_is_the_class_of_this_number_whatever_is_missing(form: str, missing):
    places = [place for place in range(11) if place not in missing]
    for labels in (numbered(11), tuple(f"animal {letter}" for letter in "abcdefghijk")):
        assert read([form.format(place) for place in places], labels) == places


def test_numbers_that_start_at_1_are_refused_with_both_readings():
    with pytest.raises(
        MarrqError, match=r"'1' .* may be number 1 or 0 of the model's classes 0 … 2, by its name"
    ):
        read(["1", "2", "3"], numbered(3))
    # Labels that are numbers themselves are names, and the places are no second reading of them.
    assert read(["1", "2", "3"], ("1", "2", "3")) == [0, 1, 2]
    with pytest.raises(MarrqError, match="'images/0' is not among"):
        read(["0", "1"], ("1", "2", "3"))


def test_sorted_folders_are_classes_only_if_their_order_is_sure(tmp_path):
    assert read(["eel", "cat", "dog"], numbered(3)) == [2, 0, 1]
    for names in (["class2", "class10"], ["Zebra", "ant"]):
        with pytest.raises(MarrqError, match="as torchvision or timm sorts them"):
            read(names, numbered(2))
        # And they do sort them in two ways.
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "0.png").touch()
        root = tmp_path
        assert find_classes(root)[1] != find_images_and_targets(str(root))[1]
    with pytest.raises(MarrqError, match="only numbers its 3 classes, and 'images' has 2 class"):
        read(["cat", "dog"], numbered(3))
    with pytest.raises(MarrqError, match="has 3 class folders, 1 of them empty"):
        read(["cat", "dog"], numbered(3), empty=("annotations",))
    with pytest.raises(MarrqError, match=r"'1' .* may be number 1 or 0"):
        read(["1", "cat"], numbered(2))
    assert read(["m²", "²", "a1²"], numbered(3)) == [1, 2, 0]
    # Numbers that no class has are names.
    assert read(["1002", "1001", "1003"], numbered(3)) == [1, 0, 2]


def test_a_folder_that_is_no_class_is_named_with_an_example_of_a_class():
    with pytest.raises(
        MarrqError,
        match="'images/yak' is not among the model's 3 classes, such as 'cat'",
    ):
        read(["cat", "yak"], ANIMALS)
    # Of the reading that reads the most.
    with pytest.raises(MarrqError, match="'images/n9' is not among"):
        read([SYNSETS[0], SYNSETS[5], "n9"], WORDS)
    with pytest.raises(MarrqError, match=r"\(and 1 more\)"):
        read(["cat", "yak", "zebu"], ANIMALS)
