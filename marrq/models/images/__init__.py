"""Images as people have them: find the files, read their pixels, know their classes.

`folders` needs no torch and `find_images` does, so a name is imported when it is first used
(PEP 562): the command line looks into a folder before it loads a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marrq.models.images.image_set import ImageSet, Pixels, find_images
    from marrq.models.images.pixels import read_image

__all__ = ["ImageSet", "Pixels", "find_images", "read_image"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'marrq.models.images' has no attribute {name!r}")
    home = "pixels" if name == "read_image" else "image_set"
    found: object = getattr(import_module(f"marrq.models.images.{home}"), name)
    return found
