"""SERQ (arXiv 2603.08185): the r most salient input channels of a linear get two sets of codes.

    S = the r channels with the largest E[x_j²] (of the variance, if the bias takes up the mean)

quantizers/salient.py has the grid of the two sets. The sweep comes to the columns of S last
(methods/factor.py). A column's rounding error is compensated in the columns behind it, so that the
errors of all others end in S, whose steps are finer: what S cannot express of them is the part that
x_S does not explain. In this sense S does what the factors L R of the other kinds do, with the
selection of channels for R.

Differs from the paper. Its first step flattens the activations by their largest magnitudes and
orders channels by the weights; here equalization (marrq/transforms/equalization.py) has scaled the
channels before, and after it the order by E[x²], by E[x²] ‖W_j‖² and by ‖W_j‖² give nearly the same
error. E[x²] belongs to the inputs: linears that share an input share S, and one factorization
serves them. The paper rounds R first and by itself; here both sets are one code in one sweep.
"""

import torch
from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.lowrank_spec import LowRankSpec


def salient_columns(hessian: Tensor, spec: LowRankSpec | None) -> Tensor | None:
    """S as ascending indices [r], int64; None if the spec is no `serq`. Raises MarrqError if the
    linear has fewer inputs.

    hessian: H, [n, n]."""
    if spec is None or spec.is_branch:
        return None
    if spec.rank > len(hessian):
        raise MarrqError(
            f"the rank of {spec} is larger than the {len(hessian)} inputs of the linear: use "
            f"{len(hessian)} or less"
        )
    # Stable: of channels of equal strength the first are taken, on every machine.
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return torch.sort(order[: spec.rank]).values
