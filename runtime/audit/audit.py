"""What really runs: one row for each linear of a file, from the graph as ONNX Runtime has optimized
it for execution.

A file says what it wants (codes, Q/DQ pairs, a scheme); ONNX Runtime fuses what matches one of its
patterns and computes the rest in float, without a word. So the graph is taken back from ONNX
Runtime (`SessionOptions.optimized_model_filepath`) and set beside the file. A product of the
optimized graph stands for the product of the file that is nearest before the first value which both
have: fusion renames nodes, weights and some values, but not all of them. The operator and the types
of its operands say what is computed; where that is not what the scheme says, the form of the
product in the file says why. The rules are those seen with ONNX Runtime 1.24.1 to 1.32 on the CPU.

What the scheme says, and of which linears, stands in the metadata of marrq's files
(`marrq.schemes`). Of another tool's file it is what its own Q/DQ pairs or operators say; a linear
whose weight is in float there is taken to be meant so."""

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from onnx import NodeProto

from runtime.audit.graph import (
    MOVING,
    PRODUCTS,
    Graph,
    Product,
    attribute,
    bits_of_type,
    size_bytes,
)
from runtime.errors import BenchError, GateError
from runtime.session import (
    ONNXRUNTIME_VERSION,
    PROVIDERS,
    WHOLE_GRAPH_PROVIDERS,
    Model,
    SessionSettings,
)

FLOAT = "float"
"""The scheme of a linear that is not quantized."""

CAST_PREFIX = "InsertedPrecisionFreeCast_"
"""What ONNX Runtime puts before the name of a float16 value that it makes float32."""

Role = Literal["linear", "low-rank branch", "correction"]

ROLES: dict[str, Role] = {
    "lowrank_left": "low-rank branch",
    "lowrank_right": "low-rank branch",
    "bias_and_sums": "correction",
}
"""Constants of a quantized linear that other products than its own multiply with, by the names that
marrq's exporters give them."""

NAME = re.compile(r"(.+?)\.(?:weight|lowrank|bias_and_sums)")
"""Name of a linear's constant; the group is the linear's path, or that of a third of it: PATH.q,
PATH.k, PATH.v."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Of MatMulNBits."""

INT8_BLOCKS = {2: (32, 64, 128), 4: BLOCK_SIZES, 8: BLOCK_SIZES}
"""Block sizes for which MatMulNBits quantizes activations to int8 at accuracy level 4, by bits of
its codes; with the others it computes in float32 there too (seen with ONNX Runtime 1.32 on AVX-512
VNNI, from the outputs)."""


@dataclass(frozen=True)
class Row:
    """What runs a linear. linear: its path, or the node's name where the weight has none; nominal:
    what the scheme says, as `W4A8`, or "float"; operator: what runs, `operators` times (q, k and v
    apart, groups of inputs); weight, activation: types as the kernel gets them; integer: whether
    that is an integer or n-bit kernel, for both operands where the scheme quantizes both; reason: a
    sentence where a linear does not run as the scheme says, otherwise None."""

    linear: str
    nominal: str
    operator: str
    operators: int
    weight: str
    activation: str
    integer: bool
    reason: str | None

    @property
    def falls_short(self) -> bool:
        """Whether it runs in float where the scheme says integers."""
        return not self.integer and self.nominal != FLOAT and nominal_bits(self.nominal)[1] < 16


@dataclass(frozen=True)
class Linear:
    """A product of the file whose weight is constant. path: of the linear; part: with `.q`, `.k` or
    `.v` behind where it is a third of it; origin: the largest initializer of its weight, and the
    way back to it; kernel: the product of the optimized graph that stands for it, None where there
    is none."""

    path: str
    part: str
    role: Role
    nominal: str
    product: Product
    kernel: Product | None
    origin: str
    way: tuple[NodeProto, ...]


@dataclass(frozen=True)
class Examined:
    """A file, its graph as it is executed under the settings, and the linears of both. assigned:
    provider of each node, by name."""

    file: Graph
    optimized: Graph
    settings: SessionSettings
    assigned: Mapping[str, str]
    linears: tuple[Linear, ...]
    size_bytes: int


