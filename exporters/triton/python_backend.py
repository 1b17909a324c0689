"""The model of Triton's python backend: it runs the ONNX file beside it with onnxruntime.

For servers without the onnxruntime backend. `marrq export --format triton --backend python` copies
this file into the repository as model.py; it needs numpy and onnxruntime there, and nothing else.
All requests that the server hands over at once are one run, as in the onnxruntime backend.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

PROVIDERS = {"CPU": "CPUExecutionProvider", "GPU": "CUDAExecutionProvider"}


class TritonPythonModel:
    """One instance of the model. The names of class and methods are the backend's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the ONNX file.

        args: `model_config` as JSON, folder and version of the model, kind and number of the
        device. Raises what onnxruntime raises for a file that it cannot load, and RuntimeError if
        the provider is not available; the server then does not serve the model.
        """
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        # An absent parameter is ONNX Runtime's default: a thread for each core.
        threads = config["parameters"].get("intra_op_thread_count")
        if threads is not None:
            options.intra_op_num_threads = int(threads["string_value"])
        file = (
            Path(args["model_repository"])
            / args["model_version"]
            / config["parameters"]["onnx_file"]["string_value"]
        )
        provider = PROVIDERS[args["model_instance_kind"]]
        device = (
            [{"device_id": args["model_instance_device_id"]}]
            if provider == "CUDAExecutionProvider"
            else [{}]
        )
        self.session = onnxruntime.InferenceSession(
            file, options, providers=[provider], provider_options=device
        )
        # onnxruntime falls back to the CPU by itself, only with a warning.
        if self.session.get_providers()[0] != provider:
            had = ", ".join(onnxruntime.get_available_providers())
            raise RuntimeError(
                f"{provider} is not available, onnxruntime has {had}: for a GPU install "
                "onnxruntime-gpu in its place"
            )
        self.input = self.session.get_inputs()[0].name
        self.outputs = [output.name for output in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request. The server has checked shapes and types by its config."""
        inputs = [
            triton.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests
        ]
        # One run for all requests: of each output [images of all requests, …]
        results = self.session.run(self.outputs, {self.input: np.concatenate(inputs)})
        # Cut the batch [images, …] of each output into the requests' parts again.
        ends = np.cumsum([len(images) for images in inputs])
        parts = zip(*(np.split(result, ends[:-1]) for result in results), strict=True)
        return [
            # The server leaves out what a request does not ask for.
            triton.InferenceResponse(list(map(triton.Tensor, self.outputs, of_request)))
            for of_request in parts
        ]
