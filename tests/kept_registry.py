"""Let torch build its table of ONNX translations once in a process, and not for each export.

The table is the same for each export of an opset. Building it takes a third of the time that the
export of a tiny model takes.
"""

import copy
from functools import cache

from torch.onnx._internal.exporter._registration import ONNXRegistry


def keep_registry() -> None:
    """From here on, each export gets a copy of the first table of its opset."""
    built = cache(ONNXRegistry.from_torchlib)

    def kept(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(built(opset_version))
        # An export adds its own translations to these lists.
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(kept)  # type: ignore[method-assign, assignment]
