"""Copies of tokens between the host and a GPU, beside the work of the GPU.

A GPU copies while it computes if the copy is on a stream of its own and the host's memory is
pinned. Without a GPU nothing is copied and nothing here does anything.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def to_host(batches: Iterable[Tensor]) -> list[Tensor]:
    """The batches in the host's memory, pinned if they come from a GPU."""
    host: list[Tensor] = []
    side: torch.cuda.Stream | None = None
    for batch in batches:
        if not _is_on_gpu(batch.device):
            host.append(batch.cpu())
            continue
        side = side or torch.cuda.Stream(batch.device)
        # torch keeps pinned memory that is free again: after two blocks nothing is pinned anew.
        pinned = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
        # The copy waits for the batch, and the GPU goes on with the next batch meanwhile.
        side.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(side):
            pinned.copy_(batch, non_blocking=True)
        # The batch's memory must not be used again before it is copied.
        batch.record_stream(side)
        host.append(pinned)
    # Once for all batches: whoever reads a pinned tensor must find what was copied.
    if side is not None:
        side.synchronize()
    return host


def on_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on the device, each copied while the one before is worked on."""
    if not _is_on_gpu(device):
        yield from (batch.to(device, non_blocking=True) for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def copied(batch: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return batch.to(device, non_blocking=True), side.record_event()

    # One batch ahead: its copy is under way when the batch before is given out.
    ahead: tuple[Tensor, torch.cuda.Event] | None = None
    for batch in batches:
        following = copied(batch)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = following
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Tensor, copied: torch.cuda.Event) -> Tensor:
    """The batch, for the stream that computes: this stream waits, the host does not."""
    stream = torch.cuda.current_stream(batch.device)
    stream.wait_event(copied)
    # The memory belongs to the copying stream, which must not use it again too early.
    batch.record_stream(stream)
    return batch


def _is_on_gpu(device: torch.device) -> bool:
    """Whether there are streams. Tensors without values (FakeTensorMode) name a GPU that may not be
    there."""
    return device.type == "cuda" and torch.cuda.is_available()
