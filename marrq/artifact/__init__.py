"""The artifact: a quantized model as a folder, and the checkpoint of an unfinished run."""
