"""marrq turns a pretrained vision transformer into a 2-, 3- or 4-bit ONNX file that is small, fast
and accurate, and proves it.

The library reads as a pipeline: `models` and `data` load, `pipeline` quantizes block by block with
one of the `methods`, `artifact` stores the integer codes, the package `exporters` writes graphs
from them, and the package `runtime` measures those graphs."""

__version__ = "0.1.0"
