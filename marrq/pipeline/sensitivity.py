"""Measure what each group of linears costs at each width, in one pass over the blocks.

For every group the statistics are collected twice, once with the weights for each of two uses, and
serve all widths: every width is one more sweep on them. The first half of the calibration images
sweeps, the second half judges the codes, which it has not seen:

    Q_b   = the sweep of GPTQ at b bits, on H of the first half
    J_b   = ‖Q_b X - W X̃‖²                                     on the second half, N images
    cost  = ½ ē J_b / (m N)                                     nats an image, for each linear

e is the Fisher energy of the linear's output, E ‖∂(v·z)/∂y‖² at a token; its mean over tokens is ē,
and J is a sum over tokens that are weighed by e / ē, of the sums of e over the linears of the group
(in the sweep the weights are clamped). For an error dy of no preferred direction among m outputs,
½ E ⟨g, dy⟩² = ½ e ‖dy‖² / m: the divergence that it adds in second order
(marrq/pipeline/token_weights.py). The mean error does not count: the bias takes it up. A block that
is balanced has its energies after that, since another basis of the values has other gradients.

**Which inputs.** Both paths are the full-precision path, but a linear's input is rounded as its
activations will be: this rounding does not depend on the widths, and codes are fitted to it. What
earlier linears lose is left out, since it depends on the very widths that are chosen. So costs are
those of one group rounded alone, and they are taken to add [ours; HAWQ, arXiv 1911.03852, adds
traces of Hessians times square errors of weights in the same way].

**What is not searched.** No α, no low-rank branch: both act alike on all widths. Equalization is
chosen at REFERENCE_BITS; its scales are folded into a copy of the block, one for each group.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from marrq.errors import MarrqError
from marrq.methods.gptq import choose_grid, sweep
from marrq.methods.problem import Problem
from marrq.methods.spec import MethodSpec, text_of
from marrq.models.blocks import Block
from marrq.models.load import VisionModel
from marrq.models.named_outputs import OutputKind, as_tuple, kinds_of_change
from marrq.pipeline.balance import balance
from marrq.pipeline.block_inputs import BlockInputs, cut, share_of
from marrq.pipeline.collect import BlockPair, Images, TokenSource
from marrq.pipeline.group import GroupCalibration
from marrq.pipeline.quantize import RunOptions, chain_of, check_groups
from marrq.pipeline.token_weights import WEIGHT_UNIT, fisher_energies, weights_of
from marrq.quantized_model import CalibrationRecord, QuantizationSettings
from marrq.quantizers.linear import SCALE_BITS
from marrq.quantizers.packing import packed_size
from marrq.schemes import WEIGHT_BITS, Scheme
from marrq.sensitivity import GroupSensitivity, Sensitivity, Width
from marrq.transforms.equalization import find_norm

REFERENCE_BITS = 4
"""Equalization weighs rounded weights against rounded activations; it is chosen for this width."""

UNITS: dict[OutputKind, str] = {
    "classes": "nats",
    "features": "1 - cosine",
    "dense": "half the relative square error",
}
"""What is expected of an output, by its kind (marrq/pipeline/token_weights.py)."""


@dataclass(frozen=True)
class SensitivitySettings:
    """What the figures depend on beside the model and the images. scheme: a mixed one."""

    scheme: Scheme
    method: MethodSpec
    calibration: CalibrationRecord

    @property
    def uniform(self) -> QuantizationSettings:
        """The settings of the pass: all linears have REFERENCE_BITS, and GPTQ sweeps. What the pass
        has no use for is at its default."""
        # A search of α and a branch would serve one width, and the pass has them all.
        plain = MethodSpec("gptq")
        method = replace(
            self.method,
            name=plain.name,
            alpha=plain.alpha,
            target_damping=plain.target_damping,
            token_weights=plain.token_weights,
            lowrank=None,
            refinement=plain.refinement,
        )
        scheme = self.scheme.of_width(REFERENCE_BITS)
        return QuantizationSettings(scheme, method, self.calibration)

    def about(self, model: VisionModel) -> dict[str, Any]:
        """The figures' origin, as plain values."""
        origin = {
            "model": model.source.name,
            "weights_sha256": model.source.weights_sha256,
            "scheme": self.scheme.description,
            "method": text_of(self.uniform.method),
            "outputs": list(model.outputs),
            "preprocessing": asdict(model.preprocessing),
            "calibration": asdict(self.calibration),
        }
        # Through JSON, which has lists in place of tuples, so that it can be compared with a file.
        return cast(dict[str, Any], json.loads(json.dumps(origin)))


