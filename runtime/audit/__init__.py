"""What really runs each linear of an ONNX file, and with how many bits."""
