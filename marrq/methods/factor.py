"""The factor of the damped inverse Hessian, by which the column sweep compensates.

    (H + λI)⁻¹ = Uᵀ U,        U upper triangular,   λ = damping · mean(diag H)

from GPTQ (arXiv 2210.17323), which inverts H + λI and then factors the inverse. Differs from it:
the inverse is never formed. With J the matrix that reverses the order of rows,

    J (H + λI) J = L Lᵀ   (Cholesky)        so        U = J L⁻¹ J

one factorization and one triangular solve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.distributed import one_thread
from marrq.errors import MarrqError

MAX_DAMPING_STEPS = 12


@dataclass(frozen=True)
class Factor:
    """U of the damped inverse Hessian, its columns in sweep order.

    order: [n], the input that each position of the sweep works on
    upper: U, [n, n] float64
    damping: the λ / mean(diag H) that was used"""

    order: Tensor
    upper: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """Factor H + λI, in descending order of diag H (`act_order`) or in the order of the inputs.

    A dead input (H_ii = 0) gets H_ii = 1, so that its weights are simply rounded. If the
    factorization fails, the damping is raised tenfold until it succeeds; the Factor says which
    damping was used. Raises MarrqError if H is not finite, or if no damping helps.

    hessian: H, [n, n] float64."""
    if not torch.isfinite(hessian).all():
        raise MarrqError(
            "the inputs of the linear are not finite: look for NaN or infinity in the model's "
            "weights or the images"
        )
    # λ is relative to the mean of diag H, so that the scale of the inputs does not matter.
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    mean = diagonal.mean() if alive.any() else torch.ones_like(diagonal[0])
    # Act order. Stable: inputs of equal strength keep their order, on every machine.
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=hessian.device)
    )
    # H_ii = 1 for a dead input. Its row and column of H are 0, so that U couples it to no other.
    filled = hessian + torch.diag((~alive).to(hessian.dtype))
    filled = filled[order][:, order]
    identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
    for _ in range(MAX_DAMPING_STEPS):
        damped = filled + damping * mean * identity
        # LAPACK's sums depend on the number of threads, and every process must find the same U.
        with one_thread():
            # J (H + λI) J = L Lᵀ.
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                # L⁻¹, and U = J L⁻¹ J.
                inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
                return Factor(order, inverse.flip(0, 1), damping)
        # At least 1e-8, to get away from a damping of 0.
        damping = max(damping * 10, 1e-8)
    raise MarrqError(
        f"the linear's Hessian cannot be factored even with damping {damping:g}: use other "
        "calibration images"
    )