@torch.no_grad()
def measure_sensitivity(
    model: VisionModel,
    images: Images,
    settings: SensitivitySettings,
    run: RunOptions,
    check: Callable[[Sensitivity], object] = lambda sizes: None,
) -> Sensitivity:
    """The cost and the size of each group at each width. `model` itself is changed: its weights are
    rotated and balanced if the method says so, its function stays.

    images: as in `quantize`. check: called before anything is measured, with the least sizes and no
        costs; it raises an error if they are too large. Every process of a run calls this together,
        and has the same result.
    Raises MarrqError as `quantize`, if a linear's tokens cannot be told from those of other images,
    and if the outputs of the model have no gradient.
    """
    uniform, module = settings.uniform, model.module.to(run.device)
    about = settings.about(model) | {"unit": _unit(model, images[:1].to(run.device))}
    chain = chain_of(module, images[:2].to(run.device), uniform)
    check_groups(chain, uniform.scheme)
    # First and last layers have 8 bits in every plan.
    blocks = [block for block in chain if block.kind == "block"]
    outer = [block for block in chain if block.kind != "block"]
    batches = cut(len(images), uniform.calibration.batch_size)
    own = share_of(batches, run.processes)
    source = TokenSource(module, images, run.device, own, run.store)
    sizes = _Sizes(uniform, run)
    rest = (*sizes.of_outer(outer), sizes.outside(module, chain))
    least = tuple(sizes.least(block, group) for block in blocks for group in block.groups)
    check(Sensitivity(about, least, *rest))
    energies = fisher_energies(source, blocks, model, run.processes, at_stream=False)
    _check_energies(energies, blocks)
    groups: list[GroupSensitivity] = []
    tokens = source.entering(blocks[0])
    for index, block in enumerate(blocks):
        inputs = BlockInputs.of(batches, tokens, tokens, run.processes)
        pair = BlockPair(block, block.copied(), inputs, run.device, run.processes)
        balanced = balance(pair, uniform)
        # In another basis of the values an error has another gradient.
        if balanced:
            energies |= fisher_energies(source, [block], model, run.processes, at_stream=False)
        for group in block.groups:
            # Scales of one group must not reach the input of the next: each has a copy.
            alone = replace(pair, quantized=pair.original.copied())
            # An error of the input reaches all linears of the group: their energies add.
            of_each = [energies[block.path_of(name)] for name in group]
            of_group = torch.stack(of_each).sum(0).cpu()
            measured = _Group(
                GroupCalibration(alone, group, uniform.scheme, uniform.method), of_group
            )
            groups.append(measured.sensitivity(energies, sizes, group[0] in balanced))
        run.block_done(index + 1, len(blocks), ())
        if index + 1 < len(blocks):
            tokens = source.after(block, None, blocks[index + 1], tokens)
    return Sensitivity(about, tuple(groups), *rest)


@dataclass(frozen=True)
class _Group:
    """The linears of a group on the full-precision block.

    calibration: on a copy of the block, which the group has for itself.
    energies: of the tokens of its input, the sum over its linears."""

    calibration: GroupCalibration
    energies: Tensor

    def sensitivity(
        self, energies: Mapping[str, Tensor], sizes: "_Sizes", balanced: bool
    ) -> GroupSensitivity:
        """Cost and size at each width.

        energies: by the path of a linear in the model.
        balanced: whether the group's input is in a balanced basis already."""
        calibration, problem = self.calibration, self._problem(balanced)
        block = calibration.pair.quantized
        linears = {block.path_of(name): block.linear(name) for name in calibration.linears}
        smoothed = not balanced and self._may_be_smoothed
        widths = []
        for num_bits in WEIGHT_BITS:
            scheme = calibration.scheme.of_width(num_bits)
            problem = replace(problem, weight_spec=scheme.weight)
            # KL of an image: ½ ē J / (m N), with J over the images that judge.
            divergence = sum(
                float(energies[path].mean())
                * self._error(linear.weight, problem)
                / (2 * linear.out_features * self._judging)
                for path, linear in linears.items()
            )
            stored = sum(sizes.of(linear, scheme, smoothed) for linear in linears.values())
            widths.append(Width(num_bits, stored, divergence))
        count = sum(linear.weight.numel() for linear in linears.values())
        return GroupSensitivity(tuple(linears), count, tuple(widths))

    def _problem(self, balanced: bool) -> Problem:
        """The statistics of the group, with one factorization for all widths and linears. The first
        half is weighed to be swept, the second half to judge."""
        calibration = self.calibration
        scale = calibration.method.equalize and not balanced
        scales = calibration.channel_scales() if scale else None
        quantizer = calibration.input_quantizer(scales)
        # A sweep needs many tokens, so no token is given up (weights_of). A judge inverts nothing:
        # it weighs an error by what it costs, and a token that costs nothing by 0.
        sweeping, judging = (
            replace(calibration, weights=weights).statistics(scales, quantizer)[half]
            for half, weights in enumerate((weights_of(self.energies), _relative(self.energies)))
        )
        return Problem.of(
            (sweeping, judging),
            calibration.scheme.weight,
            calibration.method,
            calibration.pair.processes,
        )

    @property
    def _may_be_smoothed(self) -> bool:
        """Whether the input may be multiplied by factors at run time, which are stored. It is known
        only when a width is chosen, so the factors count as soon as they are possible."""
        calibration = self.calibration
        if not (calibration.method.equalize and calibration.scheme.has_coarse_activations):
            return False
        block, first = calibration.pair.quantized, calibration.pair.first_quantized[:1]
        return find_norm(block, calibration.linears, first) is None

    @property
    def _judging(self) -> int:
        """The images of the half that judges."""
        return sum(len(batch) for batch in self.calibration.pair.inputs.batches if batch.half == 1)

    def _error(self, weight: Tensor, problem: Problem) -> float:
        """J on the second half, of the codes that the first half gives. weight: [m, n]."""
        # Each process sweeps its rows; J is summed over the rows of all.
        rows = problem.processes.rows(len(weight))
        part = problem.of_rows(rows, len(weight))
        sweeping, judging = part.halves
        # A grid of 8 bits is hardly clipped: the quick search will do.
        is_coarse = problem.weight_spec.num_bits < WEIGHT_BITS[-1]
        data = replace(sweeping, clip=self.calibration.method.clip if is_coarse else "weights")
        grid = choose_grid(weight[rows], data, problem.weight_spec)
        codes = sweep(weight[rows], grid, data.factors.factor)
        error, _ = part.loss(judging, weight[rows])(grid.values(codes))
        return error


