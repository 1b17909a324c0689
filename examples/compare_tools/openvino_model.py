"""A model under OpenVINO in the shape of runtime.session.Model."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from runtime.session import SessionSettings


class OpenVINOModel:
    """One open file, compiled for a batch size when that size first comes: OpenVINO is fastest with
    fixed shapes.

    precision: of operations that are not quantized: f32, as in ONNX Runtime, or bf16, which
    OpenVINO would choose by itself on processors that have it.
    """

    def __init__(self, path: Path, settings: SessionSettings, precision: str) -> None:
        self.core, self.path = ov.Core(), path
        threads = {} if settings.threads is None else {"INFERENCE_NUM_THREADS": settings.threads}
        self.options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            **threads,
        }
        self.requests: dict[int, ov.InferRequest] = {}

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [batch, classes] of inputs [batch, channels, height, width]."""
        if len(pixels) not in self.requests:
            model = self.core.read_model(self.path)
            model.reshape(pixels.shape)
            self.requests[len(pixels)] = self.core.compile_model(
                model, "CPU", self.options
            ).create_infer_request()
        logits: NDArray[np.float32] = self.requests[len(pixels)].infer([pixels])[0]
        return logits

    def forward(self, pixels: NDArray[np.float32]) -> Callable[[], None]:
        """A function that runs one forward, to be timed."""
        # Compiling for this batch size is not part of the time.
        self.run(pixels)
        return lambda: self.requests[len(pixels)].infer([pixels])

    def random_input(self, batch: int) -> NDArray[np.float32]:
        """Normal noise in the shape of the input."""
        shape = [
            dimension.get_length()
            for dimension in list(self.core.read_model(self.path).input().partial_shape)[1:]
        ]
        return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
