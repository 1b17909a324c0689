"""A bench report (schema marrq.bench/2) that has every section, and the same report without the
sections that need not be there."""

from dataclasses import replace
from typing import Any

from runtime.audit.precision import FloatPart, Precision
from runtime.audit.rows import AuditRow
from runtime.gpu import Gpu
from runtime.measure.accuracy import BaselineDrop
from runtime.measure.bench import BenchEnvironment, BenchReport
from runtime.measure.dense import OutputError
from runtime.measure.embedded import Embedding
from runtime.measure.embeddings import Likeness
from runtime.measure.gate import Gate, Verdict
from runtime.measure.images import ImageData
from runtime.measure.latency import Throughput
from runtime.measure.measured import (
    ComparedAccuracy,
    ComparedLatency,
    MeasuredModel,
    NotFinite,
)
from runtime.measure.overflow import Overflow
from runtime.measure.parity import Closeness, LinearError, Parity, Stage
from runtime.measure.recommend import Recommendation
from runtime.measure.retrieval import MeanDrop, MeanPrecision, QueryShare, Retrieval
from runtime.quantization import QuantizedModule


def module(
    path: str, alpha: float | None, relative_error: float, **changes: Any
) -> QuantizedModule:
    """An entry of quantization.json. changes: keys with other values than most modules have."""
    steps = [
        {"half": half, "alpha": alpha * part, "error": 9.5 - part}
        for half in (1, 0)
        for part in (0.5, 1.0)
        if alpha is not None
    ]
    entry = {
        "path": path,
        "num_bits": 4,
        "error": 1234.5 * relative_error,
        "relative_error": relative_error,
        "mse": relative_error / 7,
        "alpha": alpha,
        "trajectory": steps,
        "damping": 0.01,
        "lowrank_damping": None,
        "clipped": 0.034,
        "fallback": None,
        "writes_stream": path.endswith(("proj", "fc2")),
        "equalized": False,
    }
    return QuantizedModule.read({**entry, **changes})


def latency(
    batch: int, p50: float, p90: float, p99: float, rate: float, fp16: float, fp32: float
) -> ComparedLatency:
    """Times of one forward, images per second, and ratios."""
    return ComparedLatency(batch, p50, p90, p99, rate, (p50, p50), fp16, fp32)


QUANTIZATION = (
    module("blocks.0.attn.qkv", 0.99, 8.51e-05),
    module("blocks.0.attn.proj", 0.81, 2.05e-04),
    module("blocks.0.mlp.fc1", 0.74, 1.45e-04),
    module(
        "blocks.0.mlp.fc2",
        None,
        1.21e-03,
        fallback="the Hessian had no factor at this damping: rounded to nearest",
        damping=0.1,
    ),
    module("blocks.1.attn.qkv", 0.43, 1.77e-04),
    module("blocks.1.attn.proj", 0.31, 1.76e-03),
    module("blocks.1.mlp.fc1", 0.37, 2.71e-04),
    module("blocks.1.mlp.fc2", 0.28, 8.67e-03, clipped=0.057),
)
LINEARS = [one.path for one in QUANTIZATION]
TRANSPOSED = "Gemm with transB has no integer kernel: export it again, marrq writes MatMul"


def float_row(path: str) -> AuditRow:
    return AuditRow(path, "float", "MatMul", 1, "float32", "float32", False, None, None)


def integer_row(path: str) -> AuditRow:
    """All linears of the candidate run in integers but one."""
    if path == "blocks.1.mlp.fc1":
        return AuditRow(path, "W4A8", "Gemm", 1, "float32", "float32", False, TRANSPOSED, None)
    return AuditRow(path, "W4A8", "MatMulIntegerToFloat", 1, "int4", "uint8", True, None, None)


def accuracy(
    top1: tuple[float, float, float],
    top5: tuple[float, float, float],
    agreement: float,
    divergence: float,
    against: BaselineDrop | None,
) -> ComparedAccuracy:
    """top1, top5: low end, share and high end."""
    return ComparedAccuracy(
        top1=top1[1],
        top1_low=top1[0],
        top1_high=top1[2],
        top5=top5[1],
        top5_low=top5[0],
        top5_high=top5[2],
        agreement=agreement,
        divergence=divergence,
        images=1860,
        against=against,
        hits="80" * 233,
    )


