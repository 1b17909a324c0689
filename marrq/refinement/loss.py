"""How far the outputs of the quantized model are from those of the full-precision model.

    logits of classes    T² KL(softmax z̃/T ‖ softmax z/T), the mean over the images
    any other output     1 - cos(z̃, z) over the last dimension, the mean over images and positions

z̃ is the full-precision model's output. No label is read. The losses of several outputs are added.

The temperature T is that of distillation (arXiv 1503.02531), and here it decides. The images may be
those that the full-precision model was trained on: there softmax z̃ is close to a label, and to
match it teaches labels and little else. A large T shows all logits: for T → ∞ the loss is half the
mean square of the centred z̃ - z.
"""

import torch.nn.functional as F
from torch import Tensor


def distance(found: Tensor, wanted: Tensor, is_classes: bool, temperature: float) -> Tensor:
    """The loss of one output, a scalar.

    found, wanted: of the quantized and the full-precision model, [images, …, n].
    """
    if is_classes:
        softened, target = ((z / temperature).log_softmax(-1) for z in (found, wanted))
        # Σ p̃ (log p̃ - log p) of each image. Gradients shrink with 1/T², hence the factor.
        divergence = F.kl_div(softened, target, reduction="batchmean", log_target=True)
        return temperature**2 * divergence
    return (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()
