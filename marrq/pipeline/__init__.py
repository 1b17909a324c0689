"""The loop over the blocks of a model."""
