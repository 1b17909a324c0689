"""The linears of an ONNX file, and what ONNX Runtime runs in their place.

A file says what it wants (codes, Q/DQ pairs, a scheme). ONNX Runtime fuses what matches one of its
patterns, and computes the rest in float without a word. So the graph is taken back from ONNX
Runtime as it is going to be executed (`SessionOptions.optimized_model_filepath`), and set beside
the file.

To find which product of the file a kernel computes, go forward from the kernel to the first value
that the file has too, then back in the file to the nearest product. Names cannot tell: fusion
renames nodes, weights and some values.

What the scheme says, and of which linears, stands in the metadata of marrq's files
(`marrq.schemes`). In another tool's file it is what the file's own Q/DQ pairs or operators say; a
linear with a float weight is taken to be float on purpose.
"""

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx import NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from runtime.audit.graph import Graph, Product, size_bytes
from runtime.audit.nodes import MOVING, attribute, bits_of_type, operands
from runtime.errors import BenchError
from runtime.metadata import LinearPart
from runtime.session import WHOLE_GRAPH_PROVIDERS, Model, SessionSettings

# The scheme of a linear that is not quantized.
FLOAT = "float"

# What ONNX Runtime puts before the name of a float16 value that it makes float32.
CAST_PREFIX = "InsertedPrecisionFreeCast_"

Role = Literal["linear", "low-rank branch", "salient columns", "correction"]

# Constants of a quantized linear that other products than its own multiply with, by the names that
# marrq's exporters give them.
ROLES: dict[str, Role] = {
    "lowrank_left": "low-rank branch",
    "lowrank_right": "low-rank branch",
    "salient_codes": "salient columns",
    "bias_and_sums": "correction",
}

# Name of a constant of a linear. The group is the module path of the linear, or of a third of it:
# PATH.q, PATH.k, PATH.v. It serves linears that no metadata name: float linears, and all linears
# of other tools' files, whose constants PyTorch's exporter names by their module paths.
CONSTANT_NAME = re.compile(r"(.+?)\.(?:weight|lowrank|salient|bias_and_sums)")

# Of MatMulNBits.
BLOCK_SIZES = (16, 32, 64, 128, 256)

# Block sizes for which MatMulNBits quantizes activations to int8 at accuracy level 4, by bits of
# its codes. With the others it computes in float32 there too (seen with ONNX Runtime 1.32 on
# AVX-512 VNNI, from the outputs).
INT8_BLOCKS = {2: (32, 64, 128), 4: BLOCK_SIZES, 8: BLOCK_SIZES}


@dataclass(frozen=True)
class Linear:
    """A product of the file whose weight is constant."""

    # Of the linear's module.
    path: str
    # The path, or with `.q`, `.k` or `.v` if this is a third of the linear.
    part: str
    role: Role
    # The scheme, as `W4A8`, or FLOAT.
    nominal: str
    product: Product
    # The product of the optimized graph that stands for it; None if there is none.
    kernel: Product | None
    # The largest initializer that its weight is made from.
    origin: str
    # The nodes back from the weight to the origin.
    way: tuple[NodeProto, ...]

    @property
    def dequantizer(self) -> NodeProto | None:
        """The node that makes floats of the weight's codes, if there is one."""
        return next((node for node in self.way if node.op_type == "DequantizeLinear"), None)


@dataclass(frozen=True)
class Examined:
    """A file, its graph as it is executed under the settings, and the linears of both. assigned:
    execution provider of each node, by the node's name."""

    file: Graph
    optimized: Graph
    settings: SessionSettings
    assigned: Mapping[str, str]
    linears: tuple[Linear, ...]
    size_bytes: int


def examine(path: Path, settings: SessionSettings) -> Examined:
    """Have a file optimized for execution. Raises BenchError if it cannot be loaded, if it has no
    linear, and for a provider that compiles whole graphs."""
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        raise BenchError(
            f"{settings.provider} builds engines that ONNX Runtime cannot look into: examine with "
            "--provider cpu or cuda"
        )
    with tempfile.TemporaryDirectory() as scratch:
        optimized_to = Path(scratch) / "optimized.onnx"
        session = Model(path, settings, optimized_to=optimized_to).session
        # Which provider runs each node is known once the graph is optimized.
        assigned = {
            node.name: part.ep_name
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        }
        # Read inside the block: the optimized file is gone after it.
        file, optimized = Graph.load(path), Graph.load(optimized_to)
        _load_codes(optimized, Path(scratch))
    linears = tuple(find_linears(file, optimized))
    if not linears:
        raise BenchError(f"{str(path)!r} has no linear: there is nothing to examine")
    return Examined(file, optimized, settings, assigned, linears, size_bytes(path))


