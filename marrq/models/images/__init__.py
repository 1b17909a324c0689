"""Images as people have them: find the files, read their pixels, know their classes."""

from marrq.models.images.image_set import ImageSet, Pixels, find_images
from marrq.models.images.pixels import read_image

__all__ = ["ImageSet", "Pixels", "find_images", "read_image"]
