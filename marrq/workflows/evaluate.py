"""Logits of a model in torch over an image set, and what its quantized linears take and give. What
that says about accuracy is computed in one place, runtime/measure/accuracy.py, and what it says
about an export in another, runtime/measure/parity.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.models.blocks import hooked
from marrq.models.images import ImageSet
from marrq.models.preprocessing import Preprocessing
from marrq.quantizers.linear import quantized_linears

BATCH_SIZE = 16


@torch.no_grad()
def predict(
    module: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_done: Callable[[int], None] = lambda count: None,
    processes: Processes = ONE_PROCESS,
) -> Tensor:
    """Logits float32 [images, classes] on the CPU; `batch_done` is called with the number of images
    of each batch. Each process of the processes computes some of the batches, and has all logits in
    the end. Raises MarrqError where a process would have none."""
    module = module.to(device)
    starts = range(0, len(images), BATCH_SIZE)
    if processes.size > len(starts):
        raise MarrqError(
            f"{processes.size} processes for {len(starts)} batches of images: start fewer"
        )
    mine = processes.share(starts)
    rows, logits = slice(mine[0], mine[-1] + BATCH_SIZE), []
    for pixels, _ in ImageSet(images.name, images.files[rows], images.targets[rows]).batches(
        preprocessing, BATCH_SIZE
    ):
        logits.append(module(pixels.to(device)).float().cpu())
        batch_done(len(pixels) * processes.size)
    return processes.gather(torch.cat(logits))


@torch.no_grad()
def watch_linears(
    module: nn.Module, pixels: Tensor, seen: Callable[[str, Tensor, Tensor], None]
) -> None:
    """Call `seen` with path, input [..., in] and output [..., out] of each quantized linear as a
    forward of `pixels` comes to it. None of them is kept: all together they may be larger than the
    model."""

    def leave(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda _, arguments, output: seen(path, arguments[0], output)

    with hooked(
        [
            linear.register_forward_hook(leave(path))
            for path, linear in quantized_linears(module).items()
        ]
    ):
        module(pixels)


def nudged(pixels: Tensor, seed: int) -> Tensor:
    """Every value changed by about a millionth of itself, as another order of float sums may change
    it."""
    return pixels * (
        1 + 1e-6 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    )