def _load_codes(optimized: Graph, folder: Path) -> None:
    """Read the int8 weights of the kernels from beside the graph: the audit asks for their codes
    (runtime/audit/saturation.py), and the file is gone by then."""
    for product in optimized.products:
        tensor = optimized.initializers.get(product.weight or "")
        is_int8 = tensor is not None and tensor.data_type == TensorProto.INT8
        if tensor is not None and is_int8 and uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(folder))
            # The numbers are in the tensor now, which readers tell by this field.
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]


def find_linears(file: Graph, optimized: Graph) -> list[Linear]:
    """All products of a file with a constant weight, each with the kernel that runs it."""
    # By the output of the product of the file that each kernel stands for.
    kernels = {
        found: product
        for product in optimized.products
        if (found := _stands_for(product, optimized, file)) is not None
    }
    named = _named_products(file)
    return [
        _linear(file, product, product.weight, kernels, named)
        for product in file.products
        if product.weight is not None
    ]


def _named_products(file: Graph) -> dict[str, tuple[str, str]]:
    """Path and part of each product that the metadata name, by the product's output; empty for
    another tool's file."""
    found: dict[str, tuple[str, str]] = {}
    for path, parts in (file.metadata.linears or {}).items():
        for slot, ends in enumerate(parts):
            # Three parts are q, k and v.
            part = f"{path}.{'qkv'[slot]}" if len(parts) == 3 else path
            # All that lies between the ends belongs to the part: branches and corrections too. What
            # q, k and v share counts as a piece of q.
            for value in _between(file, ends):
                found.setdefault(value, (path, part))
    return found


def _between(file: Graph, ends: LinearPart) -> list[str]:
    """The values that a part of a linear makes, from its output back to its input."""
    return file.behind(
        [ends.output], lambda node: [name for name in node.input if name != ends.input]
    )


def _linear(
    file: Graph,
    product: Product,
    weight: str,
    kernels: Mapping[str, Product],
    named: Mapping[str, tuple[str, str]],
) -> Linear:
    """A product of the file. kernels, named: by the output of the product that they are about."""
    origin, way = file.origin(weight)
    output = product.node.output[0]
    path, part = named.get(output) or _named_by_constant(file, product, origin)
    return Linear(
        path=path,
        part=part,
        role=ROLES.get(origin.rpartition(".")[2], "linear"),
        nominal=file.metadata.scheme_by_linear.get(path) or _nominal(file, product, origin),
        product=product,
        kernel=kernels.get(output),
        origin=origin,
        way=tuple(way),
    )


def _named_by_constant(file: Graph, product: Product, origin: str) -> tuple[str, str]:
    """Path and part of a product that no metadata name, from the name of its constant."""
    schemes, match = file.metadata.scheme_by_linear, CONSTANT_NAME.match(origin)
    part = match[1] if match else product.node.name or origin
    # A third of a linear is cut off its path only if the scheme names the linear and not the third:
    # a model may have a module that is called q.
    return (part if part in schemes or part[:-2] not in schemes else part[:-2]), part


def _stands_for(kernel: Product, optimized: Graph, file: Graph) -> str | None:
    """The output of the file's product that a product of the optimized graph stands for."""
    # Forward from the kernel to the first value that the file has too, but not through another
    # product: what comes after that one belongs to that one.
    after = optimized.ahead(kernel.node.output, lambda node: () if operands(node) else node.output)
    shared = next(
        (name for value in after if (name := value.removeprefix(CAST_PREFIX)) in file.producers),
        None,
    )
    if shared is None:
        return None
    # And in the file back from this value to the nearest product.
    before = file.behind([shared], lambda node: () if operands(node) else node.input)
    made = (value for value in before if value in file.producers)
    return next((value for value in made if operands(file.producers[value])), None)


