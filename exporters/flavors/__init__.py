"""One file a flavour: how a quantized linear becomes ONNX operators."""
