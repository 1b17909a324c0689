"""Part of marrq: from a graph to numbers. Runs ONNX files under ONNX Runtime and reports accuracy,
latency and what really ran; it knows neither torch nor how a graph was made."""
