"""A low-rank branch beside the quantized weight, W ≈ Q + L R: what is kept out of the quantizer,
and what is fitted to its residual.

With H = Σ x xᵀ over the calibration inputs and any S with Sᵀ S = H, the square error that a weight
error E (m × n) makes in the outputs is ‖E Sᵀ‖², so the best L R of rank r for the residual E = W -
Q is, by Eckart and Young,

    L R = SVD_r(E Sᵀ) S⁻ᵀ = U_r U_rᵀ E,        U_r the r leading left singular vectors of E Sᵀ

The second form (our algebra) needs no inverse: L R is the residual projected on the r output
directions in which it errs most. Only H up to a factor matters. The kinds are

    lqer    S = diag(rms x_i)           Q of the whole W                                            LQER, arXiv 2402.02446
    qera    Sᵀ S = H, exact             Q of the whole W                                            QERA-exact, arXiv 2410.06040
    srr     Sᵀ S = H, exact             Q of W - L₁ R₁, with L₁ R₁ = SVD_k(W Sᵀ) S⁻ᵀ kept back      SRR, arXiv 2602.02001

SRR's k = argmin over 0 ≤ k ≤ r of ρ_k(W Sᵀ) · ρ_{r-k}(N Sᵀ), where N is iid uniform in [-1, 1],
standing in for rounding noise, and ρ_p(A) = 1 - Σ_{i≤p} σ_i² / ‖A‖² is the share of A's energy that
rank p leaves.

Differs from the papers: LQER scales by mean |x_i|, which second moments do not give; the rms is
what QERA-approx takes. QERA takes the symmetric square root of H for S; a Cholesky factor serves as
well, because what is orthogonal between the two cancels. SRR keeps L₁ R₁ as it is and fits rank r -
k to the rest; here all r are fitted to W - Q, which is never worse, L₁ R₁ + L₂ R₂ being one of the
candidates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from marrq.distributed import one_thread
from marrq.errors import MarrqError
from marrq.methods.spec import LowRankKind, LowRankSpec
from marrq.methods.statistics import ResidualStatistics
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import LowRank, StoredFactor

INT8_LIMIT = 127
DAMPINGS = tuple(10.0**exponent for exponent in range(-6, 1))
NOISE_SEED = 0


@dataclass(frozen=True)
class Scaling:
    """Sᵀ up to a factor, lower triangular, [n, n] in float64; linears that share an input share it.

    damping: the λ / mean(diag H) that was added to H to factor it, 0 where none was needed.
    """

    transposed: Tensor
    damping: float


def input_scaling(statistics: ResidualStatistics, kind: LowRankKind) -> Scaling:
    """S of the kind. Raises MarrqError when H is not finite."""
    hessian = statistics.hessian
    if not torch.isfinite(hessian).all():
        raise MarrqError(
            "the inputs of the layer are not finite: look for NaN or infinity in the model's "
            "weights or the images"
        )
    if kind == "lqer":
        return Scaling(
            hessian.diagonal().clamp(min=0).sqrt().diag(), 0.0
        )  # centred sums of a constant input can come out below 0
    return _exact_scaling(hessian)


@one_thread()
def _exact_scaling(hessian: Tensor) -> Scaling:
    """The Cholesky factor of H + λI with the least damping that works: H is often singular, and its
    products are float32 sums."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    mean = mean if mean > 0 else torch.ones_like(mean)
    for damping in DAMPINGS:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not failed:
            return Scaling(lower, damping)
    raise MarrqError(
        f"the layer's Hessian cannot be factored even with damping {DAMPINGS[-1]:g}: use other "
        "calibration images"
    )


