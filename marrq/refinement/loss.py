"""How far the outputs of the quantized model are from those of the full-precision model.

    classes     T² KL(softmax z̃/T ‖ softmax z/T)
    features    1 - cos(z̃, z)
    dense       ½ ‖z - z̃‖² / ‖z̃‖²

for each image, and the mean over images. z̃ is the full-precision model's output. No label is read.
The losses of several outputs are added. They are those that tokens are weighed by
(marrq/pipeline/token_weights.py): a feature is used by its direction, and of boxes, depths and
masks the size counts too. A class or a feature of one number is dense.

The temperature T is that of distillation (arXiv 1503.02531), and here it decides. The images may be
those that the full-precision model was trained on: there softmax z̃ is close to a label, and to
match it teaches labels and little else. A large T shows all logits: for T → ∞ the loss is half the
mean square of the centred z̃ - z.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marrq.models.named_outputs import OutputKind


def distance(found: Tensor, wanted: Tensor, kind: OutputKind, temperature: float) -> Tensor:
    """The loss of one output, a scalar.

    found, wanted: of the quantized and the full-precision model, [images, …].
    """
    if kind == "classes":
        softened, target = ((z / temperature).log_softmax(-1) for z in (found, wanted))
        # Σ p̃ (log p̃ - log p) of each image. Gradients shrink with 1/T², hence the factor.
        divergence = F.kl_div(softened, target, reduction="batchmean", log_target=True)
        return temperature**2 * divergence
    if kind == "features":
        return (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()
    error, power = (z.flatten(1).square().sum(1) for z in (found - wanted, wanted))
    # An image whose outputs are all 0 keeps the loss finite.
    return (error / power.clamp(min=torch.finfo(power.dtype).tiny)).mean() / 2