def examine(path: Path, settings: SessionSettings) -> Examined:
    """Have a file optimized for execution. Raises BenchError when it cannot be loaded, and for a
    provider that takes whole graphs."""
    if settings.provider in WHOLE_GRAPH_PROVIDERS:
        raise BenchError(
            f"{settings.provider} builds engines that ONNX Runtime cannot look into: examine with "
            "--provider cpu or cuda"
        )
    with tempfile.TemporaryDirectory() as scratch:
        optimized_to = Path(scratch) / "optimized.onnx"
        session = Model(path, settings, optimized_to=optimized_to).session
        assigned = {
            node.name: part.ep_name
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        }
        file, optimized = Graph.load(path), Graph.load(optimized_to)
    linears = tuple(find_linears(file, optimized))
    if not linears:
        raise BenchError(f"{str(path)!r} has no linear: there is nothing to examine")
    return Examined(file, optimized, settings, assigned, linears, size_bytes(path))


def find_linears(file: Graph, optimized: Graph) -> list[Linear]:
    """All products of a file with a constant weight, beside what runs them."""
    listed = nominal_of_paths(file)
    kernels = {
        found: product
        for product in optimized.products
        if (found := _stands_for(product, optimized, file)) is not None
    }
    linears = []
    for product in file.products:
        if product.weight is None:
            continue
        origin, way = file.origin(product.weight)
        match = NAME.match(origin)
        part = match[1] if match else product.node.name or origin
        path = part if part in listed or part[:-2] not in listed else part[:-2]
        role: Role = ROLES.get(origin.rpartition(".")[2], "linear")
        nominal = listed.get(path) or _nominal(file, product, origin)
        linears.append(
            Linear(
                path,
                part,
                role,
                nominal,
                product,
                kernels.get(product.node.output[0]),
                origin,
                tuple(way),
            )
        )
    return linears


def nominal_of_paths(file: Graph) -> dict[str, str]:
    """The scheme of each quantized linear, as marrq's files have it in their metadata."""
    schemes: dict[str, list[str]] = json.loads(file.metadata.get("marrq.schemes", "{}"))
    return {path: scheme for scheme, paths in schemes.items() for path in paths}


def nominal_bits(nominal: str) -> tuple[int, int]:
    """Bits of weights and activations of a scheme as `W4A8-g64`; 16 stands for float
    activations."""
    match = re.match(r"W(\d+)A(\d+)", nominal)
    return (int(match[1]), int(match[2])) if match else (32, 32)


def audit(examined: Examined) -> list[Row]:
    """A row for each linear; rows for its parts where those do not run alike. Linears that the
    scheme names and the file lacks are told."""
    rows: dict[str, list[tuple[str, Row]]] = {}
    for linear in examined.linears:
        if linear.role == "linear":
            rows.setdefault(linear.path, []).append((linear.part, _row(examined, linear)))
    missing = [
        Row(
            path, nominal, "none", 0, "none", "none", False, "no product of the file has its weight"
        )
        for path, nominal in nominal_of_paths(examined.file).items()
        if path not in rows
    ]
    return [row for parts in rows.values() for row in _merged(parts)] + missing


def demand_integers(rows: Sequence[Row]) -> None:
    """Raise GateError when a linear runs in float where its scheme says integers."""
    short = [row for row in rows if row.falls_short]
    if short:
        first = f"{short[0].linear!r}, {short[0].nominal}: {short[0].reason}"
        raise GateError(
            f"{len(short)} of {len(rows)} linears run in float where their scheme says integers; "
            f"the first is {first}"
        )


def _merged(parts: list[tuple[str, Row]]) -> list[Row]:
    """One row where all parts of a linear run alike, otherwise one for each part and way to run."""
    alike = Counter(row for _, row in parts)
    if len(alike) > 1:
        alike = Counter(replace(row, linear=part) for part, row in parts)
    return [replace(row, operators=count) for row, count in alike.items()]


