"""Changes of a model that keep its function and make its tensors easier to quantize."""
