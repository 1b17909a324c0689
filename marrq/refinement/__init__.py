"""The refinement: train a quantized model end to end. Off by default."""
