"""Which nodes ran on another execution provider than the one that was asked for.

ONNX Runtime puts a node without a CUDA kernel on the CPU, with copies around it, and says nothing.
`session.disable_cpu_ep_fallback` refuses every such node, and with it the arithmetic on shapes that
belongs on the CPU: a few integers that tell a Reshape its size. So the nodes that ran are looked at
here: a node may run on the CPU if it reads no number that was computed from an image, only sizes.
"""

from collections import Counter
from collections.abc import Sequence

from runtime.audit.graph import Graph
from runtime.audit.linears import Examined
from runtime.session import PROVIDERS, ExecutedNode


def misplaced(graph: Graph, executed: Sequence[ExecutedNode], wanted: str) -> list[ExecutedNode]:
    """The nodes that ran on another provider than `wanted` and are no arithmetic on shapes.

    graph: as it was executed. wanted: the provider as ONNX Runtime names it.
    """
    # By name, which profile and optimized graph have in common.
    elsewhere = {node.name: node for node in executed if node.provider != wanted}
    known = {node.name for node in graph.nodes}
    fed = {node.name for node in graph.depending_on_images}
    return [
        node
        for name, node in elsewhere.items()
        # A node that the graph does not know cannot be shown to be harmless.
        if name in fed or name not in known
    ]


def misplacement(examined: Examined, executed: Sequence[ExecutedNode]) -> str | None:
    """A sentence about the nodes that ran on another provider than the session's; None if there is
    none. Linears are named first, by their module paths."""
    wanted = PROVIDERS[examined.settings.provider]
    nodes = misplaced(examined.optimized, executed, wanted)
    if not nodes:
        return None
    # The kernel of a linear has the name of a node, which a user cannot look up.
    linears = {
        linear.kernel.node.name: linear.path
        for linear in examined.linears
        if linear.kernel is not None
    }
    # A linear costs most, and is what the user asked for.
    first = next((node for node in nodes if node.name in linears), nodes[0])
    what = f"the linear {linears[first.name]!r}" if first.name in linears else f"{first.name!r}"
    operators = ", ".join(
        f"{count} × {operator}"
        for operator, count in Counter(node.operator for node in nodes).most_common(5)
    )
    return (
        f"{what} ran on {first.provider} by {first.operator}, for which {wanted} has no kernel; in "
        f"all {len(nodes)} nodes did ({operators})"
    )
