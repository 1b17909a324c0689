"""Grids of weights and activations, the packing of codes, and the quantized linear."""
