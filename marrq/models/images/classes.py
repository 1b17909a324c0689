"""Which class of a model a class folder holds.

The model's labels, such as "tench, Tinca tinca" or "LABEL_7", and the names that people give to
folders, such as n01440764, Tench or 0, meet in one of these readings; the first that reads every
folder is taken:

    the model names its classes           the model numbers its classes, "0", "1", …
    -----------------------------------   ------------------------------------------
    1. the label; one of the names that   1. the number: folder 10 is class 10
       it lists between commas            2. the place among the folders, if there are as many
    2. for ImageNet-1k the WordNet           folders as classes, none of them is empty, and
       synset                                torchvision (by text) and timm (by numbers in the
    3. for ImageNet-1k the English words     text) sort them alike
    4. the number: folder 10 is class 10

Names that look alike are alike, if no other class is more alike: Unicode forms (NFC, NFKC), spaces,
underscores and hyphens, upper and lower case. A label comes before the names in a label: "missile"
is the class "missile", not "projectile, missile".

If a folder may be two classes, or two folders are one class, that is an error that names both. A
number counts by itself, whatever folders are missing, and leading zeros do not matter.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from marrq.errors import MarrqError
from marrq.models.images.imagenet import imagenet, is_imagenet, words_of

NUMBER = re.compile(r"(?:label_)?0*([0-9]{1,9})", re.IGNORECASE | re.ASCII)
"""A class by its number, or by transformers' placeholder for a name."""

SEPARATORS = re.compile(r"[\s_/\\:-]+")
"""What stands between words; a folder's name cannot have a slash."""


def _exact(text: str) -> str:
    # "Cat" and "cat" may be two classes, so nothing is changed at first.
    return text


def _composed(text: str) -> str:
    # macOS takes an accent and its letter apart.
    return unicodedata.normalize("NFC", text)


def _spaced(text: str) -> str:
    # NFKC makes one letter of forms that differ in width or as ligatures.
    return SEPARATORS.sub(" ", unicodedata.normalize("NFKC", text)).strip()


def _folded(text: str) -> str:
    # Folding may give a form that is not composed.
    return unicodedata.normalize("NFKC", _spaced(text).casefold())


LIKENESS: tuple[Callable[[str], str], ...] = (_exact, _composed, _spaced, _folded)
"""What makes two names alike, the closest first."""


@dataclass(frozen=True)
class Folders:
    """The class folders of a folder, sorted by name.

    root: the folder. filled: names of those with images. empty: names of those without.
    """

    root: str
    filled: tuple[str, ...]
    empty: tuple[str, ...] = ()


Reads = Callable[[str], set[int]]
"""A reading: the classes that a folder of this name may be; empty if it is none."""


def _by_names(*tiers: Sequence[Sequence[str]]) -> Reads:
    """A reading by names.

    tiers: for each class its names, in the order of the classes. A name in an earlier tier counts
    more, and within a tier the name that is more alike.
    """
    # Every likeness of a label comes before the names inside a label.
    keys = [(tier, alike) for tier in tiers for alike in LIKENESS]

    # Made when a folder gets so far: most folders have a label's name as it is.
    @cache
    def index(number: int) -> Mapping[str, set[int]]:
        tier, alike = keys[number]
        places: dict[str, set[int]] = defaultdict(set)
        for place, names in enumerate(tier):
            for name in names:
                # Several classes may have one name; then the folder is refused.
                places[alike(name)].add(place)
        return places

    def reads(folder: str) -> set[int]:
        # The closest names alone: "Cat" is the class "Cat" even if there is a class "cat".
        found = (index(number).get(alike(folder)) for number, (_, alike) in enumerate(keys))
        return next((places for places in found if places), set())

    return reads


def classes_of(folders: Folders, labels: tuple[str, ...]) -> dict[str, int]:
    """The class of each folder with images: an index of the model's logits.

    labels: in the order of the logits; "0", "1", … for a model that only numbers its classes.

    Raises MarrqError if a folder is no class, may be two classes, or is the same class as another.
    """
    numbered = labels == tuple(str(place) for place in range(len(labels)))
    unread: list[list[str]] = []
    # A reading is made when the one before has failed.
    for reads in [_by_number(labels)] if numbered else _readings(labels):
        found = {folder: reads(folder) for folder in folders.filled}
        # Folders of one data set are named in one way: a reading reads all of them or none.
        if all(found.values()):
            return _one_each(folders, found, labels)
        unread.append([folder for folder, places in found.items() if not places])
    if numbered:
        return _by_place(folders, len(labels))
    # The reading that reads the most tells which folders are none.
    raise _unknown(folders, min(unread, key=len), labels)


