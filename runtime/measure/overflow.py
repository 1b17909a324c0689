"""Which operator of a float16 file is the first to overflow.

float16 ends at 65504: a value that is larger becomes infinite, and a few operators later the logits
are NaN. What overflows is found by the file's own graph, computed in float32: its float16 tensors
and casts become float32, and the largest of each operator's numbers is held against the limit. So
the answer does not depend on which operators a processor or a GPU computes in float16.

A value that goes into a softmax and nowhere else may be as low as it likes: masks are -∞ there.
"""

import ast
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.audit.nodes import ONNXRUNTIME_DOMAIN
from runtime.records import Record
from runtime.session import Model, SessionSettings

# The largest number of float16, and of float32.
LIMIT, FLOAT32_LIMIT = 65504.0, float(np.finfo(np.float32).max)
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT

# Operators that move numbers, or choose some: what goes in was looked at before.
# fmt: off
MOVING = (
    "Constant", "Shape", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
    "Slice", "Split", "Gather", "Concat", "Expand",
)
# fmt: on
PRODUCTS = ("MatMul", "Gemm", "Conv")

Pixels = NDArray[np.float32] | NDArray[np.uint8]

# Metadata of a node that torch's exporter wrote: the modules that it belongs to, as a Python list.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Overflow(Record):
    """An operator whose numbers are too large.

    where: the module that the operator belongs to, or its name in the graph.
    operator: its type.
    largest: of its numbers, by absolute value, in float32; None if that is infinite or NaN.
    limit: what the numbers of the file can hold.
    """

    where: str
    operator: str
    largest: float | None
    limit: float

    @property
    def sentence(self) -> str:
        """What is too large where."""
        of_type = "float16" if self.limit == LIMIT else "float32"
        reached = "infinity" if self.largest is None else f"{self.largest:.3g}"
        return (
            f"{self.operator} of {self.where!r} reaches {reached}, where {of_type} ends at "
            f"{self.limit:.5g}"
        )


def first_overflow(file: Path, pixels: Pixels) -> Overflow | None:
    """The first operator, in the order of execution, that overflows for one of the images; None if
    none does. A file without float16 is held against the limit of float32.

    pixels: inputs as the file takes them, [images, …].
    """
    model = ir.external_data.load_to_model(ir.load(file))
    cut_off = _widen(model)
    limit = FLOAT32_LIMIT if cut_off is None else LIMIT
    watched = [node for node in model.graph if _is_watched(node)]
    if not watched:
        return None
    for node, (is_within, largest) in zip(
        watched, _watch(model, watched, pixels, limit), strict=True
    ):
        # A weight that was cut off at the limit is wrong, whatever it is multiplied by.
        is_cut_off = node.op_type in PRODUCTS and any(
            value is not None and value.name in (cut_off or ()) for value in node.inputs
        )
        if not is_within or is_cut_off:
            known = float(largest) if np.isfinite(largest) else None
            return Overflow(_where(node), node.op_type, known, limit)
    return None


def _widen(model: ir.Model) -> set[str] | None:
    """Make float32 of every float16 in a graph. The names of the initializers that reach the limit
    of float16; None if there was no float16."""
    has_halves, cut_off = False, set()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype == HALF:
            has_halves, array = True, value.const_value.numpy().astype(np.float32)
            value.const_value, value.dtype = ir.tensor(array), FLOAT
            # Exporters put the limit itself in the place of what is beyond it, or infinity.
            if not (np.abs(array) < LIMIT).all():
                cut_off.add(value.name or "")
    for node in model.graph:
        has_halves |= _widen_node(node)
    return cut_off if has_halves else None


def _widen_node(node: ir.Node) -> bool:
    """The same for the attributes and outputs of a node. Whether there was any float16."""
    found = False
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
            wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
            node.attributes[name], found = ir.AttrTensor(name, wide), True
        # `to` of Cast, `dtype` of operators that make tensors.
        if name in ("to", "dtype") and attribute.as_int() == HALF:
            node.attributes[name], found = ir.AttrInt64(name, int(FLOAT)), True
    for output in node.outputs:
        if output.dtype == HALF:
            output.dtype, found = FLOAT, True
    return found


def _is_watched(node: ir.Node) -> bool:
    """Whether a node computes floats."""
    if node.op_type in MOVING or not node.outputs[0].name:
        return False
    # A value without a type is one of an operator that only ONNX Runtime knows: those give floats.
    of_type = node.outputs[0].dtype
    return of_type == FLOAT or (of_type is None and node.domain == ONNXRUNTIME_DOMAIN)


def _watch(
    model: ir.Model, nodes: list[ir.Node], pixels: Pixels, limit: float
) -> list[tuple[bool, float]]:
    """Of each node whether all its numbers are within the limit, and the largest of them.

    Both are computed in the graph, so that no more than two numbers of a value are kept.
    """
    graph = model.graph
    graph.initializers["overflow/limit"] = _constant("overflow/limit", limit)
    del graph.outputs[:]
    for node in nodes:
        graph.outputs.extend(_watching(graph, node))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "watched.onnx"
        # A model above 2 GB does not fit into one file.
        ir.save(model, file, external_data="weights")
        # Fused operators would hide the values between the operators of the file.
        session = Model(file, SessionSettings(optimization="none")).session
        found = session.run(None, {session.get_inputs()[0].name: pixels})
    return [
        (bool(within), float(largest))
        for within, largest in zip(found[::2], found[1::2], strict=True)
    ]


def _watching(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Nodes that compute whether a node's numbers are within the limit, and the largest."""
    value = node.outputs[0]

    def add(
        operator: str, inputs: list[ir.Value], of_type: ir.DataType, **attributes: int
    ) -> ir.Value:
        new = ir.node(operator, inputs, attributes=attributes)
        graph.append(new)
        [output] = new.outputs
        output.name = f"overflow/{value.name}/{operator}"
        output.dtype = of_type
        return output

    readers = {use.node.op_type for use in value.uses()}
    size = value if readers == {"Softmax"} else add("Abs", [value], FLOAT)
    # A comparison is false for NaN, of which a maximum may say nothing.
    limit = graph.initializers["overflow/limit"]
    within = add("LessOrEqual", [size, limit], ir.DataType.BOOL)
    number = add("Cast", [within], FLOAT, to=int(FLOAT))
    return (
        add("ReduceMin", [number], FLOAT, keepdims=0),
        add("ReduceMax", [size], FLOAT, keepdims=0),
    )


def _constant(name: str, number: float) -> ir.Value:
    tensor = ir.tensor(np.array(number, np.float32), name=name)
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(()), const_value=tensor)


def _where(node: ir.Node) -> str:
    """The module of a node; its name if the file does not tell the module."""
    # marrq names the nodes of a linear `PATH/OPERATOR_NUMBER`.
    path, slash, _ = (node.name or "").rpartition("/")
    if slash:
        return path
    # From the whole model down to the operation itself, which is no module.
    modules = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))[:-1]
    return str(modules[-1] if modules else "") or node.name or node.op_type
