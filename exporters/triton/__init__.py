"""A model repository for Triton Inference Server.

serving.py           what a user chooses about the server; loads neither torch nor protobuf
config.py            the server's ModelConfig, from the ONNX file and these choices
card.py              a page for clients beside the model
repository.py        a version is made outside the repository and put in its place in one step
python_backend.py    the file model.py of Triton's python backend
"""
