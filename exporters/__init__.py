"""Part of marrq: from a quantized model to ONNX files.

    trace.py        torch model → float graph with a placeholder for each quantized linear, once
    passes/         rewrites of that graph, in the order of passes/__init__.py
    flavors/        one file a flavour: what a placeholder becomes
    lowering/       what the flavours share
    onnx_file.py    describe, check and save
    triton/         a model repository for Triton Inference Server

`marrq.export` (marrq/workflows/export.py) is the way in.
"""
