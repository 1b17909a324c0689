"""The candidates of a search, and how many of them are computed at once.

Searches of grids try many candidates on the same values. All candidates are one stacked tensor,
cut into chunks. A GPU wants few large operations, since each one is launched from Python: chunks
are limited by memory alone. A CPU wants chunks that stay in the cache of a core, because a search
is a dozen passes over a chunk. No result depends on the size of a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CACHE_BYTES = 2**19
"""Of a chunk on a CPU. Of 32 kB … 2 MB, 512 kB was the fastest on a core with 2 MB of level 2
cache: 0.3 of the time of whole tensors, for weights of 1152 × 384 and 384 × 1536."""

GPU_BYTES = 2**28
"""Of a chunk on a GPU: a dozen launches work on 64 million numbers."""


def items_at_once(count: int, item: Tensor | int, device: torch.device) -> int:
    """How many of `count` items, at least one, go into a chunk.

    item: one of them, or its bytes.
    """
    size = item if isinstance(item, int) else item.numel() * item.element_size()
    budget = CACHE_BYTES if device.type == "cpu" else GPU_BYTES
    return max(1, min(count, budget // max(size, 1)))


def candidate_shares(factors: Sequence[float], like: Tensor) -> Tensor:
    """The factors of a search as [factors, 1, 1], on the device and in the type of a tensor."""
    # Not blocking: a GPU that is asked for a copy at once keeps Python waiting for all its work.
    shares = torch.tensor(factors, dtype=like.dtype).to(like.device, non_blocking=True)
    return shares[:, None, None]