def _row(examined: Examined, linear: Linear) -> Row:
    if linear.kernel is None:
        return Row(
            linear.path,
            linear.nominal,
            "none",
            1,
            "none",
            "none",
            False,
            "ONNX Runtime has merged it into another operator",
        )
    weight, activation = kernel_types(examined.optimized, linear.kernel)
    integer = _is_integer(weight) and (
        _is_integer(activation) or nominal_bits(linear.nominal)[1] >= 16
    )
    row = Row(
        linear.path,
        linear.nominal,
        linear.kernel.node.op_type,
        1,
        weight,
        activation,
        integer,
        None,
    )
    return (
        row
        if linear.nominal == FLOAT
        else replace(row, reason=_reason(examined, linear, linear.kernel, row))
    )


def kernel_types(graph: Graph, kernel: Product) -> tuple[str, str]:
    """Types of weight and activation as a kernel multiplies them; those that it makes itself are in
    its attributes or its name."""
    node = kernel.node
    if node.op_type == "MatMulNBits":
        bits = attribute(node, "bits", 4)
        int8 = (
            attribute(node, "accuracy_level", 0) == 4
            and attribute(node, "block_size") in INT8_BLOCKS[bits]
        )
        return f"int{bits}", "int8" if int8 else graph.type_of(kernel.activation)
    assert kernel.weight is not None
    weight, zero_point = graph.type_of(kernel.weight), PRODUCTS[node.op_type].first_zero_point
    if node.op_type == "DynamicQuantizeMatMul":
        return weight, "uint8"
    typed = (
        kernel.activation
        if zero_point is None or zero_point >= len(node.input)
        else node.input[zero_point]
    )
    return weight, graph.type_of(typed)


def weights_of(examined: Examined, linear: Linear) -> int:
    """How many weights a product has."""
    node = linear.kernel.node if linear.kernel is not None else linear.product.node
    if node.op_type == "MatMulNBits":
        return int(attribute(node, "K") * attribute(node, "N"))
    shape = (
        examined.optimized.shape_of(linear.kernel.weight)
        if linear.kernel is not None and linear.kernel.weight
        else None
    )
    return math.prod(shape) if shape else examined.file.elements_of(linear.origin)


def _stands_for(kernel: Product, optimized: Graph, file: Graph) -> str | None:
    """The output of the file's product that a product of the optimized graph stands for."""
    after = optimized.ahead(
        kernel.node.output, lambda node: () if node.op_type in PRODUCTS else node.output
    )
    shared = next(
        (name for value in after if (name := value.removeprefix(CAST_PREFIX)) in file.producers),
        None,
    )
    if shared is None:
        return None
    before = file.behind([shared], lambda node: () if node.op_type in PRODUCTS else node.input)
    return next(
        (
            value
            for value in before
            if value in file.producers and file.producers[value].op_type in PRODUCTS
        ),
        None,
    )


def _nominal(file: Graph, product: Product, origin: str) -> str:
    """The scheme that the form of a product in the file amounts to."""
    code_type = file.type_of(origin)
    if not _is_integer(code_type):
        return FLOAT
    weight = (
        attribute(product.node, "bits", 4)
        if product.node.op_type == "MatMulNBits"
        else bits_of_type(code_type)
    )
    quantizer, (_, multiplied) = _quantizer(file, product), kernel_types(file, product)
    activation = file.type_of(quantizer.output[0]) if quantizer is not None else multiplied
    integer = _is_integer(activation) and product.node.op_type != "MatMulNBits"
    return f"W{weight}A{bits_of_type(activation) if integer else 16}"


