"""Accuracy, latency, memory and parity of ONNX files."""
