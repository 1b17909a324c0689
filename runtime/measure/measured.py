"""What was measured of one model: an entry of `models` in the bench's report."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.audit.precision import Precision
from runtime.audit.rows import AuditRow
from runtime.measure.accuracy import Accuracy, PairedDrop
from runtime.measure.latency import Latency, Throughput
from runtime.measure.parity import Parity
from runtime.quantization import QuantizedModule
from runtime.records import Json, Record

Role = Literal["candidate", "baseline"]
"""A candidate is what the user asked about; a baseline is the float model that it came from."""


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
        packed = np.frombuffer(bytes.fromhex(self.hits), np.uint8)
        return np.unpackbits(packed, count=self.images).astype(bool)


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
    """A model of the bench's report.

    path: what the user named; of a baseline, the float model's name.
    flavor, scheme, method: as the file's metadata say.
    bits_per_weight: as the file's metadata say, with scales, zero points and branches.
    quantization: how each linear was quantized; None without the artifact.
    parity: None if it was not asked for.
    throughput: empty if it was not asked for.
    executed, executed_on: number of nodes that ran, by operator and by execution provider.
    audit, precision: empty and None with a provider that compiles the whole graph.
    """

    name: str
    path: str
    role: Role
    flavor: str
    scheme: str
    method: str
    size_bytes: int
    bits_per_weight: float
    quantization: tuple[QuantizedModule, ...] | None
    parity: Parity | None
    accuracy: ComparedAccuracy
    latency: tuple[ComparedLatency, ...]
    load_ms: float
    peak_memory_mb: float | None
    throughput: tuple[Throughput, ...]
    executed: dict[str, int]
    executed_on: dict[str, int]
    audit: tuple[AuditRow, ...]
    precision: Precision | None

    @property
    def is_candidate(self) -> bool:
        """Whether this is a model that the user asked about."""
        return self.role == "candidate"