def preserved(weight: Tensor, scaling: Scaling, spec: LowRankSpec) -> tuple[Tensor, int]:
    """What is kept out of the quantizer, L₁ R₁ of the weight [m, n] in its type, and its rank k:
    zeros and 0 but for `srr`.

    Raises MarrqError when the rank is larger than the weight has.
    """
    _check_rank(weight, spec)
    kept = split(weight, scaling, spec.rank) if spec.kind == "srr" else 0
    if kept == 0:
        return torch.zeros_like(weight), 0
    left, right = _project(weight.double(), scaling, kept)
    return (left @ right).to(weight), kept


def refit(residual: Tensor, scaling: Scaling, spec: LowRankSpec) -> LowRank:
    """The best L R of the whole rank for a residual W - Q [m, n], rounded as it is stored. Raises
    MarrqError as `preserved` does.

    Each component is balanced, column of L and row of R with one norm, so that neither leaves the
    range of float16."""
    _check_rank(residual, spec)
    left, right = _project(residual.double(), scaling, spec.rank)
    norm = right.norm(dim=1).sqrt()  # columns of L have norm 1
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return LowRank(
        _stored(left * norm, 0, spec.num_bits), _stored(right / norm[:, None], 1, spec.num_bits)
    )


def split(weight: Tensor, scaling: Scaling, rank: int) -> int:
    """SRR's k: how many of the ranks preserve the weight [m, n]; the others are left for the
    rounding error."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = (
        torch.rand(weight.shape, dtype=torch.float64, generator=generator).to(weight.device) * 2 - 1
    )
    exposed = _unexplained(weight.double() @ scaling.transposed, rank)
    unrecovered = _unexplained(noise @ scaling.transposed, rank).flip(0)
    return int((exposed * unrecovered).argmin())


def _unexplained(matrix: Tensor, rank: int) -> Tensor:
    """ρ_0 … ρ_rank of a matrix, [rank + 1]; zeros for a matrix of zeros. Summed from the smallest,
    which 1 - Σ would lose."""
    with one_thread():
        energies = torch.linalg.eigvalsh(_small_gram(matrix)).clamp(min=0)  # σ², ascending
    tails = torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)
    return tails[: rank + 1] / tails[0].clamp(min=torch.finfo(tails.dtype).tiny)


def _project(matrix: Tensor, scaling: Scaling, rank: int) -> tuple[Tensor, Tensor]:
    """U_r [m, r] of the matrix times Sᵀ, and U_rᵀ times the matrix [r, n].

    The eigenvectors of the smaller Gram matrix take a quarter of the time of an SVD at 1536 × 384,
    or less. Where they are right singular vectors they give a basis of the same outputs, which QR
    makes orthonormal even if the matrix has not that rank."""
    scaled = matrix @ scaling.transposed
    with one_thread():
        _, vectors = torch.linalg.eigh(_small_gram(scaled))
        leading = vectors[:, -rank:].flip(1)
        left = leading if len(leading) == len(scaled) else torch.linalg.qr(scaled @ leading).Q
    return left, left.T @ matrix


def _small_gram(matrix: Tensor) -> Tensor:
    """A Aᵀ or Aᵀ A, whichever is smaller."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _stored(factor: Tensor, dim: int, num_bits: int) -> StoredFactor:
    """Rounded to float16, or to a symmetric int8 grid per component. dim: the one that is not the
    rank."""
    factor = factor.float()
    if num_bits == 16:
        return StoredFactor(factor.half())
    scale = factor.abs().amax(dim, keepdim=True) / INT8_LIMIT
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    grid = Grid(scale, torch.zeros_like(scale), -INT8_LIMIT, INT8_LIMIT)
    return StoredFactor(grid.quantize(factor).to(torch.int8), scale)


def _check_rank(weight: Tensor, spec: LowRankSpec) -> None:
    out_features, in_features = weight.shape
    if spec.rank > min(out_features, in_features):
        limit = f"use {min(out_features, in_features)} or less"
        raise MarrqError(
            f"the rank of {spec} is larger than a weight of {out_features} × {in_features} can "
            f"have: {limit}"
        )
