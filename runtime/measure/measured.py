"""A model to measure, and what was measured of it: an entry of `models` in the bench's report."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.audit.precision import Precision
from runtime.audit.rows import AuditRow
from runtime.measure.accuracy import Accuracy, PairedDrop
from runtime.measure.latency import Latency, Throughput
from runtime.measure.overflow import Overflow
from runtime.measure.parity import Parity
from runtime.quantization import QuantizedModule
from runtime.records import Json, Record

# A candidate is what the user asked about; a baseline is the float model that it came from.
Role = Literal["candidate", "baseline"]


@dataclass(frozen=True)
class Entry:
    """A model to measure."""

    name: str
    # What is run.
    file: Path
    # What the user named.
    path: str
    role: Role
    # As the file's metadata say.
    flavor: str
    device: str
    scheme: str
    method: str
    bits_per_weight: float
    # How each linear was quantized; None without the artifact.
    quantization: tuple[QuantizedModule, ...] | None = None
    # How the file compares with its artifact; None if that was not asked for.
    parity: Parity | None = None
    # Whether its outputs are logits of classes.
    has_classes: bool = True


@dataclass(frozen=True)
class BaselineDrop(PairedDrop):
    """What a model loses in top-1 against a baseline. baseline: its name."""

    baseline: str

    def to_json(self) -> Json:
        """The baseline first."""
        return {"baseline": self.baseline, **super().to_json()}


@dataclass(frozen=True)
class ComparedAccuracy(Accuracy):
    """Accuracy of a model, and what it loses.

    against: the baseline; None for the baseline itself, and if there is none.
    hits: a bit for each image, set if its top-1 is right, in hexadecimal; the first image is the
    highest bit of the first byte. So any two models of a report can be compared in pairs.
    """

    against: BaselineDrop | None
    hits: str

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the top-1 of each image is right, [images]."""
        # The last byte is filled up with zeros, which `count` cuts off.
        packed = np.frombuffer(bytes.fromhex(self.hits), np.uint8)
        return np.unpackbits(packed, count=self.images).astype(bool)


@dataclass(frozen=True)
class Agreement(Record):
    """How alike a model and the float32 model answer, on images whose classes are not known.

    agreement: share of images with the same top-1, 0 … 1.
    divergence: from the float32 model, in nats (runtime/measure/accuracy.py).
    images: how many there are.
    """

    agreement: float
    divergence: float
    images: int


@dataclass(frozen=True)
class NotFinite(Record):
    """Logits that are NaN or infinite. They answer nothing, so the model has no accuracy.

    images: how many have such logits.
    first: the operator that overflows; None if the file in float32 shows none.
    """

    images: int
    first: Overflow | None

    @property
    def sentence(self) -> str:
        """How many images, and why."""
        cause = "" if self.first is None else f": {self.first.sentence}"
        return f"gives NaN or infinite logits for {self.images:,} images{cause}"


@dataclass(frozen=True)
class ComparedLatency(Latency):
    """Latency at one batch size, and its ratio to each baseline: median over the rounds of the
    ratio within a round; None if the baseline was not measured."""

    ratio_fp16: float | None
    ratio_fp32: float | None

    def ratio(self, flavor: str) -> float | None:
        """The ratio to the baseline of that flavour, fp16 or fp32."""
        return {"fp16": self.ratio_fp16, "fp32": self.ratio_fp32}[flavor]


@dataclass(frozen=True)
class MeasuredModel(Record):
    """A model of the bench's report."""

    name: str
    # What the user named; of a baseline, the float model's name.
    path: str
    role: Role
    # As the file's metadata say.
    flavor: str
    device: str
    scheme: str
    method: str
    size_bytes: int
    # As the file's metadata say: scales, zero points and branches are counted too.
    bits_per_weight: float
    # How each linear was quantized; None if a file was given without its artifact.
    quantization: tuple[QuantizedModule, ...] | None
    # None if it was not asked for.
    parity: Parity | None
    # None if the classes of the images are not known, and if logits are not finite.
    accuracy: ComparedAccuracy | None
    # In place of the accuracy, if the classes of the images are not known; None for features.
    agreement: Agreement | None
    not_finite: NotFinite | None
    # One for each batch size, in the order of the plan.
    latency: tuple[ComparedLatency, ...]
    # Median over the rounds.
    load_ms: float
    # At the largest batch size; None if the system does not tell.
    peak_memory_mb: float | None
    # The same of the GPU; None if its driver does not tell, and on the CPU.
    peak_gpu_memory_mb: float | None
    # Empty if it was not asked for.
    throughput: tuple[Throughput, ...]
    # Number of nodes that ran, by operator and by execution provider.
    executed: dict[str, int]
    executed_on: dict[str, int]
    # Empty, and precision None, with a provider that compiles the whole graph.
    audit: tuple[AuditRow, ...]
    precision: Precision | None

    @property
    def alike(self) -> float | None:
        """Share of images with the same top-1 as the float32 model; None if that is not known."""
        found = self.agreement if self.accuracy is None else self.accuracy
        return None if found is None else found.agreement

    @property
    def against(self) -> BaselineDrop | None:
        """What the model loses against the baseline; None if that is not known."""
        return None if self.accuracy is None else self.accuracy.against

    @property
    def is_candidate(self) -> bool:
        """Whether this is a model that the user asked about."""
        return self.role == "candidate"


def reference_of(models: Iterable[MeasuredModel]) -> MeasuredModel | None:
    """The baseline that candidates are set beside: fp32 if it was measured, else fp16."""
    baselines = {model.flavor: model for model in models if not model.is_candidate}
    return baselines.get("fp32") or baselines.get("fp16")
