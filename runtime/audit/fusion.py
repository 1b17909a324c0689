"""Why a quantized linear does not run as its scheme says: the rules of ONNX Runtime's fusions, as
seen with ONNX Runtime 1.24.1 to 1.32 on the CPU.

A pair of QuantizeLinear and DequantizeLinear around a product is a pattern. If it matches, ONNX
Runtime puts an integer kernel in its place; if one detail is off, the product runs in float. Each
sentence here names the detail, and what would match.
"""

from dataclasses import dataclass

from onnx import NodeProto

from runtime.audit.graph import Graph, Product
from runtime.audit.linears import (
    BLOCK_SIZES,
    Examined,
    Linear,
    is_integer,
    nominal_bits,
    quantizer,
)
from runtime.audit.nodes import attribute, bits_of_type
from runtime.session import ONNXRUNTIME_VERSION, PROVIDERS


@dataclass(frozen=True)
class _Form:
    """How a quantized linear is written in the file.

    stored: type of its codes. dequantizer: of its weight.
    block: inputs that share a scale; 0 if each channel has one scale. inputs: of the linear.
    """

    file: Graph
    linear: Linear
    stored: str
    dequantizer: NodeProto | None
    block: int
    inputs: int

    @property
    def is_folded(self) -> bool:
        """Whether arithmetic that can be folded makes floats of the codes, for a scheme with float
        activations: the folded flavour."""
        float_activations = nominal_bits(self.linear.nominal)[1] >= 16
        casts = any(node.op_type == "Cast" for node in self.linear.way)
        return self.dequantizer is None and float_activations and casts

    @property
    def unknown(self) -> str:
        """The reason if no rule is broken that is known."""
        form = f"{self.stored} codes"
        if self.block:
            form += f" in blocks of {self.block} of {self.inputs} inputs"
        operator = self.linear.product.node.op_type
        return f"ONNX Runtime {ONNXRUNTIME_VERSION} has no kernel for {operator} with {form}"


def reason(
    examined: Examined, linear: Linear, kernel: Product, integer: bool, activation: str
) -> str | None:
    """Why a quantized linear does not run as its scheme says; None if it does.

    kernel: what runs it. integer: whether the kernel multiplies integers or n-bit weights.
    activation: type of the activations in the kernel.
    """
    asked = PROVIDERS[examined.settings.provider]
    # A node that was fused has no name in the file, so the file's own node is asked about next.
    names = (kernel.node.name, linear.product.node.name)
    provider = next(filter(None, map(examined.assigned.get, names)), asked)
    if provider != asked:
        return f"its node runs on {provider}: {asked} has no kernel for it"
    form, operator = _form(examined.file, linear), kernel.node.op_type
    # Nothing can fuse a weight that is not codes.
    if not is_integer(form.stored):
        return f"its weight is {form.stored} in the file, not codes"
    if not integer:
        return _why_in_float(examined, form, kernel)
    # ONNX Runtime fuses this form too, and the kernel then fails at the first run.
    if form.block < form.inputs and operator != "MatMulNBits":
        return (
            f"its weight has a scale for every {form.block} inputs, with which {operator} fails "
            "when it runs: it takes one for each channel"
        )
    # Integers where the scheme wants float are another model: less accurate than what was
    # measured in torch.
    if nominal_bits(linear.nominal)[1] >= 16 and is_integer(activation):
        at_level = " at accuracy level 4" if operator == "MatMulNBits" else ""
        return (
            f"{operator} quantizes its activations to {activation}{at_level}, where the scheme "
            "leaves them in float"
        )
    return None


def _form(file: Graph, linear: Linear) -> _Form:
    stored, dequantizer = file.type_of(linear.origin), linear.dequantizer
    if dequantizer is None or not attribute(dequantizer, "block_size", 0):
        return _Form(file, linear, stored, dequantizer, 0, 0)
    # The blocks lie along the axis of the inputs.
    axis = attribute(dequantizer, "axis", 1)
    block = attribute(dequantizer, "block_size")
    codes, scales = (file.shape_of(file.origin(name)[0]) for name in dequantizer.input[:2])
    assert codes is not None
    assert scales is not None
    # Codes of 3 bits lie in the file as planes of bytes: then the scales tell.
    is_plane = len(codes) != len(scales)
    inputs = scales[axis] * block if is_plane else codes[axis]
    return _Form(file, linear, stored, dequantizer, block, inputs)


