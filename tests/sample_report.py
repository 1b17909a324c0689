"""A bench report (schema marrq.bench/2) that has every section, and the same one without those that
need not be there."""

import copy
from typing import Any


def _module(
    path: str, alpha: float | None, relative_error: float, **changes: Any
) -> dict[str, Any]:
    steps = (
        []
        if alpha is None
        else [
            {"half": half, "alpha": alpha * part, "error": 9.5 - part}
            for half in (1, 0)
            for part in (0.5, 1.0)
        ]
    )
    numbers = {
        "error": 1234.5 * relative_error,
        "relative_error": relative_error,
        "mse": relative_error / 7,
        "alpha": alpha,
    }
    record = {
        "path": path,
        **numbers,
        "trajectory": steps,
        "damping": 0.01,
        "lowrank_damping": None,
        "clipped": 0.034,
        "fallback": None,
    }
    return {
        **record,
        "writes_stream": path.endswith(("proj", "fc2")),
        "equalized": False,
        **changes,
    }


def _latency(*rows: tuple[int, float, float, float, float, float, float]) -> list[dict[str, float]]:
    return [
        dict(
            zip(
                ("batch", "p50_ms", "p90_ms", "p99_ms", "images_per_s", "ratio_fp16", "ratio_fp32"),
                row,
                strict=True,
            )
        )
        for row in rows
    ]


QUANTIZATION = [
    _module("blocks.0.attn.qkv", 0.99, 8.51e-05),
    _module("blocks.0.attn.proj", 0.81, 2.05e-04),
    _module("blocks.0.mlp.fc1", 0.74, 1.45e-04),
    _module(
        "blocks.0.mlp.fc2",
        None,
        1.21e-03,
        fallback="the Hessian had no factor at this damping: rounded to nearest",
        damping=0.1,
    ),
    _module("blocks.1.attn.qkv", 0.43, 1.77e-04),
    _module("blocks.1.attn.proj", 0.31, 1.76e-03),
    _module("blocks.1.mlp.fc1", 0.37, 2.71e-04),
    _module("blocks.1.mlp.fc2", 0.28, 8.67e-03, clipped=0.057),
]
LINEARS = [module["path"] for module in QUANTIZATION]
FULL = {
    "weight": "float32",
    "activation": "float32",
    "integer": False,
    "reason": None,
    "operator": "MatMul",
}
WHOLE = {
    "operator": "MatMulIntegerToFloat",
    "weight": "int4",
    "activation": "uint8",
    "integer": True,
    "reason": None,
}
TRANSPOSED = {
    "operator": "Gemm",
    "weight": "float32",
    "activation": "float32",
    "integer": False,
    "reason": "Gemm with transB has no integer kernel: export it again, marrq writes MatMul",
}


def _float_model(
    flavor: str, bits: int, size_bytes: int, latency: list[dict[str, float]], agreement: float
) -> dict[str, Any]:
    shares = {
        "top1": 0.555,
        "top1_low": 0.5323,
        "top1_high": 0.5774,
        "top5": 0.789,
        "top5_low": 0.7698,
        "top5_high": 0.807,
    }
    return {
        "name": flavor,
        "path": "vit_sample",
        "role": "baseline",
        "flavor": flavor,
        "scheme": flavor,
        "method": None,
        "size_bytes": size_bytes,
        "bits_per_weight": float(bits),
        "accuracy": {
            **shares,
            "agreement": agreement,
            "divergence": 0.001,
            "images": 1860,
            "against": None,
        },
        "latency": latency,
        "load_ms": 61.4 if flavor == "fp32" else 95.2,
        "peak_memory_mb": 215.3 if flavor == "fp32" else 260.8,
        "throughput": [
            {"batch": 8, "threads": 1, "images_per_s": 41.7},
            {"batch": 8, "threads": 2, "images_per_s": 80.9},
        ],
        "executed": {"MatMul": 9, "LayerNormalization": 5},
        "audit": [{"linear": path, **FULL} for path in LINEARS],
        "precision": {
            "nominal": flavor,
            "weight_bits": bits,
            "activation_bits": bits,
            "kernel_weight_bits": 32,
            "kernel_activation_bits": 32,
            "container_bits": bits,
            "bits_per_weight": float(bits),
            "float_remainder": [],
        },
        "parity": None,
        "quantization": None,
    }