def _nominal(file: Graph, product: Product, origin: str) -> str:
    """The scheme that the form of a product in the file amounts to."""
    code_type = file.type_of(origin)
    if not is_integer(code_type):
        return FLOAT
    # MatMulNBits packs its codes into bytes, so an attribute and not the type has their bits.
    is_nbits = product.node.op_type == "MatMulNBits"
    weight = attribute(product.node, "bits", 4) if is_nbits else bits_of_type(code_type)
    found, (_, multiplied) = quantizer(file, product), kernel_types(file, product)
    activation = multiplied if found is None else file.type_of(found.output[0])
    # MatMulNBits rounds activations inside of the kernel, which is not what the file asks for.
    bits = bits_of_type(activation) if is_integer(activation) and not is_nbits else 16
    return f"W{weight}A{bits}"


def nominal_bits(nominal: str) -> tuple[int, int]:
    """Bits of weights and activations of a scheme such as `W4A8-g64`. 16 stands for float
    activations; a float linear has 32 and 32."""
    # Suffixes of the scheme (groups, grids) do not change the bits.
    match = re.match(r"W(\d+)A(\d+)", nominal)
    return (int(match[1]), int(match[2])) if match else (32, 32)


def quantizer(file: Graph, product: Product) -> NodeProto | None:
    """The node that makes the codes of a product's activations; None if they are not codes."""
    before = file.behind(
        [product.activation],
        lambda node: node.input[:1] if node.op_type in (*MOVING, "DequantizeLinear") else (),
    )
    made_by = [file.producers[value] for value in before if value in file.producers]
    # Static activations, and activations with scales found at run time.
    quantizers = ("QuantizeLinear", "DynamicQuantizeLinear")
    return next((node for node in made_by if node.op_type in quantizers), None)


def kernel_types(graph: Graph, kernel: Product) -> tuple[str, str]:
    """Types of weight and activation as a kernel multiplies them."""
    node = kernel.node
    if node.op_type == "MatMulNBits":
        # Its codes are packed into bytes, and it may round activations itself: attributes tell.
        bits, block = attribute(node, "bits", 4), attribute(node, "block_size")
        int8 = attribute(node, "accuracy_level", 0) == 4 and block in INT8_BLOCKS[bits]
        return f"int{bits}", "int8" if int8 else graph.type_of(kernel.activation)
    assert kernel.weight is not None
    places, weight = operands(node), graph.type_of(kernel.weight)
    zero_point = None if places is None else places.first_zero_point
    if node.op_type == "DynamicQuantizeMatMul":
        return weight, "uint8"  # it takes floats, and quantizes them itself
    # A fused product's activation has no type in the file; its zero point has the same type.
    has_zero_point = zero_point is not None and zero_point < len(node.input)
    typed = node.input[zero_point] if has_zero_point else kernel.activation
    return weight, graph.type_of(typed)


def weights_of(examined: Examined, linear: Linear) -> int:
    """Number of weights of a product."""
    node = linear.kernel.node if linear.kernel is not None else linear.product.node
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "K") * attribute(node, "N"))
    # The kernel's weight first: the file may have packed several codes into one byte.
    weight = linear.kernel.weight if linear.kernel is not None else None
    shape = examined.optimized.shape_of(weight) if weight else None
    if shape:
        return math.prod(shape)
    blocks = _in_blocks(examined.optimized, weight) if weight else None
    return blocks or examined.file.elements_of(linear.origin)


def _in_blocks(graph: Graph, weight: str) -> int | None:
    """Number of weights that a DequantizeLinear makes in whole blocks, a scale for each; None if it
    is not made so."""
    made_by = graph.producers.get(weight)
    while made_by is not None and made_by.op_type in MOVING:
        made_by = graph.producers.get(made_by.input[0])
    if made_by is None or made_by.op_type != "DequantizeLinear":
        return None
    size, scale = attribute(made_by, "block_size", 0), made_by.input[1]
    return size * graph.elements_of(scale) if scale in graph.initializers else None


def is_integer(type_name: str) -> bool:
    """Whether a type is one of integers."""
    return type_name.startswith(("int", "uint"))
