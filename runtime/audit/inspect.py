"""The inspection of one file: the audit of its linears, and its precision. `marrq inspect` reports
both (schema marrq.inspect/1)."""

from dataclasses import dataclass
from pathlib import Path

from runtime.audit.linears import examine
from runtime.audit.precision import Precision, measure_precision
from runtime.audit.rows import AuditRow, audit
from runtime.quantization import Refinement
from runtime.records import Json, Record
from runtime.session import ONNXRUNTIME_VERSION, SessionSettings

SCHEMA = "marrq.inspect/1"


@dataclass(frozen=True)
class Inspection(Record):
    """What really runs a file. onnxruntime: the version that ran it; provider, graph_optimization:
    of the session. refinement: as the file's metadata say; None without one."""

    path: str
    size_bytes: int
    onnxruntime: str
    provider: str
    graph_optimization: str
    refinement: Refinement | None
    audit: tuple[AuditRow, ...]
    precision: Precision

    def to_json(self) -> Json:
        """Schema marrq.inspect/1."""
        return {"schema": SCHEMA, **super().to_json()}


def inspect_file(file: Path, settings: SessionSettings) -> Inspection:
    """Audit a file and count its bits. Raises BenchError as `examine`."""
    examined = examine(file, settings)
    return Inspection(
        path=str(file),
        size_bytes=examined.size_bytes,
        onnxruntime=ONNXRUNTIME_VERSION,
        provider=settings.provider,
        graph_optimization=settings.optimization,
        refinement=examined.file.metadata.refinement,
        audit=tuple(audit(examined)),
        precision=measure_precision(examined),
    )