def _why_in_float(examined: Examined, form: _Form, kernel: Product) -> str | None:
    """The rule that a float product does not meet; None if it meets what the file asks for."""
    optimization = examined.settings.optimization
    if form.is_folded:
        # The weight is an initializer once it is folded: floats in memory, codes in the file.
        if kernel.weight in examined.optimized.initializers:
            return None
        return (
            f"its weight is dequantized at every run: ONNX Runtime {ONNXRUNTIME_VERSION} did not "
            f"fold it at graph optimization {optimization!r}"
        )
    # Codes that go straight into an operator need a kernel of that operator.
    if form.dequantizer is None:
        return form.unknown
    if optimization in ("none", "basic"):
        return f"graph optimization {optimization!r} fuses no Q/DQ: set it to extended or all"
    # Quantized activations make integer kernels; float activations make MatMulNBits.
    found = quantizer(form.file, form.linear.product)
    if found is None:
        return _why_no_nbits(form, form.dequantizer)
    return _why_no_integers(form, form.dequantizer, found, kernel.node.op_type)


def _why_no_integers(
    form: _Form, dequantizer: NodeProto, quantizer: NodeProto, operator: str
) -> str:
    """The rule for quantized activations: QuantizeLinear → DequantizeLinear → product."""
    code_type = form.file.type_of(quantizer.output[0])
    # The kernels know 8-bit activations only.
    if code_type not in ("uint8", "int8"):
        return (
            f"its activations are {code_type} codes: integer kernels take 8 bits, narrower codes "
            "clipped to their range"
        )
    # Seen with files for TensorRT, whose graphs are float16.
    if form.file.type_of(quantizer.input[1]) == "float16":
        return "its graph is float16, and integer kernels are fused into float32 graphs only"
    # The last node of the way back is the one that takes the codes themselves.
    if form.linear.way[-1] is dequantizer and bits_of_type(form.stored) < 8:
        return (
            f"{form.stored} codes go straight into DequantizeLinear, which is fused with 8-bit "
            "codes only: cast them to int8 before it"
        )
    # A fused kernel takes scales that are constants, since they are folded into its own.
    if _scales_at_run_time(form.file, quantizer):
        return (
            "its activations have scales found at run time, which no fused kernel takes; the "
            "integer flavour has one"
        )
    if form.block:
        return (
            f"its weight has a scale for every {form.block} inputs, which no fused kernel takes; "
            "the integer flavour has kernels from 64 on"
        )
    # What ran as Gemm has two axes: ONNX Runtime makes Gemm of MatMul and Add then.
    if operator in ("Gemm", "FusedGemm"):
        if len(dequantizer.input) < 3:
            return "a Gemm is fused only where its weight has a zero point, be it 0"
        return (
            "a product of two axes is run as Gemm, which has no integer kernel for a float bias "
            "and output: keep three axes"
        )
    # QLinearConv exists for uint8 activations.
    if form.linear.product.node.op_type == "Conv" and code_type == "int8":
        return "a convolution is fused with uint8 activations, and these are int8"
    return form.unknown


def _scales_at_run_time(file: Graph, quantizer: NodeProto) -> bool:
    """Whether the activations' scale is computed and not an initializer."""
    if quantizer.op_type == "DynamicQuantizeLinear":
        return True
    scale = quantizer.input[1]
    return scale not in file.origins(scale)


def _why_no_nbits(form: _Form, dequantizer: NodeProto) -> str:
    """The rule for float activations: DequantizeLinear → product becomes MatMulNBits."""
    if attribute(form.linear.product.node, "transB", 0):
        return (
            "a Gemm with transB is not fused with DequantizeLinear: store the weight as [in, out]"
        )
    # The way leads back from the product: what comes before DequantizeLinear in it runs after.
    behind = form.linear.way[: form.linear.way.index(dequantizer)]
    if any(node.op_type == "Transpose" for node in behind):
        return (
            "a Transpose behind DequantizeLinear keeps it from being fused: the weight is "
            "dequantized at every run"
        )
    if form.block and form.block not in BLOCK_SIZES:
        return (
            f"its weight has a scale for every {form.block} inputs, and MatMulNBits takes blocks "
            f"of {', '.join(map(str, BLOCK_SIZES))}"
        )
    # Some releases fuse blocks that do not divide the inputs, and others do not.
    if form.block and form.inputs % form.block:
        return f"{form.unknown}: {form.block} does not divide {form.inputs}"
    return form.unknown
