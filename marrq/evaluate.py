"""Logits of a model in torch, over an image set. What they say about accuracy is computed in one place, runtime/accuracy.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from marrq.data import ImageSet
from marrq.preprocessing import Preprocessing

BATCH_SIZE = 16


@torch.no_grad()
def predict(
    module: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_done: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits float32 [images, classes] on the CPU; `batch_done` is called with the number of images of each batch."""
    module = module.to(device)
    logits = []
    for pixels, _ in images.batches(preprocessing, BATCH_SIZE):
        logits.append(module(pixels.to(device)).float().cpu())
        batch_done(len(pixels))
    return torch.cat(logits)
