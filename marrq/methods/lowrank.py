"""A low-rank branch beside the quantized weight: W ≈ Q + L R, with L [m, r] and R [r, n]. A part of
W may be kept out of the quantizer. L R is fitted to the residual W - Q, or to W + αΔ - Q if the
method has an α: W + αΔ is the weight that corrects the drift of the inputs (methods/exact.py), and
a branch fitted to W - Q would take the correction back.

With H = Σ x xᵀ over the calibration inputs and any S with Sᵀ S = H, the square error that a weight
error E (m × n) makes in the outputs is ‖E Sᵀ‖². So the best L R of rank r for the residual E is, by
Eckart and Young,

    L R = SVD_r(E Sᵀ) S⁻ᵀ = U_r U_rᵀ E,        U_r the r leading left singular vectors of E Sᵀ

The second form (our algebra) needs no inverse: L R is the residual projected on the r output
directions in which it errs most. A factor of H cancels. The kinds:

    kind    S                    quantized            paper
    lqer    diag(rms x_i)        W                    LQER, arXiv 2402.02446
    qera    Sᵀ S = H, exact      W                    QERA-exact, arXiv 2410.06040
    srr     Sᵀ S = H, exact      W - L₁ R₁            SRR, arXiv 2602.02001

SRR keeps L₁ R₁ = SVD_k(W Sᵀ) S⁻ᵀ out of the quantizer, with

    k = argmin over 0 ≤ k ≤ r of ρ_k(W Sᵀ) · ρ_{r-k}(N Sᵀ),    ρ_p(A) = 1 - Σ_{i≤p} σ_i² / ‖A‖²

ρ_p(A) is the share of A's energy that rank p leaves. N is iid uniform in [-1, 1] and stands in for
rounding noise.

Differs from the papers: LQER scales by mean |x_i|, which second moments do not give; the rms is
what QERA-approx takes. QERA takes the symmetric square root of H for S; a Cholesky factor serves as
well, because the two differ by an orthogonal factor, which cancels. SRR keeps L₁ R₁ as it is and
fits rank r - k to the rest. Here all r ranks are fitted to the residual, which is never worse:
L₁ R₁ + L₂ R₂ is one of the candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.distributed import one_thread
from marrq.errors import MarrqError
from marrq.methods.lowrank_spec import LowRankKind, LowRankSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.linear import INT8_LIMIT, LowRank, StoredFactor

DAMPINGS = tuple(10.0**exponent for exponent in range(-6, 1))
NOISE_SEED = 0


@dataclass(frozen=True)
class Scaling:
    """Sᵀ up to a factor, [n, n] float64, lower triangular. Linears that share an input share it.

    damping: λ / mean(diag H) that was added to H to factor it, 0 if none was needed."""

    transposed: Tensor
    damping: float


def input_scaling(statistics: ResidualStatistics, kind: LowRankKind) -> Scaling:
    """S of that kind. Raises MarrqError if H is not finite or cannot be factored."""
    hessian = statistics.hessian
    if not torch.isfinite(hessian).all():
        raise MarrqError(
            "the inputs of the linear are not finite: look for NaN or infinity in the model's "
            "weights or the images"
        )
    # LQER: S = diag(rms x_i), and the mean over tokens is a factor, which cancels.
    if kind == "lqer":
        # Centred sums of a constant input can come out slightly below 0.
        return Scaling(hessian.diagonal().clamp(min=0).sqrt().diag(), 0.0)
    return _exact_scaling(hessian)


@one_thread()
def _exact_scaling(hessian: Tensor) -> Scaling:
    """The Cholesky factor of H + λI with the least damping that works."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    mean = mean if mean > 0 else torch.ones_like(mean)
    # H = L Lᵀ, so that Sᵀ = L.
    # H is often singular, and sums of float32 products can make it slightly indefinite.
    for damping in DAMPINGS:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            return Scaling(lower, damping)
    raise MarrqError(
        f"the linear's Hessian cannot be factored even with damping {DAMPINGS[-1]:g}: use other "
        "calibration images"
    )


def preserved(weight: Tensor, scaling: Scaling, spec: LowRankSpec) -> tuple[Tensor, int]:
    """The part that is kept out of the quantizer: L₁ R₁ [m, n] in the weight's type; its rank k.

    Zeros and 0 for every kind but `srr`. Raises MarrqError if the rank is larger than that of any
    weight of this shape."""
    _check_rank(weight, spec)
    kept = split(weight, scaling, spec.rank) if spec.kind == "srr" else 0
    if kept == 0:
        return torch.zeros_like(weight), 0
    # The best rank-k part of W itself, under the scaling: SVD_k(W Sᵀ) S⁻ᵀ.
    left, right = _project(weight.double(), scaling, kept)
    return (left @ right).to(weight), kept


