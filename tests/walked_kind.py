"""A kind of model that tests/walk_families.py tries."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

CLASSES = 5


@dataclass
class Kind:
    """Models that compute the same if they are made small.

    name: an architecture of timm or a class of transformers; group: timm's module.
    size: side of the images in pixels, known once the model is built.
    same: names of the other architectures of the kind.
    """

    library: str
    name: str
    group: str = ""
    size: int = 0
    same: list[str] = field(default_factory=list)

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Noise, [count, 3, size, size]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.size, self.size, generator=generator)
