"""Open an ONNX file under ONNX Runtime: with the same session options for every model that is
compared, and with no provider but the one asked for.

A provider that falls back to the CPU would be timed under a wrong name, so a fallback of the whole
session raises. Single nodes may still run on the CPU; `executed_nodes` tells which.

**CUDA graphs.** The kernels of one forward are recorded once, and started together from then on: at
small batches it is their starts that cost. A recorded kernel reads and writes the addresses that it
was recorded with. So such a session has one batch size (`SessionSettings.graph_batch`), and
`Model.forward` binds input and output to memory that stays.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BenchError
from runtime.gpu import FOR_CUDA
from runtime.metadata import Metadata, Output, output_kind

try:
    import onnxruntime as ort
except ImportError as error:
    raise BenchError(
        "ONNX Runtime is not installed: pip install '.[cpu]' in the clone of marrq, or '.[gpu]' on "
        "a machine with CUDA"
    ) from error

ONNXRUNTIME_VERSION: str = ort.__version__

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Providers that compile engines of their own: ONNX Runtime cannot tell what is in them.
WHOLE_GRAPH_PROVIDERS = ("tensorrt",)

# In ONNX Runtime's error for a file that is no protobuf, and for an empty file.
BROKEN_FILE = ("INVALID_PROTOBUF", "No graph was found in the protobuf")

# Levels of graph optimization; none and basic fuse no Q/DQ.
OPTIMIZATIONS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

# Ends the name of a node's event in a profile.
KERNEL = "_kernel_time"

# Session options under which the optimized graph is written to disk.
WRITE_OPTIMIZED = {
    # Tensors go to a file beside the graph, so that the graph stays small and below 2 GB.
    "session.optimized_model_external_initializers_file_name": "weights",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.record_ep_graph_assignment_info": "1",
    # Prepacking prepares weights for runs, and this session never runs.
    "session.disable_prepacking": "1",
}

# Device of the providers that have memory of their own.
DEVICES = {"cuda": "cuda", "tensorrt": "cuda"}

# Name of the free axis of every file of marrq.
BATCH_AXIS = "batch"

# Whether worker threads wait for work in a loop, which is ONNX Runtime's default. A spinning thread
# takes a core from every other session, so only one session at a time is timed.
ALLOW_SPINNING = True


@dataclass(frozen=True)
class SessionSettings:
    """How a file is opened.

    provider: a key of PROVIDERS.
    threads: of one operator; None for ONNX Runtime's choice, one a core.
    optimization: of the graph, a key of OPTIMIZATIONS.
    graph_batch: the batch size whose forward is recorded as a CUDA graph, with `cuda` alone; None
        to record nothing.
    """

    provider: str = "cpu"
    threads: int | None = None
    optimization: str = "all"
    graph_batch: int | None = None


def check_provider(settings: SessionSettings) -> None:
    """Raise BenchError if the provider is not there."""
    _provider(settings)


def available_providers() -> list[str]:
    """Execution providers of this ONNX Runtime, as ONNX Runtime names them."""
    found: list[str] = ort.get_available_providers()
    return found


class Model:
    """One ONNX file, open. It is closed when the last reference to it goes; until then its worker
    threads spin, and slow every other session on the machine."""

    def __init__(
        self,
        path: Path,
        settings: SessionSettings,
        profile_to: Path | None = None,
        optimized_to: Path | None = None,
    ) -> None:
        """Open a file.

        profile_to: prefix of the file that `end_profiling` writes; None for no profile.
        optimized_to: where the graph is written as it is going to be executed, with its larger
        tensors in a file beside it; None for nowhere.

        Raises BenchError if the file cannot be loaded, and if the provider is not there.
        """
        self._path, provider = path, _provider(settings)
        if settings.provider in DEVICES:
            _load_cuda()
        options = _options(settings, profile_to, optimized_to)
        provider_options = {"enable_cuda_graph": "1"} if _records_graphs(settings) else {}
        try:
            self.session = ort.InferenceSession(
                str(path), options, providers=[(provider, provider_options)]
            )
        except Exception as error:  # the bindings raise a class a status code, none of them public
            reason = str(error).strip().splitlines()[0]
            if any(sign in reason for sign in BROKEN_FILE):
                raise BenchError(
                    f"{str(path)!r} is no ONNX file, or not the whole of one: export or copy it "
                    "again"
                ) from error
            raise BenchError(
                f"ONNX Runtime {ONNXRUNTIME_VERSION} cannot load {str(path)!r}: {reason}"
            ) from error
        # ONNX Runtime silently takes the CPU if a provider's libraries are missing.
        if self.session.get_providers()[0] != provider:
            raise BenchError(
                f"provider {settings.provider!r} fell back to {self.session.get_providers()[0]}: "
                "mend its installation"
            )
        if not self.session.get_inputs():
            raise BenchError(f"{str(path)!r} has no input: give a model of images")
        self.input = self.session.get_inputs()[0]
        self.device = DEVICES.get(settings.provider)
        self._graph_batch = settings.graph_batch
        if self._graph_batch not in (None, self.input.shape[0]):
            raise BenchError(
                f"{str(path)!r} has no free axis {BATCH_AXIS!r} to be fixed for a CUDA graph: "
                "export it with marrq, or leave out --cuda-graph"
            )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the file gives, in its order. A file of another tool has no labels."""
        metadata = self.metadata()
        labels = metadata.labels if metadata.is_marrqs else ()
        return tuple(
            Output(
                output.name,
                # A free axis has a name in place of a length.
                tuple(dim if isinstance(dim, int) else None for dim in output.shape[1:]),
                output_kind(output.name, len(output.shape), labels),
            )
            for output in self.session.get_outputs()
        )

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output, such as logits [batch, classes], of inputs [batch, channels, height,
        width]. Raises BenchError if a kernel fails."""
        return next(iter(self.run_all(pixels).values()))

    def run_all(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """All outputs [batch, …] by name, in the file's order. Raises BenchError as `run`."""
        found = self._checked(lambda: self.session.run(None, {self.input.name: pixels}))
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, found, strict=True))

    def _checked(self, run: Callable[[], Any]) -> Any:
        """What a run gives. Raises BenchError if it fails."""
        try:
            return run()
        except Exception as error:  # as in __init__
            raise BenchError(
                f"ONNX Runtime {ONNXRUNTIME_VERSION} loads {str(self._path)!r} and fails when it "
                f"runs: {str(error).strip().splitlines()[0]}"
            ) from error

    def forward(self, pixels: NDArray[np.float32]) -> Callable[[], None]:
        """A function that runs one forward of inputs [batch, channels, height, width], and returns
        when the outputs are there.

        If the provider has memory of its own, the inputs are copied there before, and the outputs
        stay there: the function times the forward alone.
        """
        if self.device is None:

            def forward_on_host() -> None:
                self.session.run(None, {self.input.name: pixels})

            return forward_on_host
        # Inputs are on the device before the clock starts, and outputs are not copied back.
        binding = self.session.io_binding()
        binding.bind_ortvalue_input(
            self.input.name, ort.OrtValue.ortvalue_from_numpy(pixels, self.device, 0)
        )
        self._bind_outputs(binding)
        binding.synchronize_inputs()
        # The first run records a CUDA graph, and tells of a kernel that fails.
        self._checked(lambda: self.session.run_with_iobinding(binding))

        def forward_on_device() -> None:
            self.session.run_with_iobinding(binding)
            # A kernel is only queued when `run` returns.
            binding.synchronize_outputs()

        return forward_on_device

    def _bind_outputs(self, binding: ort.IOBinding) -> None:
        """Have the outputs stay on the device: in memory that ONNX Runtime takes for each run, or
        for a CUDA graph in memory that stays."""
        for output in self.session.get_outputs():
            if self._graph_batch is None:
                binding.bind_output(output.name, self.device, 0)
                continue
            # A free axis has a name in place of a length, and the batch is the only one.
            shape = [self._graph_batch if isinstance(axis, str) else axis for axis in output.shape]
            binding.bind_ortvalue_output(
                output.name,
                ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.device, 0),
            )

    def random_input(self, batch: int) -> NDArray[np.float32]:
        """Normal noise in the shape of the input."""
        # A fixed seed: the same values for all models; zeros could be faster than images.
        return np.random.default_rng(0).standard_normal(
            (batch, *self.input.shape[1:]), dtype=np.float32
        )

    def metadata(self) -> Metadata:
        """The file's own metadata."""
        return Metadata(self.session.get_modelmeta().custom_metadata_map)


