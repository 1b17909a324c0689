"""What this machine has: processor, packages, and the ONNX Runtime that is imported.

On x86 without dot products of int8, ONNX Runtime multiplies uint8 by int8 with vpmaddubsw, which
adds two products into 16 bits. 2 · 255 · 128 = 65,280 does not fit into 32,767, while
2 · 255 · 8 = 4,080 of 4-bit weights does. ONNX Runtime's own advice is `reduce_range`, 7-bit
weights; the session option `session.x64quantprecision` has it compute slower and exactly.
"""

from dataclasses import dataclass
from types import ModuleType

from runtime.environment import (
    ONNXRUNTIME_PACKAGES,
    REINSTALL,
    Machine,
    describe_machine,
    installed_versions,
    int8_dot_products,
    onnxruntime_conflict,
)
from runtime.errors import BenchError
from runtime.gpu import FOR_CUDA, Gpu, describe_gpu
from runtime.records import Record

PACKAGES = (*ONNXRUNTIME_PACKAGES, "torch", "onnx", "timm", "transformers", "tritonclient")

CUDA = "CUDAExecutionProvider"

WITHOUT_CUDA = f"the ONNX Runtime here has no CUDA provider: {FOR_CUDA}"

SATURATES = (
    "this processor has no dot product of int8 (VNNI): ONNX Runtime adds two products of uint8 and "
    "int8 into 16 bits, which saturate with weight codes beyond -64 … 63; files that marrq writes "
    "hold none beside quantized activations, those of other tools may: for these set "
    "session.x64quantprecision to 1"
)


@dataclass(frozen=True)
class ImportedRuntime(Record):
    """The ONNX Runtime that is imported. error: why none can be; None if one can."""

    version: str | None
    providers: tuple[str, ...]
    error: str | None


@dataclass(frozen=True)
class TorchBuild(Record):
    """The torch that is installed. cuda: the version that it was built for; None without CUDA."""

    cuda: str | None
    cuda_found: bool


@dataclass(frozen=True)
class ExaminedMachine(Machine):
    """A machine as the doctor sees it."""

    # Those of DOT_PRODUCTS that the processor has.
    int8_dot_products: tuple[str, ...]
    # Installed versions, by package.
    packages: dict[str, str]
    onnxruntime: ImportedRuntime
    # None if it is not installed.
    torch: TorchBuild | None
    # As its driver describes it; None without a driver.
    gpu: Gpu | None

    @property
    def problems(self) -> list[str]:
        """What keeps every file from being loaded here."""
        # Two packages first: they are the likely cause of a module that does not import.
        faults = (onnxruntime_conflict(self.packages), self.onnxruntime.error)
        return [fault for fault in faults if fault is not None]

    @property
    def lacks_cuda(self) -> bool:
        """Whether the ONNX Runtime that is imported runs nothing on a GPU."""
        return self.onnxruntime.error is None and CUDA not in self.onnxruntime.providers

    @property
    def warnings(self) -> list[str]:
        """What may make numbers wrong here."""
        # Only x86 has the flag avx. Without any flag nothing is known, and nothing is claimed.
        is_x86 = "avx" in self.processor_flags
        return [SATURATES] if is_x86 and not self.int8_dot_products else []


def examine_machine(torch: TorchBuild | None) -> ExaminedMachine:
    """Examine the machine. torch: None if it is not installed; this package does not import it."""
    described = describe_machine()
    return ExaminedMachine(
        **vars(described),
        int8_dot_products=int8_dot_products(described.processor_flags),
        packages=installed_versions(PACKAGES),
        onnxruntime=_imported_runtime(),
        torch=torch,
        gpu=describe_gpu(),
    )


def _imported_runtime() -> ImportedRuntime:
    try:
        # A machine without ONNX Runtime is a result, not a failure of the doctor.
        session = import_session()
    except BenchError as error:
        return ImportedRuntime(None, (), str(error))
    return ImportedRuntime(session.ONNXRUNTIME_VERSION, tuple(session.available_providers()), None)


def import_session() -> ModuleType:
    """The module runtime.session, which needs ONNX Runtime. Raises BenchError if it cannot be
    imported."""
    try:
        from runtime import session
    except AttributeError as error:
        # If one of two packages was uninstalled, what is left can be an empty folder, which Python
        # imports as a module without attributes.
        raise BenchError(f"what is installed of ONNX Runtime is not whole: {REINSTALL}") from error
    return session
