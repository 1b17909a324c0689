"""Grids of weights and activations, packed codes, and the quantized linear that holds them."""
