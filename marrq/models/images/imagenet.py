"""The classes of ImageNet-1k by all their names: WordNet synsets and English words."""

from dataclasses import dataclass
from functools import cache

from timm.data.imagenet_info import ImageNetInfo

CLASSES = 1000

ENOUGH = 900
"""Number of labels that must name the class of ImageNet-1k in their place. Checkpoints correct a
few names, such as that of the second "crane"; no other list of 1,000 names comes near."""


@dataclass(frozen=True)
class ImageNet:
    """Names in the order of the classes.

    synsets: such as n01440764. words: such as "tench, Tinca tinca".
    """

    synsets: tuple[str, ...]
    words: tuple[str, ...]


def words_of(label: str) -> list[str]:
    """The names that a label lists: "tench, Tinca tinca" has two."""
    return [word.strip() for word in label.split(",") if word.strip()]


@cache
def imagenet() -> ImageNet:
    """ImageNet-1k as timm has it."""
    # Reading the lists takes a tenth of a second, and only models of 1,000 classes need them.
    info = ImageNetInfo()
    return ImageNet(tuple(info.label_names()), tuple(info.label_descriptions()))


def is_imagenet(labels: tuple[str, ...]) -> bool:
    """Whether a model's classes are those of ImageNet-1k in their order: at least ENOUGH labels
    have the synset of their class, or one of its words."""
    if len(labels) != CLASSES:
        return False
    # Place by place: the same names in another order are another list of classes.
    known = imagenet()
    alike = [
        # timm's long labels have a definition behind the words.
        synset in label or label.startswith(words) or not _folded(label).isdisjoint(_folded(words))
        for label, synset, words in zip(labels, known.synsets, known.words, strict=True)
    ]
    return sum(alike) >= ENOUGH


def _folded(label: str) -> set[str]:
    return {word.casefold().replace("_", " ") for word in words_of(label)}
