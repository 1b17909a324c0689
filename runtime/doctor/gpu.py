"""Which nodes of a file ONNX Runtime would run on the CPU although a GPU was asked for: those for
which its CUDA provider has no kernel (runtime/audit/cuda_operators.py).

The file is looked at as it is written, so no GPU is needed. Nodes that compute constants are folded
when the file is loaded, and arithmetic on shapes belongs on the CPU: neither counts. `marrq bench
--device gpu` looks at the nodes that really ran.
"""

from collections import Counter

import onnx

from runtime.audit.cuda_operators import has_kernel
from runtime.audit.graph import Graph

EXPANDED = ("CastLike", "CenterCropPad", "GroupNormalization", "Mish")
"""For these ONNX Runtime has no kernel on any device: it writes others in their place when it loads
a file."""


def without_cuda_kernel(graph: Graph) -> dict[str, int]:
    """How many nodes of each operator have no CUDA kernel, the most frequent first."""
    opset = next((one.version for one in graph.model.opset_import if not one.domain), 1)
    counts = Counter(
        node.op_type
        for node in graph.depending_on_images
        if not _may_have_kernel(graph, node, opset)
    )
    return dict(counts.most_common())


def _may_have_kernel(graph: Graph, node: onnx.NodeProto, opset: int) -> bool:
    if node.op_type in EXPANDED:
        return True
    # An optional input that is left out still has a place.
    types = [graph.type_of(name) if name else "" for name in node.input]
    # An operator that the opset does not have is one of ONNX Runtime's CPU provider.
    try:
        return has_kernel(node, opset, types)
    except onnx.defs.SchemaError:
        return False