FP16 = _float_model(
    "fp16",
    16,
    43_920_000,
    _latency((1, 17.7, 18.9, 21.3, 56.5, 1.0, 1.11), (8, 106.77, 110.4, 118.2, 74.9, 1.0, 1.08)),
    0.998,
)
FP32 = _float_model(
    "fp32",
    32,
    87_020_000,
    _latency((1, 15.9, 16.8, 19.1, 62.9, 0.9, 1.0), (8, 98.83, 101.6, 107.5, 80.9, 0.93, 1.0)),
    1.0,
)
W4A8 = {
    "name": "W4A8 marr-stream",
    "path": "artifact",
    "role": "candidate",
    "flavor": "integer",
    "scheme": "W4A8",
    "method": "marr-stream",
    "size_bytes": 12_580_000,
    "bits_per_weight": 4.08,
    "accuracy": {
        "top1": 0.542,
        "top1_low": 0.5193,
        "top1_high": 0.5643,
        "top5": 0.781,
        "top5_low": 0.7616,
        "top5_high": 0.7992,
        "agreement": 0.834,
        "divergence": 0.1375,
        "images": 1860,
        "against": {
            "baseline": "fp32",
            "drop": 0.013,
            "drop_low": 0.0021,
            "drop_high": 0.0239,
            "only_baseline": 87,
            "only_model": 63,
            "p_value": 0.0602,
        },
    },
    "latency": _latency(
        (1, 7.34, 7.92, 9.45, 136.2, 0.41, 0.46), (8, 41.72, 43.15, 46.38, 191.8, 0.39, 0.42)
    ),
    "load_ms": 33.8,
    "peak_memory_mb": 118.6,
    "throughput": [
        {"batch": 8, "threads": 1, "images_per_s": 101.4},
        {"batch": 8, "threads": 2, "images_per_s": 191.9},
    ],
    "executed": {
        "MatMulIntegerToFloat": 11,
        "QuantizeLinear": 8,
        "LayerNormalization": 5,
        "Attention": 2,
    },
    "audit": [
        {"linear": path, **(TRANSPOSED if path == "blocks.1.mlp.fc1" else WHOLE)}
        for path in LINEARS
    ],
    "precision": {
        "nominal": "W4A8",
        "weight_bits": 4,
        "activation_bits": 8,
        "kernel_weight_bits": 8,
        "kernel_activation_bits": 8,
        "container_bits": 4,
        "bits_per_weight": 4.08,
        "float_remainder": [
            {
                "what": "patch embedding",
                "operator": "Conv",
                "count": 1,
                "why": "the scheme leaves it in float",
            },
            {
                "what": "products of attention",
                "operator": "Attention",
                "count": 2,
                "why": "activations on both sides, no weight to quantize",
            },
        ],
    },
    "parity": {
        "images": 300,
        "stages": [
            {
                "stage": stage,
                "source": source,
                "target": target,
                "least_cosine": least,
                "median_cosine": median,
                "agreement": agreement,
                "top1_source": before,
                "top1_target": after,
            }
            for stage, source, target, least, median, agreement, before, after in (
                (
                    "quantization",
                    "float torch",
                    "simulated torch",
                    0.91342,
                    0.98517,
                    0.837,
                    0.551,
                    0.539,
                ),
                (
                    "export",
                    "simulated torch",
                    "ONNX Runtime",
                    0.98491,
                    0.99438,
                    0.937,
                    0.539,
                    0.536,
                ),
                (
                    "preprocessing",
                    "ONNX Runtime",
                    "ONNX Runtime, the file’s preprocessing",
                    0.99999,
                    1.0,
                    0.997,
                    0.536,
                    0.533,
                ),
            )
        ],
        "first_loss": "quantization",
        "linears": [
            {"linear": path, "relative_error": 1.13e-6 * (place + 1)}
            for place, path in enumerate(LINEARS)
        ],
    },
    "quantization": QUANTIZATION,
}
REPORT: dict[str, Any] = {
    "schema": "marrq.bench/2",
    "environment": {
        "processor": "Sample Processor 9000",
        "processor_flags": ["avx2", "avx512f", "avx512_vnni"],
        "cores": 2,
        "system": "Linux-6.1-x86_64",
        "python": "3.11.7",
        "onnxruntime": "1.31.1",
        "packages": {"numpy": "2.3.1", "onnx": "1.20.0"},
        "provider": "cpu",
        "providers_available": ["CPUExecutionProvider"],
        "threads": None,
        "graph_optimization": "all",
        "rounds": 5,
        "seconds": 1.5,
    },
    "data": {"path": "photos", "images": 1860, "hash": "a1ec9625ac6d"},
    "models": [FP16, FP32, W4A8],
    "gate": {
        "max_drop": 2.0,
        "baseline": "fp32",
        "models": [
            {
                "name": "W4A8 marr-stream",
                "verdict": "undecided",
                "sentence": "undecided: W4A8 marr-stream loses 1.3 points (0.2…2.4): about 4,700 images would tell",
                "images_needed": 4700,
            }
        ],
    },
    "recommendation": {
        criterion: {
            "name": "W4A8 marr-stream",
            "flavor": "integer",
            "value": value,
            "sentence": sentence,
        }
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
}


def full_report() -> dict[str, Any]:
    """Every section is there."""
    return copy.deepcopy(REPORT)


def bare_report() -> dict[str, Any]:
    """Nothing that has to be asked for, and no baseline to compare with."""
    report = full_report()
    [model] = report["models"] = report["models"][-1:]
    report["gate"] = report["recommendation"] = model["parity"] = model["quantization"] = None
    model["accuracy"]["against"] = model["accuracy"]["agreement"] = model["accuracy"][
        "divergence"
    ] = None
    model["throughput"] = []
    for row in model["latency"]:
        row["ratio_fp16"] = row["ratio_fp32"] = None
    return report