def _unit(model: VisionModel, image: Tensor) -> str:
    """What the costs are measured in. image: [1, channels, height, width]."""
    kinds = kinds_of_change(as_tuple(model.module(image)), model.outputs, model.labels)
    # The costs of several outputs are added.
    return " + ".join(UNITS[kind] for kind in dict.fromkeys(kinds))


def _relative(energies: Tensor) -> Tensor:
    """The weights e / ē of the tokens of an image. As multiples of WEIGHT_UNIT they have exact
    sums."""
    mean = energies.mean()
    # A linear on which no output depends costs nothing, however its tokens are weighed.
    relative = torch.where(mean > 0, energies / mean, 1.0)
    return (relative / WEIGHT_UNIT).round() * WEIGHT_UNIT


def _check_energies(energies: Mapping[str, Tensor], blocks: Iterable[Block]) -> None:
    """Raise MarrqError if a linear has no energies, by which its errors could be judged."""
    paths = (block.path_of(name) for block in blocks for group in block.groups for name in group)
    missing = next((path for path in paths if path not in energies), None)
    if missing is not None:
        raise MarrqError(
            f"no budget can be found, since the tokens of linear {missing} do not lie image by "
            "image, or no output depends on them: give a scheme such as W4A8"
        )


@dataclass(frozen=True)
class _Sizes:
    """What is stored, in bits, before anything is quantized."""

    settings: QuantizationSettings
    run: RunOptions

    def of(self, linear: nn.Linear, scheme: Scheme, smoothed: bool) -> int:
        """The weight of a linear as QuantLinear.stored_bits counts it."""
        rows, columns = linear.out_features, linear.in_features
        scales = rows * (columns // (scheme.weight.group_size or columns))
        codes = 8 * packed_size(rows * columns, scheme.weight.num_bits)
        smoothing = 32 * columns if smoothed else 0
        return codes + SCALE_BITS[scheme.weight.grid] * scales + smoothing

    def least(self, block: Block, group: Sequence[str]) -> GroupSensitivity:
        """A group without costs, and without factors that smooth its input."""
        linears = [block.linear(name) for name in group]
        widths = []
        for num_bits in WEIGHT_BITS:
            scheme = self.settings.scheme.of_width(num_bits)
            stored = sum(self.of(linear, scheme, smoothed=False) for linear in linears)
            widths.append(Width(num_bits, stored, 0.0))
        paths = tuple(map(block.path_of, group))
        return GroupSensitivity(paths, sum(one.weight.numel() for one in linears), tuple(widths))

    def of_outer(self, blocks: Iterable[Block]) -> tuple[int, int]:
        """Weights and stored bits of quantized first and last layers."""
        linears = [
            (block.linear(name), block.scheme_of(self.settings.scheme))
            for block in blocks
            for group in block.groups
            for name in group
        ]
        bits = sum(self.of(linear, scheme, False) for linear, scheme in linears)
        return sum(linear.weight.numel() for linear, _ in linears), bits

    def outside(self, module: nn.Module, chain: Iterable[Block]) -> int:
        """All tensors of the artifact but the weights of quantized linears."""
        own = {
            block.path_of(name): (block.linear(name), block.scheme_of(self.settings.scheme))
            for block in chain
            for group in block.groups
            for name in group
        }
        weights = {f"{path}.weight" for path in own}
        bits: int = sum(
            8 * tensor.numel() * tensor.element_size()
            for name, tensor in module.state_dict().items()
            if name not in weights
        )
        for linear, scheme in own.values():
            bits += 2 * 64  # the shape beside the packed codes
            if scheme.activation is not None:
                # A float32 scale and a uint8 zero point, or a float32 share to clip to.
                bits += 32 + 8 if scheme.activation.is_static else 32
            # A bias that takes up the mean error is added if there is none.
            if linear.bias is None and self.settings.method.correct_bias:
                bits += 32 * linear.out_features
        return bits