def _quantizer(file: Graph, product: Product) -> NodeProto | None:
    """The node that makes the codes of a product's activations, where they are codes."""
    before = file.behind(
        [product.activation],
        lambda node: node.input[:1] if node.op_type in (*MOVING, "DequantizeLinear") else (),
    )
    made_by = [file.producers[value] for value in before if value in file.producers]
    return next(
        (node for node in made_by if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")),
        None,
    )


def _is_integer(type_name: str) -> bool:
    return type_name.startswith(("int", "uint"))


def _reason(examined: Examined, linear: Linear, kernel: Product, row: Row) -> str | None:
    """Why a quantized linear does not run as its scheme says."""
    asked = PROVIDERS[examined.settings.provider]
    provider = examined.assigned.get(kernel.node.name) or examined.assigned.get(
        linear.product.node.name, asked
    )
    if provider != asked:
        return f"its node runs on {provider}: {asked} has no kernel for it"
    stored = examined.file.type_of(linear.origin)
    if not _is_integer(stored):
        return f"its weight is {stored} in the file, not codes"
    dequantizer = next((node for node in linear.way if node.op_type == "DequantizeLinear"), None)
    block, inputs = _block(examined.file, dequantizer)
    if row.integer and block < inputs and row.operator != "MatMulNBits":
        return f"its weight has a scale for every {block} inputs, with which {row.operator} fails when it runs: it takes one for each channel"
    if row.integer and nominal_bits(linear.nominal)[1] >= 16 and _is_integer(row.activation):
        at_level = " at accuracy level 4" if row.operator == "MatMulNBits" else ""
        return f"{row.operator} quantizes its activations to {row.activation}{at_level}, where the scheme leaves them in float"
    return None if row.integer else _why_in_float(examined, linear, row, dequantizer)


def _block(file: Graph, dequantizer: NodeProto | None) -> tuple[int, int]:
    """Inputs that share a scale, and all inputs, of a dequantized weight; zeros where there are no
    blocks."""
    if dequantizer is None or not attribute(dequantizer, "block_size", 0):
        return 0, 0
    axis, shape = (
        attribute(dequantizer, "axis", 1),
        file.shape_of(file.origin(dequantizer.input[0])[0]),
    )
    assert shape is not None
    return attribute(dequantizer, "block_size"), shape[axis]


def _why_in_float(
    examined: Examined, linear: Linear, row: Row, dequantizer: NodeProto | None
) -> str:
    """The rule of ONNX Runtime's fusions that a product between DequantizeLinear nodes does not
    meet."""
    file, node, stored = examined.file, linear.product.node, examined.file.type_of(linear.origin)
    block, inputs = _block(file, dequantizer)
    form = f"{stored} codes" + (f" in blocks of {block} of {inputs} inputs" if block else "")
    unknown = f"ONNX Runtime {ONNXRUNTIME_VERSION} has no kernel for {node.op_type} with {form}"
    if dequantizer is None:
        return unknown
    if examined.settings.optimization in ("none", "basic"):
        return f"graph optimization {examined.settings.optimization!r} fuses no Q/DQ: set it to extended or all"
    quantizer = _quantizer(file, linear.product)
    if quantizer is not None:
        code_type = file.type_of(quantizer.output[0])
        if code_type not in ("uint8", "int8"):
            return f"its activations are {code_type} codes: integer kernels take 8 bits, narrower codes clipped to their range"
        if linear.way[-1] is dequantizer and bits_of_type(stored) < 8:
            return f"{stored} codes go straight into DequantizeLinear, which is fused with 8-bit codes only: cast them to int8 before it"
        if quantizer.op_type == "DynamicQuantizeLinear" or not set(
            file.origins(quantizer.input[1])
        ).issuperset(quantizer.input[1:2]):
            return "its activations have scales found at run time, which no fused kernel takes; the integer flavour has one"
        if block:
            return f"its weight has a scale for every {block} inputs, which no fused kernel takes; the integer flavour has kernels from 64 on"
        if row.operator in ("Gemm", "FusedGemm"):
            if len(dequantizer.input) < 3:
                return "a Gemm is fused only where its weight has a zero point, be it 0"
            return "a product of two axes is run as Gemm, which has no integer kernel for a float bias and output: keep three axes"
        if node.op_type == "Conv" and code_type == "int8":
            return "a convolution is fused with uint8 activations, and these are int8"
        return unknown
    if attribute(node, "transB", 0):
        return (
            "a Gemm with transB is not fused with DequantizeLinear: store the weight as [in, out]"
        )
    if any(
        between.op_type == "Transpose" for between in linear.way[: linear.way.index(dequantizer)]
    ):
        return "a Transpose behind DequantizeLinear keeps it from being fused: the weight is dequantized at every run"
    if block and block not in BLOCK_SIZES:
        return f"its weight has a scale for every {block} inputs, and MatMulNBits takes blocks of {', '.join(map(str, BLOCK_SIZES))}"
    if block and inputs % block:
        return f"{unknown}: {block} does not divide {inputs}"
    return unknown
