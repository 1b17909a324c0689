"""Tools that make a smaller or faster file of a float ONNX model: one function for each tool, with
the settings that its makers recommend for a CPU with VNNI.

    fp32, fp16     marrq's baselines: the model as it is, and in float16
    integer        marrq
    static         onnxruntime quantize_static: QDQ, uint8 activations, int8 weights per channel,
                   after its pre-processing
    dynamic        onnxruntime quantize_dynamic, after the same pre-processing
    matmulnbits    onnxruntime MatMulNBitsQuantizer: 4 bits, blocks of 128, accuracy level 4, which
                   computes with int8 activations
    openvino       OpenVINO, nothing quantized
    nncf           OpenVINO after NNCF's post-training quantization for transformers: int8 weights
                   and activations

All tools that calibrate see the same images.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from exporters.onnx_file import write, write_baseline
from exporters.trace import INPUT, trace_quantized
from marrq.methods.spec import parse_method
from marrq.models.load import VisionModel
from marrq.pipeline.quantize import Images, RunOptions, quantize
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.schemes import parse_scheme

# The import of MatMulNBitsQuantizer has set the level to INFO, for every package.
logging.getLogger().setLevel(logging.WARNING)

REQUIREMENTS = "examples/compare_tools/requirements.txt"


@dataclass(frozen=True)
class Source:
    """What a tool is given.

    file: the float32 graph as torch's exporter gives it. images: for calibration. scheme, method:
    for marrq alone.
    """

    model: VisionModel
    file: Path
    images: Images
    calibration: CalibrationRecord
    scheme: str
    method: str

    def inputs(self) -> Iterator[NDArray[np.float32]]:
        """The calibration images one by one: [1, channels, height, width]."""
        for index in range(len(self.images)):
            yield self.images[index : index + 1].numpy()


class _Reader(CalibrationDataReader):
    """The images as ONNX Runtime's calibration asks for them."""

    def __init__(self, source: Source) -> None:
        self.inputs = source.inputs()

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        pixels = next(self.inputs, None)
        return None if pixels is None else {INPUT: pixels}


def fp32(source: Source, folder: Path) -> Path:
    write_baseline(source.model, "fp32", folder / "fp32.onnx")
    return folder / "fp32.onnx"


def fp16(source: Source, folder: Path) -> Path:
    write_baseline(source.model, "fp16", folder / "fp16.onnx")
    return folder / "fp16.onnx"


def integer(source: Source, folder: Path) -> Path:
    # `quantize` works in place, and other tools need the float model.
    model = replace(source.model, module=copy.deepcopy(source.model.module))
    settings = QuantizationSettings(
        parse_scheme(source.scheme), parse_method(source.method), source.calibration
    )
    quantized = quantize(model, source.images, settings, RunOptions(torch.device("cpu")))
    write(trace_quantized(quantized, "none"), "integer", folder / "integer.onnx")
    return folder / "integer.onnx"


def static(source: Source, folder: Path) -> Path:
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(
        _preprocessed(source, folder),
        folder / "static.onnx",
        _Reader(source),
        per_channel=True,
        **types,
    )
    return folder / "static.onnx"


def dynamic(source: Source, folder: Path) -> Path:
    quantize_dynamic(_preprocessed(source, folder), folder / "dynamic.onnx")
    return folder / "dynamic.onnx"


def matmulnbits(source: Source, folder: Path) -> Path:
    quantizer = MatMulNBitsQuantizer(str(source.file), bits=4, block_size=128, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "matmulnbits.onnx"))
    return folder / "matmulnbits.onnx"


def openvino(source: Source, folder: Path) -> Path:
    import openvino as ov

    ov.save_model(ov.convert_model(source.file), folder / "openvino.xml", compress_to_fp16=False)
    return folder / "openvino.xml"


def nncf(source: Source, folder: Path) -> Path:
    import nncf
    import openvino as ov

    quantized = nncf.quantize(
        ov.convert_model(source.file),
        # NNCF goes through the images more than once.
        nncf.Dataset(list(source.inputs())),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(source.images),
    )
    ov.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    return folder / "nncf.xml"


TOOLS: dict[str, Callable[[Source, Path], Path]] = {
    "fp32": fp32,
    "fp16": fp16,
    "integer": integer,
    "static": static,
    "dynamic": dynamic,
    "matmulnbits": matmulnbits,
    "openvino": openvino,
    "nncf": nncf,
}
"""Each tool writes its files into a folder, and returns the file to open."""


def _preprocessed(source: Source, folder: Path) -> Path:
    """The float graph with shapes inferred and nodes fused, as ONNX Runtime asks for before it
    quantizes; made once."""
    file = folder / "preprocessed.onnx"
    if not file.exists():
        quant_pre_process(source.file, file)
    return file
