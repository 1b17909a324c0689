"""A model to measure, and what was measured of it: an entry of `models` in the bench's report."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.audit.precision import Precision
from runtime.audit.rows import AuditRow
from runtime.measure.accuracy import Accuracy, BaselineDrop, bits_of, wilson_interval
from runtime.measure.cosines import Cosines
from runtime.measure.dense import OutputError
from runtime.measure.embedded import Embedding
from runtime.measure.latency import Latency, Throughput
from runtime.measure.overflow import Overflow
from runtime.measure.parity import Parity
from runtime.measure.retrieval import Retrieval
from runtime.quantization import QuantizedModule, Refinement
from runtime.records import Record

# A candidate is what the user asked about; a baseline is the float model that it came from.
Role = Literal["candidate", "baseline"]

TOP1 = "top-1"
KNN_TOP1 = "k-NN top-1"
COSINE = "cosine with fp32"
"""What models are ranked by: classifiers, embeddings of images with classes (k = 20), and outputs
that nothing but float32 tells to be right."""


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
    # As the file's metadata say; None without a refinement.
    refinement: Refinement | None = None
    # How the file compares with its artifact; None if that was not asked for.
    parity: Parity | None = None


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
        return bits_of(self.hits, self.images)


@dataclass(frozen=True)
class Agreement(Record):
    """How alike a model and the float32 model answer, on images whose classes are not known.

    agreement: share of images with the same top-1, 0 … 1.
    divergence: from the float32 model, in nats (runtime/measure/accuracy.py).
    images: how many there are.
    same: a bit for each image, set if its top-1 is the float32 model's, as `hits` of an accuracy.
    """

    agreement: float
    divergence: float
    images: int
    same: str

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether the top-1 of each image is that of the float32 model, [images]."""
        return bits_of(self.same, self.images)


@dataclass(frozen=True)
class Score:
    """The number by which a model's answers are ranked, with its 95 % interval.

    measure: what it is, in words. images: how many it was found on. right: of each image, if it is
    a share of images.
    """

    measure: str
    value: float
    low: float
    high: float
    images: int
    right: NDArray[np.bool_] | None = None

    @property
    def figure(self) -> str:
        """The number with its interval: a share in percent, a cosine as it is."""
        ends = (self.low, self.value, self.high)
        if self.right is None:
            low, value, high = (f"{end:.4f}" for end in ends)
            return f"{self.measure} {value} ({low}–{high})"
        low, value, high = (f"{100 * end:.1f}" for end in ends)
        return f"{self.measure} {value} % ({low}–{high})"


@dataclass(frozen=True)
class NotFinite(Record):
    """Outputs that are NaN or infinite. They answer nothing, so the model has no accuracy.

    images: how many have such outputs.
    first: the operator that overflows; None if the file in float32 shows none.
    """

    images: int
    first: Overflow | None

    @property
    def sentence(self) -> str:
        """How many images, and why."""
        cause = "" if self.first is None else f": {self.first.sentence}"
        return f"gives NaN or infinite outputs for {self.images:,} images{cause}"


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
    # As the file's metadata say; None without a refinement.
    refinement: Refinement | None
    # None if it was not asked for.
    parity: Parity | None
    # None if the classes of the images are not known, for a model without classes, and if its
    # outputs are not finite.
    accuracy: ComparedAccuracy | None
    # In place of the accuracy, if the classes of the images are not known.
    agreement: Agreement | None
    # In place of both, for a model that gives embeddings.
    embedding: Embedding | None
    # How far other outputs than the logits or the embedding are from those of float32; empty
    # without the float32 model, and for the float32 model itself.
    outputs: tuple[OutputError, ...]
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
        """What the model loses against the baseline, in top-1 or in that of k-NN; None if that is
        not known."""
        if self.accuracy is not None:
            return self.accuracy.against
        return None if self._retrieval is None else self._retrieval.knn20.against

    @property
    def score(self) -> Score | None:
        """The number by which the model is ranked: the strongest that is known of its answers."""
        if self.accuracy is not None:
            top1 = self.accuracy
            ends = (top1.top1_low, top1.top1_high)
            return Score(TOP1, top1.top1, *ends, top1.images, top1.right)
        if self._retrieval is not None:
            knn = self._retrieval.knn20
            return Score(KNN_TOP1, knn.share, knn.low, knn.high, knn.queries, knn.right)
        if self.agreement is not None:
            same = self.agreement
            ends = wilson_interval(int(same.right.sum()), same.images)
            return Score("same class as fp32", same.agreement, *ends, same.images, same.right)
        if not self.cosines:
            return None
        # A chain is as strong as its weakest link.
        least = min(self.cosines.values(), key=lambda found: found.cosine)
        ends = (least.cosine_low, least.cosine_high)
        return Score(COSINE, least.cosine, *ends, least.images)

    @property
    def cosines(self) -> dict[str, Cosines]:
        """How near each output that is no logits is to that of float32, by what it is called."""
        alike = None if self.embedding is None else self.embedding.likeness
        embedding = {} if alike is None else {"embedding": alike}
        return {**embedding, **{row.output: row for row in self.outputs}}

    @property
    def _retrieval(self) -> Retrieval | None:
        return None if self.embedding is None else self.embedding.retrieval

    @property
    def is_candidate(self) -> bool:
        """Whether this is a model that the user asked about."""
        return self.role == "candidate"


def reference_of(models: Iterable[MeasuredModel]) -> MeasuredModel | None:
    """The baseline that candidates are set beside: fp32 if it was measured, else fp16."""
    baselines = {model.flavor: model for model in models if not model.is_candidate}
    return baselines.get("fp32") or baselines.get("fp16")
