"""Changes of the weights that keep a model's function and make its tensors easier to quantize."""
