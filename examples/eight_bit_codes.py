"""Which codes should 8-bit weights have? Exactness and speed of ONNX Runtime's integer products.

    python examples/eight_bit_codes.py products                # on this processor
    valgrind python examples/eight_bit_codes.py products       # as on one with AVX2 and no VNNI
    python examples/eight_bit_codes.py times
    python examples/eight_bit_codes.py answers IMAGES/val fp32.onnx full.onnx reduced.onnx

Three choices of codes are compared: signed 8 bits, signed with half the range (7 bits), and
unsigned 8 bits with zero point 128. Activations are unsigned 8 bits in all three.

`products` multiplies codes in ONNX Runtime and, in 64-bit integers, in NumPy. It counts the sums
that differ. AVX2 kernels add pairs of products in 16 bits (vpmaddubsw), which saturates.
Valgrind emulates a processor with AVX2 and without AVX-512 and VNNI.

`times` runs one linear of a ViT-S on 197 tokens with one thread: QuantizeLinear and
MatMulIntegerToFloat with bias, beside MatMul and Add in float32. All are timed in interleaved
rounds, by the least processor time of a run. A ratio is the median over rounds of the ratio within
the round.

`answers` runs whole models that marrq exported, and compares their accuracy. It is slow under
Valgrind: `--every 4` takes one image of four.

The script prints JSON. It needs onnx, onnxruntime, numpy and Pillow, and marrq for `answers`.
"""

import argparse
import itertools
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy._core._multiarray_umath import __cpu_features__ as cpu_features
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

TOKENS = 197
BATCH = 8
LEAST_RUNS = 10
LINEARS = ((384, 1536), (1536, 384))
EXACT_INPUTS = 256  # 256 · 255 · 255 < 2²⁴, so that float32 holds every sum exactly
FEATURES = ("AVX2", "AVX512F", "AVX512VNNI")
SCHEMA = "marrq.eight_bit_codes/1"


@dataclass(frozen=True)
class Codes:
    """A choice of weight codes. low and high: the smallest and largest code."""

    name: str
    dtype: type
    low: int
    high: int
    zero_point: int


CHOICES = (
    Codes("signed, 8 bits", np.int8, -128, 127, 0),
    Codes("signed, 7 bits", np.int8, -64, 63, 0),
    Codes("unsigned, 8 bits, zero point 128", np.uint8, 0, 255, 128),
)


def session(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray], input_type: int, output_type: int
) -> ort.InferenceSession:
    """A graph from `x` to `y`, open under ONNX Runtime with one thread."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", input_type, [None, None])],
        [helper.make_tensor_value_info("y", output_type, [None, None])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def integer_product(weight: NDArray, zero_point: NDArray) -> ort.InferenceSession:
    """MatMulInteger, which returns int32."""
    node = helper.make_node("MatMulInteger", ["x", "w", "x_zero", "w_zero"], ["y"])
    constants = {"w": weight, "x_zero": np.array(0, np.uint8), "w_zero": zero_point}
    return session([node], constants, TensorProto.UINT8, TensorProto.INT32)


def float_product(weight: NDArray, zero_point: NDArray) -> ort.InferenceSession:
    """MatMulIntegerToFloat with scales of 1, which returns the same sums in float32."""
    names = ["x", "w", "x_scale", "w_scale", "x_zero", "w_zero"]
    node = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
    constants = {
        "w": weight,
        "x_scale": np.array(1, np.float32),
        "w_scale": np.ones(weight.shape[1], np.float32),
        "x_zero": np.array(0, np.uint8),
        "w_zero": zero_point,
    }
    return session([node], constants, TensorProto.UINT8, TensorProto.FLOAT)


def weight_of(codes: Codes, shape: tuple[int, int], kind: str) -> NDArray:
    """Extreme codes: each the smallest or the largest; uniform codes: any of them."""
    generator = np.random.default_rng(0)
    weight = generator.integers(codes.low, codes.high + 1, shape)
    if kind == "extreme":
        weight = generator.choice([codes.low, codes.high], shape)
        weight[:, 0], weight[:, 1] = codes.low, codes.high
    return weight.astype(codes.dtype)


OPERATORS = {"MatMulInteger": integer_product, "MatMulIntegerToFloat": float_product}
KINDS = ("extreme", "uniform")


def products() -> list[dict[str, Any]]:
    """A row for each choice of codes, kind of codes and operator."""
    generator = np.random.default_rng(1)
    rows = []
    for codes, kind in itertools.product(CHOICES, KINDS):
        x = generator.integers(0, 256, (TOKENS, EXACT_INPUTS)).astype(np.uint8)
        if kind == "extreme":
            x = generator.choice([0, 255], x.shape).astype(np.uint8)
            x[0] = 255
        weight = weight_of(codes, (EXACT_INPUTS, 1536), kind)
        zero_point = np.full(weight.shape[1], codes.zero_point, codes.dtype)
        expected = x.astype(np.int64) @ (weight.astype(np.int64) - codes.zero_point)
        for operator, open_graph in OPERATORS.items():
            found = open_graph(weight, zero_point).run(None, {"x": x})[0].astype(np.int64)
            row = {"codes": codes.name, "kind": kind, "operator": operator}
            row |= {"sums": expected.size, "wrong": int((found != expected).sum())}
            row |= {"largest_error": int(np.abs(found - expected).max())}
            rows.append({**row, "largest_sum": int(np.abs(expected).max())})
    return rows


def float_linear(inputs: int, outputs: int) -> ort.InferenceSession:
    """MatMul and Add in float32."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "bias"], ["y"]),
    ]
    generator = np.random.default_rng(0)
    constants = {
        "w": generator.standard_normal((inputs, outputs), np.float32),
        "bias": generator.standard_normal(outputs, np.float32),
    }
    return session(nodes, constants, TensorProto.FLOAT, TensorProto.FLOAT)


