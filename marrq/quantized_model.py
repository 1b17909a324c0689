"""The quantized model and the record of how it came about: data only."""

from dataclasses import dataclass

from torch import nn

from marrq.methods.problem import SearchStep
from marrq.methods.spec import MethodSpec
from marrq.models.load import ModelSource, output_name
from marrq.models.preprocessing import Preprocessing
from marrq.schemes import Scheme

BATCH_SIZE = 16
"""Images at once: a batch of a ViT-S block's activations then stays in the caches of a processor
core, which halves its time."""


@dataclass(frozen=True)
class CalibrationRecord:
    """Which images calibrated: enough to draw them again. batch_size: images at once, which the
    last bits of the sums depend on."""

    data: str
    samples: int
    seed: int
    files_sha256: str
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class QuantizationSettings:
    """What the user chooses, and what the codes follow from, the model and the images apart."""

    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord


@dataclass(frozen=True)
class ModuleReport:
    """How one linear was quantized.

    error: J over the calibration tokens; relative_error: J / ‖W X̃‖²; mse: J / (tokens · outputs);
    clipped: share of weights outside their grid; alpha, trajectory, fallback: see
    methods/problem.py; damping, lowrank_damping: see methods.Solution; writes_stream: whether the
    wanted output was that of the residual stream; equalized: whether its input got a scale per
    channel; edge: whether it belongs to the patch embedding or the head; balanced: whether its
    inputs were put in another basis."""

    path: str
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
    edge: bool = False
    balanced: bool = False


@dataclass(frozen=True)
class QuantizedModel:
    """A model with QuantLinear in place of every linear of its blocks, and of its edges where the
    scheme says so; and the record of how it came about.

    module, preprocessing, labels: as in VisionModel; source: the float model it was made from;
    reports: one a linear."""

    module: nn.Module
    source: ModelSource
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord
    reports: tuple[ModuleReport, ...]

    @property
    def output(self) -> str:
        """What the model gives."""
        return output_name(self.labels)
