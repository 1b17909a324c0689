"""Similarities between the embeddings of many images: cosines, a chunk of rows at a time.

All similarities of 50,000 images are 10 GB. So nobody holds them: who counts neighbours or ranks
reads them chunk by chunk, CHUNK numbers at a time, and keeps what was found of each image.

Where images are compared with the other images of the same set, an image is no neighbour of itself:
its own similarity is -∞.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Embeddings [images, channels], and similarities [queries, images].
Features = NDArray[np.float32]
Similarities = NDArray[np.float32]
# A number, or a yes or no, of each image.
Classes = NDArray[np.int64]

CHUNK = 2**22  # similarities; 16 MB in float32, and 32 MB for each float64 array made of them


def normalized(features: NDArray[np.floating]) -> Features:
    """Each row over its norm, so that products of rows are cosines. A row of zeros has no
    direction: it stays 0, and its cosine with every image is 0."""
    # In float64, because squares of large features overflow in float32.
    wide = features.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)  # [images, 1]
    return (wide / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def in_chunks(
    queries: Features, gallery: Features, among_themselves: bool
) -> Iterator[tuple[slice, Similarities]]:
    """Rows of the queries, and their similarities to all images of the gallery, [rows, images].

    queries, gallery: normalized. among_themselves: whether the gallery is the queries.
    """
    size = max(1, CHUNK // len(gallery))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        found = queries[rows] @ gallery.T  # [rows, images]
        if among_themselves:
            own = np.arange(rows.start, rows.stop)
            found[own - start, own] = -np.inf
        yield rows, found


def nearest(similarities: Similarities, count: int) -> NDArray[np.int64]:
    """The indices of the `count` most similar images of each row, in no order: [rows, count]."""
    # A selection and no sort: of thousands of images a few are wanted.
    chosen = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
    return chosen.astype(np.int64)
