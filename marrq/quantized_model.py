"""The quantized model and the record of how it came about: data only."""

from dataclasses import dataclass

from torch import nn

from marrq.methods.problem import SearchStep
from marrq.methods.spec import MethodSpec
from marrq.models.load import ModelSource, output_name
from marrq.models.preprocessing import Preprocessing
from marrq.schemes import Scheme

BATCH_SIZE = 16
"""Images of a batch. The activations of so many images of a ViT-S fit into the caches of a
processor core, which halves the time of a run."""


@dataclass(frozen=True)
class CalibrationRecord:
    """Which images calibrate: enough to draw them again.

    data: the folder or package of images.
    samples: how many images are drawn.
    seed: of the draw.
    files_sha256: a hash of the images that the draw gave.
    batch_size: images of a batch; the last bits of the statistics depend on it.
    """

    data: str
    samples: int
    seed: int
    files_sha256: str
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class QuantizationSettings:
    """What the user chooses about the codes. Codes are a function of the model, the calibration
    images and these settings."""

    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord


@dataclass(frozen=True)
class ModuleReport:
    """How one linear was quantized.

    path: of the linear in the model.
    error: J, the square error of the linear's outputs (or of the residual stream after it), summed
        over the calibration tokens (marrq/methods/statistics.py).
    relative_error: J / ‖W X + e‖², with the power of the wanted outputs.
    mse: J / (tokens · outputs).
    alpha, trajectory, fallback: the residual strength α, the steps of its search, and why α = 0 was
        used instead (Rounding in marrq/methods/problem.py).
    damping: λ / mean(diag H) of the factorization that the sweep used.
    lowrank_damping: the same of the low-rank branch's input scaling; None without a branch.
    clipped: share of weights outside the range of their grid, 0 … 1.
    writes_stream: whether J is the error of the residual stream.
    equalized: whether the channels of its input were scaled.
    is_outer: whether it belongs to the patch embedding or the head.
    balanced: whether its input was put in another basis.
    """

    path: str
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


@dataclass(frozen=True)
class QuantizedModel:
    """A model whose blocks have QuantLinear in place of every linear, and the record of how it came
    about. If the scheme says so, first and last layers are quantized too.

    module, preprocessing, labels: as in VisionModel.
    source: the float model that was quantized.
    reports: one for each quantized linear, in order of execution.
    """

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord
    reports: tuple[ModuleReport, ...]

    @property
    def settings(self) -> QuantizationSettings:
        """What the user chose."""
        return QuantizationSettings(self.scheme, self.method, self.calibration)

    @property
    def output(self) -> str:
        """What the model computes: `logits` or `features`."""
        return output_name(self.labels)