FP32 = MeasuredModel(
    name="fp32",
    path="vit_sample",
    role="baseline",
    flavor="fp32",
    device="gpu",
    scheme="fp32",
    method="none",
    size_bytes=87_020_000,
    bits_per_weight=32.0,
    quantization=None,
    refinement=None,
    parity=None,
    accuracy=accuracy((0.5323, 0.555, 0.5774), (0.7698, 0.789, 0.807), 1.0, 0.001, None),
    agreement=None,
    embedding=None,
    outputs=(),
    not_finite=None,
    latency=(
        latency(1, 15.9, 16.8, 19.1, 62.9, 0.9, 1.0),
        latency(8, 98.83, 101.6, 107.5, 80.9, 0.93, 1.0),
    ),
    load_ms=61.4,
    peak_memory_mb=215.3,
    peak_gpu_memory_mb=None,
    throughput=(Throughput(8, 1, 41.7), Throughput(8, 2, 80.9)),
    executed={"MatMul": 9, "LayerNormalization": 5},
    executed_on={"CPUExecutionProvider": 14},
    audit=tuple(map(float_row, LINEARS)),
    precision=Precision("fp32", 32, 32, 32, 32, 32, 32.0, ()),
)
FP16 = replace(
    FP32,
    name="fp16",
    flavor="fp16",
    scheme="fp16",
    size_bytes=43_920_000,
    bits_per_weight=16.0,
    accuracy=replace(FP32.accuracy, agreement=0.998),
    latency=(
        latency(1, 17.7, 18.9, 21.3, 56.5, 1.0, 1.11),
        latency(8, 106.77, 110.4, 118.2, 74.9, 1.0, 1.08),
    ),
    load_ms=95.2,
    peak_memory_mb=260.8,
    precision=Precision("fp16", 16, 16, 32, 32, 16, 16.0, ()),
)
STAGES = (
    Stage("quantization", "float torch", "simulated torch",
          0.91342, 0.98517, 0.837, 0.551, 0.539, "87 images are right in float only"),
    Stage("export", "simulated torch", "ONNX Runtime", 0.98491, 0.99438, 0.937, 0.539, 0.536, None),
    Stage("preprocessing", "ONNX Runtime", "ONNX Runtime, the file’s preprocessing",
          0.99999, 1.0, 0.997, 0.536, 0.533, None),
)  # fmt: skip
W4A8 = MeasuredModel(
    name="W4A8 marr-stream",
    path="artifact",
    role="candidate",
    flavor="integer",
    device="cpu",
    scheme="W4A8",
    method="marr-stream",
    size_bytes=12_580_000,
    bits_per_weight=4.08,
    quantization=QUANTIZATION,
    refinement=None,
    parity=Parity(
        images=300,
        stages=STAGES,
        first_loss="quantization",
        nudged=Closeness(0.99991, 0.99999, 1.0),
        pixel_difference=1e-7,
        linears=tuple(
            LinearError(path, 1.13e-6 * (place + 1)) for place, path in enumerate(LINEARS)
        ),
    ),
    accuracy=accuracy(
        (0.5193, 0.542, 0.5643),
        (0.7616, 0.781, 0.7992),
        0.834,
        0.1375,
        BaselineDrop(0.013, 0.0021, 0.0239, 87, 63, 0.0602, "fp32"),
    ),
    agreement=None,
    embedding=None,
    outputs=(),
    not_finite=None,
    latency=(
        latency(1, 7.34, 7.92, 9.45, 136.2, 0.41, 0.46),
        latency(8, 41.72, 43.15, 46.38, 191.8, 0.39, 0.42),
    ),
    load_ms=33.8,
    peak_memory_mb=118.6,
    peak_gpu_memory_mb=731.0,
    throughput=(Throughput(8, 1, 101.4), Throughput(8, 2, 191.9)),
    executed={
        "MatMulIntegerToFloat": 11,
        "QuantizeLinear": 8,
        "LayerNormalization": 5,
        "Attention": 2,
    },
    executed_on={"CPUExecutionProvider": 26},
    audit=tuple(map(integer_row, LINEARS)),
    precision=Precision(
        nominal="W4A8",
        weight_bits=4,
        activation_bits=8,
        kernel_weight_bits=8,
        kernel_activation_bits=8,
        container_bits=4,
        bits_per_weight=4.08,
        float_remainder=(
            FloatPart("patch embedding", "Conv", 1, "the scheme leaves it in float"),
            FloatPart(
                "products of attention",
                "Attention",
                2,
                "activations on both sides, no weight to quantize",
            ),
        ),
    ),
)
UNDECIDED = "undecided: W4A8 marr-stream loses 1.3 points (0.2…2.4): about 4,700 images would tell"
REPORT = BenchReport(
    environment=BenchEnvironment(
        processor="Sample Processor 9000",
        processor_flags=("avx2", "avx512f", "avx512_vnni"),
        cores=2,
        system="Linux-6.1-x86_64",
        python="3.11.7",
        onnxruntime="1.31.1",
        packages={"numpy": "2.3.1", "onnx": "1.20.0"},
        provider="cpu",
        providers_available=("CPUExecutionProvider",),
        threads=None,
        allow_spinning=True,
        graph_optimization="all",
        rounds=5,
        seconds=1.5,
        cuda_graph=True,
        gpu=Gpu("Sample GPU", "580.1", 85521.0, "P0", 1980.0, 1980.0, 2619.0, False),
    ),
    data=ImageData("photos", 1860, "a1ec9625ac6d"),
    gallery=None,
    models=(FP16, FP32, W4A8),
    gate=Gate(
        2.0,
        None,
        "fp32",
        (Verdict("W4A8 marr-stream", "max_drop", "undecided", "interval", UNDECIDED, 4700),),
    ),
    recommendation={
        criterion: Recommendation("W4A8 marr-stream", "integer", value, sentence)
        for criterion, value, sentence in (
            ("size", 12_580_000, "smallest: W4A8 marr-stream, 12.58 MB, the only candidate"),
            ("latency", 7.34, "fastest: W4A8 marr-stream, 7.34 ms at batch 1, the only candidate"),
            (
                "accuracy",
                0.542,
                "most accurate: W4A8 marr-stream, top-1 54.2 %, the only candidate",
            ),
        )
    },
    warnings=("W4A8 marr-stream was made for the cpu",),
)
BARE_MODEL = replace(
    W4A8,
    parity=None,
    quantization=None,
    refinement=None,
    throughput=(),
    accuracy=replace(W4A8.accuracy, against=None, agreement=None, divergence=None),
    latency=tuple(replace(row, ratio_fp16=None, ratio_fp32=None) for row in W4A8.latency),
)
BARE_REPORT = replace(REPORT, models=(BARE_MODEL,), gate=None, recommendation=None, warnings=())
"""Nothing that has to be asked for, and no baseline to compare with."""