def refit(residual: Tensor, scaling: Scaling, spec: LowRankSpec) -> LowRank:
    """The best L R of the whole rank for a residual [m, n], W - Q or W + αΔ - Q, rounded as it is
    stored. Raises MarrqError as `preserved` does."""
    _check_rank(residual, spec)
    # SVD_r(E Sᵀ) S⁻ᵀ, in float64: the residual E is small beside W.
    left, right = _project(residual.double(), scaling, spec.rank)
    # Columns of L have norm 1, rows of R have any. Give both the square root of that norm, so that
    # neither leaves the range of float16.
    norm = right.norm(dim=1).sqrt()
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    round_to = _half if spec.num_bits == 16 else _int8
    return LowRank(round_to(left * norm, 0), round_to(right / norm[:, None], 1))


def split(weight: Tensor, scaling: Scaling, rank: int) -> int:
    """SRR's k: how many of the ranks preserve the weight [m, n]; the others are left for the
    rounding error."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    # N, drawn on the CPU, so that a GPU finds the same k.
    noise = torch.rand(weight.shape, dtype=torch.float64, generator=generator)
    noise = noise.to(weight.device) * 2 - 1
    # ρ_k(W Sᵀ) for k = 0 … r: the share of the weight that has to go through the quantizer.
    exposed = _unexplained(weight.double() @ scaling.transposed, rank)
    # ρ_{r-k}(N Sᵀ): the share of the rounding error that the other ranks cannot take back.
    unrecovered = _unexplained(noise @ scaling.transposed, rank).flip(0)
    return int((exposed * unrecovered).argmin())


def _unexplained(matrix: Tensor, rank: int) -> Tensor:
    """ρ_0 … ρ_rank of a matrix, [rank + 1]; zeros for a matrix of zeros."""
    # σ², ascending; rounding can take the smallest below 0.
    with one_thread():
        energies = torch.linalg.eigvalsh(_small_gram(matrix)).clamp(min=0)
    # Tails are summed from the smallest σ²: the difference 1 - Σ would lose small tails.
    tails = torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)
    # tails[p] is the energy that rank p leaves; tails[0] is all of it.
    return tails[: rank + 1] / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)


def _project(matrix: Tensor, scaling: Scaling, rank: int) -> tuple[Tensor, Tensor]:
    """U_r [m, r] of the matrix times Sᵀ, and U_rᵀ times the matrix [r, n].

    By eigenvectors of the smaller Gram matrix: at 1536 × 384 they take a quarter of the time of an
    SVD."""
    scaled = matrix @ scaling.transposed
    with one_thread():
        _, vectors = torch.linalg.eigh(_small_gram(scaled))
        # eigh sorts by ascending σ²: the leading vectors are the last columns.
        leading = vectors[:, -rank:].flip(1)
        # Of A Aᵀ they are U_r itself. Of Aᵀ A they are right singular vectors V_r, and A V_r spans
        # the same outputs; QR makes it orthonormal even if A has a lower rank.
        left = leading if len(leading) == len(scaled) else torch.linalg.qr(scaled @ leading).Q
    # U_r (U_rᵀ E): no S⁻ᵀ is needed, and a singular H does no harm.
    return left, left.T @ matrix


def _small_gram(matrix: Tensor) -> Tensor:
    """A Aᵀ or Aᵀ A, whichever is smaller."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _half(factor: Tensor, dim: int) -> StoredFactor:
    """A factor rounded to float16, which needs no scale along any dimension."""
    return StoredFactor.rounded(factor.float(), None)


def _int8(factor: Tensor, dim: int) -> StoredFactor:
    """A factor rounded to a symmetric int8 grid for each component. dim: the dimension that is not
    the rank."""
    factor = factor.float()
    # One scale for each component, [1, r] of L or [r, 1] of R: components differ in size.
    scale = factor.abs().amax(dim, keepdim=True) / INT8_LIMIT
    return StoredFactor.rounded(factor, torch.where(scale > 0, scale, torch.ones_like(scale)))


def _check_rank(weight: Tensor, spec: LowRankSpec) -> None:
    out_features, in_features = weight.shape
    largest = min(out_features, in_features)
    if spec.rank > largest:
        raise MarrqError(
            f"the rank of {spec} is larger than a weight of {out_features} × {in_features} can "
            f"have: use {largest} or less"
        )
