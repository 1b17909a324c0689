"""The quantized model and the record of how it came about: data only."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from marrq.errors import MarrqError
from marrq.methods.problem import SearchStep
from marrq.methods.spec import MethodSpec
from marrq.models.class_embeddings import ClassEmbeddings
from marrq.models.load import ModelSource
from marrq.models.preprocessing import Preprocessing
from marrq.quantizers.salient import MAX_BITS
from marrq.schemes import MIXED, WEIGHT_BITS, Scheme

BATCH_SIZE = 16
"""Images of a batch. The activations of so many images of a ViT-S fit into the caches of a
processor core, which halves the time of a run."""


@dataclass(frozen=True)
class CalibrationRecord:
    """Which images calibrate: enough to draw them again.

    data: the folder or package of images.
    samples: how many images are drawn.
    seed: of the draw.
    files_sha256: a hash of the names of the images that the draw gave.
    batch_size: images of a batch; the last bits of the statistics depend on it.
    """

    data: str
    samples: int
    seed: int
    files_sha256: str
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class RefinementRecord:
    """How a model was refined after it was quantized (marrq/refinement).

    images: images that it learned from. held_out: images that judged.
    files_sha256: a hash of the names of all these images; none of them has calibrated.
    steps: steps of the optimizer.
    loss_before, loss_after: mean loss on the held-out images. If the loss did not fall, the model
        has the numbers from before.
    moved_codes: codes of weights that moved by one step.
    """

    images: int
    held_out: int
    files_sha256: str
    steps: int
    loss_before: float
    loss_after: float
    moved_codes: int = 0

    @property
    def helped(self) -> bool:
        """Whether the loss on the held-out images fell, so that the refined numbers are kept."""
        return self.loss_after < self.loss_before


@dataclass(frozen=True)
class QuantizationSettings:
    """What the user chooses about the codes. Codes are a function of the model, the calibration
    images and these settings.

    widths: for a mixed scheme the weight bits of every linear of the blocks, by path; else empty.
    """

    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord
    widths: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scheme.mixed and self.method != self.method_of(self.scheme):
            raise MarrqError(
                f"{self.method.lowrank} needs weights of {MAX_BITS} bits or fewer, so that two "
                f"codes are one byte: got {self.scheme.weight.num_bits}; leave lowrank out"
            )
        if self.scheme.weight.grid == "mxint" and self.method.clip == "weights":
            raise MarrqError(
                f"the scales of {self.scheme} are powers of two, which no clip=weights changes: "
                "leave it out"
            )
        if self.scheme.mixed and not self.widths:
            raise MarrqError(
                f"the scheme {self.scheme} has no weight bits: give a budget of bits "
                "(marrq quantize --budget), or a scheme such as W4A8"
            )
        if self.widths and not self.scheme.mixed:
            raise MarrqError(
                f"the scheme {self.scheme} has one width for all linears: leave out the widths, or "
                f"choose a scheme such as W{MIXED}A8"
            )
        for path, num_bits in self.widths.items():
            # True is an integer in Python, and a float may equal one.
            if type(num_bits) is not int or num_bits not in WEIGHT_BITS:
                raise MarrqError(
                    f"weight bits must be one of {', '.join(map(str, WEIGHT_BITS))}: got "
                    f"{num_bits!r} for {path!r}"
                )

    def method_of(self, scheme: Scheme) -> MethodSpec:
        """The method for a linear of the blocks with this scheme. Of a mixed scheme, weights of 8
        bits get no second codes (lowrank=serq): two of them do not fit a byte."""
        lowrank = self.method.lowrank
        if lowrank is None or lowrank.is_branch or scheme.weight.num_bits <= MAX_BITS:
            return self.method
        return replace(self.method, lowrank=None)

    def scheme_of(self, path: str) -> Scheme:
        """The bits and grids of the linear of the blocks at a path."""
        return self.scheme.of_width(self.widths[path]) if path in self.widths else self.scheme


@dataclass(frozen=True)
class ModuleReport:
    """How one linear was quantized.

    path: of the linear in the model.
    num_bits: of its weight.
    error: J, the square error of the linear's outputs (or of the residual stream after it), summed
        over the calibration tokens, with their weights (marrq/methods/statistics.py).
    relative_error: J / ‖W X + e‖², with the power of the wanted outputs.
    mse: J / (tokens · outputs).
    alpha, trajectory, fallback: the residual strength α, the steps of its search, and why α = 0 was
        used instead (Rounding in marrq/methods/problem.py).
    damping: λ / mean(diag H) of the factorization that the sweep used.
    lowrank_damping: the same of the low-rank branch's input scaling; None without a branch.
    target_damping: the same of the exact target's solve; None if nothing was solved.
    clipped: share of weights outside the range of their grid, 0 … 1.
    writes_stream: whether J is the error of the residual stream.
    equalized: whether the channels of its input were scaled.
    is_outer: whether it belongs to the patch embedding or the head.
    balanced: whether its input was put in another basis.
    weighted: whether the sums weigh its tokens (marrq/pipeline/token_weights.py).
    """

    path: str
    num_bits: int
    # Floats and not tensors: reports are compared, hashed and written as JSON.
    error: float
    relative_error: float
    mse: float
    alpha: float | None
    trajectory: tuple[SearchStep, ...]
    damping: float
    lowrank_damping: float | None
    clipped: float
    fallback: str | None
    writes_stream: bool
    equalized: bool
    is_outer: bool = False
    balanced: bool = False
    weighted: bool = False
    target_damping: float | None = None


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose blocks have QuantLinear in place of every linear, and the record of how it came
    about. If the scheme says so, first and last layers are quantized too.

    module, preprocessing, labels, outputs, classes: as in VisionModel.
    source: the float model that was quantized.
    reports: one for each quantized linear, in order of execution.
    widths: as in QuantizationSettings.
    refinement: how it was refined; None if it was not.
    """

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    outputs: tuple[str, ...]
    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord
    reports: tuple[ModuleReport, ...]
    widths: Mapping[str, int] = field(default_factory=dict)
    classes: ClassEmbeddings | None = None
    refinement: RefinementRecord | None = None

    @property
    def settings(self) -> QuantizationSettings:
        """What the user chose."""
        return QuantizationSettings(self.scheme, self.method, self.calibration, self.widths)

    def on_cpu(self) -> "QuantizedModel":
        """The model on the CPU: itself, or a copy if it is on another device."""
        tensors = self.module.state_dict().values()
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return self
        return replace(self, module=copy.deepcopy(self.module).cpu())

    @property
    def method_name(self) -> str:
        """The method for tables and files: `marr-stream`, or `marr-stream refined` if the refined
        numbers are kept."""
        refined = self.refinement is not None and self.refinement.helped
        return f"{self.method.name} refined" if refined else self.method.name

    @property
    def block_schemes(self) -> tuple[Scheme, ...]:
        """The schemes that linears of the blocks have, from the fewest bits: one, or one for each
        width of a mixed scheme."""
        widths = sorted(set(self.widths.values()))
        return tuple(map(self.scheme.of_width, widths)) if widths else (self.scheme,)