def query_share(low: float, share: float, high: float, lost: float | None) -> QueryShare:
    """lost: against fp32; None of fp32 itself."""
    against = None
    if lost is not None:
        ends = (lost - 0.011, lost + 0.011)
        against = BaselineDrop(lost, *ends, 87, 63, 0.0602, "fp32")
    return QueryShare(share, low, high, 1860, against, "80" * 233)


def embedding(cosine: float, share: float, lost: float | None) -> Embedding:
    """cosine: mean with fp32. share: of all that is found. lost: against fp32."""
    found = query_share(share - 0.02, share, share + 0.02, lost)
    drop = None if lost is None else MeanDrop("fp32", lost, lost - 0.004, lost + 0.004)
    ends = (cosine - 0.0004, min(1.0, cosine + 0.0004), cosine - 0.1, 1860)
    return Embedding(
        Likeness(cosine, *ends, cosine - 0.02, 0.83, 0.82, 0.84, 0.0371),
        Retrieval(
            3720, False, 99, found, found, found,
            MeanPrecision(share, share - 0.01, share + 0.01, 1850, drop),
        ),
    )  # fmt: skip


EMBEDDER = replace(
    W4A8, accuracy=None, embedding=embedding(0.9876, 0.542, 0.013), parity=None, quantization=None
)
"""A model that gives embeddings."""

FP32_EMBEDDER = replace(FP32, accuracy=None, embedding=embedding(1.0, 0.555, None))
EMBEDDER_REPORT = replace(
    REPORT,
    models=(FP32_EMBEDDER, EMBEDDER),
    gallery=ImageData("photos", 3720, "4f2c"),
    gate=None,
    recommendation=None,
    warnings=(),
)
"""A bench of embeddings of images with classes."""

TOKENS = OutputError(0.9912, 0.9908, 0.9916, 0.9571, 1860, "tokens", 0.1312, None)
MASKS = OutputError(0.9712, 0.9701, 0.9723, 0.9113, 1860, "masks", 0.2312, 0.934)
DENSE = replace(W4A8, accuracy=None, outputs=(TOKENS, MASKS), parity=None, quantization=None)
"""A model with two dense outputs."""

BROKEN = NotFinite(17, Overflow("blocks.0.mlp.fc2", "MatMul", 9.1e7, 65504.0))
"""Logits that are not finite, and why."""


def without_accuracy(model: MeasuredModel) -> MeasuredModel:
    """The model as it would be if it overflowed."""
    return replace(model, accuracy=None, not_finite=BROKEN)
