"""The factor of the damped inverse Hessian, by which the column sweep compensates.

    (H + λI)⁻¹ = Uᵀ U,        U upper triangular,   λ = damping · mean(diag H)

from GPTQ (arXiv 2210.17323), which inverts H + λI and then factors the inverse. Differs from it:
the inverse is never formed. With J the matrix that reverses the order of rows,

    J (H + λI) J = L Lᵀ   (Cholesky)        so        U = J L⁻¹ J

one factorization and one triangular solve.
"""

from dataclasses import dataclass, field

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
    _compensation: dict[torch.dtype, Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def compensation(self, kind: torch.dtype) -> Tensor:
        """-U[j] / U_jj, [n, n]: by how much an error of column j moves the columns behind. Computed
        once for all sweeps in this type."""
        # The division is done here, once, for all rows of the weight.
        if kind not in self._compensation:
            upper = self.upper.to(kind)
            self._compensation[kind] = upper.div(upper.diagonal()[:, None]).neg_()
        return self._compensation[kind]


def factorize(
    hessian: Tensor, damping: float, act_order: bool, last: Tensor | None = None
) -> Factor:
    """Factor H + λI, in descending order of diag H (`act_order`) or in the order of the inputs.

    last: inputs [r] to which the sweep comes after all others, or None. Columns with finer steps
    belong there: they take up the errors of all columns before them.

    A dead input (H_ii = 0) gets H_ii = 1, so that its weights are simply rounded. If the
    factorization fails, the damping is raised tenfold until it succeeds; the Factor says which
    damping was used. Raises MarrqError if H is not finite, or if no damping helps.

    hessian: H, [n, n] float64."""
    # Act order. Stable: inputs of equal strength keep their order, on every machine.
    diagonal = hessian.diagonal()
    order = (
        diagonal.argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=hessian.device)
    )
    if last is not None:
        # Stable again: both parts keep their order.
        order = order[torch.isin(order, last).byte().argsort(stable=True)]
    # J H J in sweep order. H is symmetric: rows may be gathered for columns.
    backwards = order.flip(0)
    turned = hessian.index_select(0, backwards).T.contiguous().index_select(0, backwards)
    lower, damping = damped_cholesky_(turned, damping)
    with one_thread():
        # L⁻¹, and U = J L⁻¹ J.
        identity = torch.eye(len(order), dtype=hessian.dtype, device=hessian.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return Factor(order, inverse.flip(0, 1), damping)


def damped_inverse(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """(H + λI)⁻¹, [n, n] float64, for a solve with many right-hand sides, and the damping that was
    used; dead inputs, damping and errors as for `factorize`."""
    lower, used = damped_cholesky_(hessian.clone(), damping)
    with one_thread():
        return torch.cholesky_inverse(lower), used


def damped_cholesky_(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """L of H + λI = L Lᵀ, and the damping that was used. Changes the diagonal of H, [n, n]."""
    # λ is relative to the mean of diag H, so that the scale of the inputs does not matter.
    diagonal = hessian.diagonal().clone()
    alive = diagonal > 0
    mean = torch.where(alive.any(), diagonal.mean(), 1)
    # H_ii = 1 for a dead input. Its row and column of H are 0, so that L couples it to no other.
    filled = diagonal + ~alive
    # NaN or infinity anywhere in H shows in the sum of its elements.
    finite = hessian.sum().isfinite()
    for _ in range(MAX_DAMPING_STEPS):
        hessian.diagonal().copy_(filled + damping * mean)
        # LAPACK's sums depend on the number of threads, and every process must find the same L.
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(hessian)
        # One question to the device for both answers.
        succeeded, is_finite = torch.stack([failed == 0, finite]).tolist()
        if not is_finite:
            raise MarrqError(
                "the inputs of the linear are not finite: look for NaN or infinity in the model's "
                "weights or the images"
            )
        if succeeded:
            return lower, damping
        # At least 1e-8, to get away from a damping of 0.
        damping = max(damping * 10, 1e-8)
    raise MarrqError(
        f"the linear's Hessian cannot be factored even with damping {damping / 10:g}: use other "
        "calibration images"
    )