@dataclass(frozen=True)
class ExecutedNode:
    """A node of the optimized graph that ran, and the execution provider that it ran on."""

    name: str
    operator: str
    provider: str


def executed_nodes(path: Path, settings: SessionSettings, scratch: Path) -> list[ExecutedNode]:
    """The nodes that really ran in one forward, from ONNX Runtime's own profile. scratch: a folder
    for the profile."""
    model = Model(path, settings, profile_to=scratch / "profile")
    # One forward is enough: every node of a vision transformer runs once.
    model.run(model.random_input(1))
    # The profile is a list of events; only nodes have an operator and a provider.
    events = json.loads(Path(model.session.end_profiling()).read_text())
    return [
        ExecutedNode(
            event["name"].removesuffix(KERNEL), event["args"]["op_name"], event["args"]["provider"]
        )
        for event in events
        # ONNX Runtime up to 1.20 records a node three times, with the fences around it.
        if event.get("cat") == "Node"
        and event["name"].endswith(KERNEL)
        and event.get("args", {}).get("provider")
    ]


def _provider(settings: SessionSettings) -> str:
    """ONNX Runtime's name of the provider. Raises BenchError if it is not available."""
    provider = PROVIDERS.get(settings.provider)
    if provider is None or provider not in available_providers():
        # Both packages of ONNX Runtime bring the CPU; only one of them brings GPUs.
        way_out = f"; {FOR_CUDA}" if settings.provider in DEVICES else ""
        raise BenchError(
            f"provider {settings.provider!r} is not available here: this ONNX Runtime has "
            f"{', '.join(available_providers())}{way_out}"
        )
    return provider


