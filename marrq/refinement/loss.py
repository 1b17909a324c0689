"""How far the outputs of the quantized model are from those of the full-precision model.

    logits of classes    KL(softmax z̃ ‖ softmax z), in nats, the mean over the images
    any other output     1 - cos(z̃, z) over the last dimension, the mean over images and positions

z̃ is the full-precision model's output. No label is read. The losses of several outputs are added.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def distance(found: Tensor, wanted: Tensor, is_classes: bool) -> Tensor:
    """The loss of one output, a scalar.

    found, wanted: of the quantized and the full-precision model, [images, …, n].
    """
    if is_classes:
        # Σ p̃ (log p̃ - log p) of each image.
        return F.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
        )
    return (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()


def loss_of(
    found: Sequence[Tensor], wanted: Sequence[Tensor], are_classes: Sequence[bool]
) -> Tensor:
    """The sum of the losses of all outputs, a scalar."""
    pairs = zip(found, wanted, are_classes, strict=True)
    return sum((distance(*pair) for pair in pairs), start=found[0].new_zeros(()))