def integer_linear(codes: Codes, inputs: int, outputs: int) -> ort.InferenceSession:
    """QuantizeLinear, then MatMulIntegerToFloat with bias: a linear as marrq's files have it."""
    names = ["codes", "w", "x_scale", "w_scale", "x_zero", "w_zero", "bias"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["codes"]),
        helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft"),
    ]
    generator = np.random.default_rng(0)
    constants = {
        "w": weight_of(codes, (inputs, outputs), "uniform"),
        "x_scale": np.array(8 / 255, np.float32),
        "w_scale": np.full(outputs, 1e-3, np.float32),
        "x_zero": np.array(128, np.uint8),
        "w_zero": np.full(outputs, codes.zero_point, codes.dtype),
        "bias": generator.standard_normal(outputs, np.float32),
    }
    return session(nodes, constants, TensorProto.FLOAT, TensorProto.FLOAT)


def least_ms(graph: ort.InferenceSession, x: NDArray, seconds: float) -> float:
    """The least processor time of one run: other work on the machine does not count in it."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        start = time.thread_time()
        graph.run(None, {"x": x})
        times.append(1e3 * (time.thread_time() - start))
    return min(times)


def times(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each linear and choice of codes, float32 first."""
    rows = []
    for inputs, outputs in LINEARS:
        x = np.random.default_rng(1).standard_normal((TOKENS, inputs), np.float32)
        graphs = {"float32": float_linear(inputs, outputs)}
        graphs |= {codes.name: integer_linear(codes, inputs, outputs) for codes in CHOICES}
        measured: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, graph in graphs.items():
                measured[name].append(least_ms(graph, x, seconds))
        for name, by_round in measured.items():
            ratios = np.divide(by_round, measured["float32"])
            row = {"codes": name, "inputs": inputs, "outputs": outputs}
            row |= {"ms": float(np.median(by_round)), "ratio": float(np.median(ratios))}
            row |= {"least_ratio": float(ratios.min()), "largest_ratio": float(ratios.max())}
            rows.append(row)
    return rows


def answers(files: list[Path], data: Path, every: int) -> list[dict[str, Any]]:
    """A row for each file: its accuracy on each `every`-th image of a folder root/class/image.

    The first file is what the others diverge from and are paired with (`against`). Each is also
    paired with the file before it (`beside`).
    """
    from runtime.measure.accuracy import hits, measure_accuracy, paired_drop
    from runtime.preprocessing import ServedPreprocessing

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    models = [
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for file in files
    ]
    metadata = models[0].get_modelmeta().custom_metadata_map
    preprocess = ServedPreprocessing.read(metadata["marrq.preprocessing"])
    labels = json.loads(metadata["marrq.labels"])
    images = sorted(data.glob("*/*"))[::every]
    targets = np.array([labels.index(image.parent.name) for image in images])
    logits: list[list[NDArray]] = [[] for _ in models]
    for start in range(0, len(images), BATCH):
        pixels = np.stack([preprocess(Image.open(file)) for file in images[start : start + BATCH]])
        for model, parts in zip(models, logits, strict=True):
            parts.append(model.run(None, {model.get_inputs()[0].name: pixels})[0])
    outputs = [np.concatenate(parts) for parts in logits]
    right = [hits(output, targets) for output in outputs]
    rows = []
    for place, (file, output) in enumerate(zip(files, outputs, strict=True)):
        accuracy = asdict(measure_accuracy(output, targets, outputs[0]))
        accuracy["against"] = asdict(paired_drop(right[0], right[place])) if place else None
        beside = asdict(paired_drop(right[place - 1], right[place])) if place else None
        rows.append({"file": file.stem, "accuracy": accuracy, "beside": beside})
    return rows


def processor() -> str:
    """The processor's name as Linux gives it. It is that of the machine under Valgrind too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment() -> dict[str, Any]:
    """What was measured on. The features are those that the processor, or Valgrind, admits to."""
    return {
        "processor": processor(),
        "features": [feature for feature in FEATURES if cpu_features.get(feature)],
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Exactness and speed of 8-bit weight codes.")
    measures = parser.add_subparsers(dest="measure", required=True)
    measures.add_parser("products")
    timing = measures.add_parser("times")
    timing.add_argument("--rounds", type=int, default=15)
    timing.add_argument("--seconds", type=float, default=0.5, help="on each graph and round")
    answering = measures.add_parser("answers")
    answering.add_argument("images", type=Path)
    answering.add_argument("files", nargs="+", type=Path)
    answering.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    if options.measure == "products":
        rows = products()
    elif options.measure == "times":
        rows = times(options.rounds, options.seconds)
    else:
        rows = answers(options.files, options.images, options.every)
    measured = {"environment": environment(), "rows": rows}
    print(json.dumps({"schema": SCHEMA, "measure": options.measure, **measured}, indent=2))


if __name__ == "__main__":
    main()