@cache
def _load_cuda() -> None:
    """Load the libraries of CUDA and cuDNN that pip has installed, which no loader looks for by
    itself. Releases of ONNX Runtime before 1.21 cannot."""
    if hasattr(ort, "preload_dlls"):
        # It prints what it does not find, and results go to stdout. If a library is really missing,
        # the session falls back, which is an error.
        with redirect_stdout(sys.stderr):
            ort.preload_dlls()


def _records_graphs(settings: SessionSettings) -> bool:
    return settings.provider == "cuda" and settings.graph_batch is not None


def _options(
    settings: SessionSettings, profile_to: Path | None, optimized_to: Path | None
) -> ort.SessionOptions:
    """The session options, the same for every model that is compared."""
    if settings.optimization not in OPTIMIZATIONS:
        raise BenchError(
            f"unknown graph optimization {settings.optimization!r}: choose one of "
            f"{', '.join(OPTIMIZATIONS)}"
        )
    options = ort.SessionOptions()
    options.graph_optimization_level = OPTIMIZATIONS[settings.optimization]
    options.log_severity_level = 3  # errors only: warnings are about the graph, not about the user
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(ALLOW_SPINNING)))
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if settings.graph_batch is not None:
        # With all shapes known nothing is left to compute them, which would run on the CPU, and
        # ONNX Runtime records no graph with a node there.
        options.add_free_dimension_override_by_name(BATCH_AXIS, settings.graph_batch)
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
        for key, value in WRITE_OPTIMIZED.items():
            options.add_session_config_entry(key, value)
    return options