def _readings(labels: tuple[str, ...]) -> Iterator[Reads]:
    """The readings for a model that names its classes, in their order."""
    yield _by_names([[label] for label in labels], [words_of(label) for label in labels])
    if is_imagenet(labels):
        known = imagenet()
        # Synsets are unique, and most data sets of ImageNet have them as folders.
        yield _by_names([[synset] for synset in known.synsets])
        words = [words_of(label) for label in known.words]
        # The first word of a class is its usual name: a "missile" is not a "projectile, missile".
        yield _by_names([[label] for label in known.words], [part[:1] for part in words], words)
    yield _by_number(labels)


def _by_number(labels: tuple[str, ...]) -> Reads:
    """Folder 10 is class 10, unless labels are numbers of their own."""
    numbers = [_number(label) for label in labels]
    # Labels "1", "2", "3" have the numbers 0, 1, 2: whose number a folder has cannot be told.
    own = any(number not in (None, place) for place, number in enumerate(numbers))

    def reads(folder: str) -> set[int]:
        number = _number(folder)
        return set() if own or number is None or number >= len(labels) else {number}

    return reads


def _number(name: str) -> int | None:
    match = NUMBER.fullmatch(unicodedata.normalize("NFKC", name))
    return int(match[1]) if match else None


def _one_each(
    folders: Folders, found: Mapping[str, set[int]], labels: tuple[str, ...]
) -> dict[str, int]:
    """The reading, if it is the only one. Raises MarrqError if a folder may be two classes, or two
    folders are one."""
    # Two classes for a folder: half of its images would get a wrong target.
    for folder, places in found.items():
        if len(places) > 1:
            first, second = sorted(places)[:2]
            raise MarrqError(
                f"class folder {folder!r} in {folders.root!r} may be class {first}, "
                f"{labels[first]!r}, or class {second}, {labels[second]!r}: {_other_names(labels)}"
            )
    # Two folders for a class: one of the two may be meant for something else.
    classes = {folder: next(iter(places)) for folder, places in found.items()}
    [(place, count)] = Counter(classes.values()).most_common(1)
    if count > 1:
        one, other = [folder for folder in classes if classes[folder] == place][:2]
        raise MarrqError(
            f"class folders {one!r} and {other!r} in {folders.root!r} are both class {place}, "
            f"{labels[place]!r}: put them together, or rename one"
        )
    return classes


def _other_names(labels: tuple[str, ...]) -> str:
    """The readings in which every class has a name of its own."""
    numbers = f"name all folders by number, 0 … {len(labels) - 1}"
    return f"{numbers}, or by WordNet synset" if is_imagenet(labels) else numbers


def _natural_key(name: str) -> list[str | int]:
    """The key of timm's reader: numbers in a name count as numbers, capitals as small letters."""
    parts: list[str | int] = [*re.split(r"(\d+)", name.lower())]
    # A split by a group gives text and matches in turn.
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts


def _by_place(folders: Folders, count: int) -> dict[str, int]:
    """The sorted folders as the classes of a model that only numbers its classes.

    Raises MarrqError if the order cannot be told.
    """
    names = [*folders.filled, *folders.empty]
    # torchvision's ImageFolder sorts by text, timm's reader by the numbers in it.
    by_text, by_number = sorted(names), sorted(names, key=_natural_key)
    way_out = (
        f"name the folders 0 … {count - 1}, or write the names of the classes into the model's "
        "config.json"
    )
    places = {name: place for place, name in enumerate(by_text)}
    # A number that a class has says which class it is; its place must not say otherwise.
    numbers = {name: number for name in names if (number := _number(name)) is not None}
    moved = next((name for name, n in numbers.items() if n < count and n != places[name]), None)
    if moved is not None:
        raise MarrqError(
            f"class folder {moved!r} in {folders.root!r} may be number {numbers[moved]} or "
            f"{places[moved]} of the model's classes 0 … {count - 1}, by its name or by its place: "
            f"{way_out}"
        )
    # A folder too few or too many moves all behind it; an empty one may be no class at all.
    if len(names) != count or folders.empty:
        empty = f", {len(folders.empty)} of them empty" if folders.empty else ""
        raise MarrqError(
            f"the model only numbers its {count} classes, and {folders.root!r} has {len(names)} "
            f"class folders{empty}, so their order does not tell the classes: {way_out}"
        )
    if by_text != by_number:
        differing = next(
            (one, other) for one, other in zip(by_text, by_number, strict=True) if one != other
        )
        raise MarrqError(
            f"the model only numbers its classes, and class {by_text.index(differing[0])} may be "
            f"folder {differing[0]!r} or {differing[1]!r} in {folders.root!r}, as torchvision or "
            f"timm sorts them: {way_out}"
        )
    return places


def _unknown(folders: Folders, missing: list[str], labels: tuple[str, ...]) -> MarrqError:
    """The error for folders that no reading reads."""
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return MarrqError(
        f"class folder '{folders.root}/{missing[0]}'{more} is not among the model's {len(labels)} "
        f"classes, such as {labels[0]!r}: rename or remove it"
    )
