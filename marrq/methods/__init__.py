"""The quantization methods: from the statistics of a linear's inputs to its codes."""
