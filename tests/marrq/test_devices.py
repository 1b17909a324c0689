"""Everything stays on the device that it is asked to be on, shown without one.

Under FakeTensorMode tensors have a device and no values. An operation on tensors of two devices
raises as it would on a GPU, and so does whatever needs a value: on a GPU it would wait for the
device. Where the code has to wait, `Answers` gives it a value."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import quantized, swin, vit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from marrq.artifact.tensors import tensors_of
from marrq.methods.factor import Factor
from marrq.methods.gptq import sweep
from marrq.methods.problem import Problem
from marrq.methods.registry import METHODS
from marrq.methods.solve import solve
from marrq.methods.spec import parse_method
from marrq.methods.statistics import ResidualStatistics
from marrq.models.blocks import Block
from marrq.models.residual_writers import ResidualWriter, find_residual_writer
from marrq.quantizers.affine import Grid
from marrq.quantizers.linear import quantized_linears
from marrq.schemes import WeightSpec

OUTPUTS, INPUTS = 4, 8
CUDA = torch.device("cuda")
CANDIDATES = {
    name: import_module(f"marrq.{name.rpartition('.')[0]}").__dict__[name.rpartition(".")[2]]
    for name in (
        "quantizers.affine.WEIGHT_CLIP_FACTORS",
        "quantizers.activations.ACTIVATION_CLIP_FACTORS",
        "methods.gptq.OUTPUT_CLIP_FACTORS",
    )
}
"""The candidates of the searches."""
SMALL = {"embed_dim": 16, "num_heads": 2, "depth": 2, "patch_size": 16}


class Answers(TorchDispatchMode):
    """Answers every question for a value: yes, but no where two tensors might be equal to the last
    bit; the number given, 0 for the exit status of a factorization, 1 for an index."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.allclose.default:
            return True
        if func is torch.ops.aten.equal.default:
            return False
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return self.number if kind.is_floating_point else kind in (torch.bool, torch.int64)
        return func(*args, **(kwargs or {}))


class Counts(Answers):
    """Counts operators, and what makes the host wait for the device: questions for a value, and
    copies between host and device that are not told to go on by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.questions = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views launch nothing, and a FakeTensor asks for its device by an operator.
        self.operators += not func.is_view and func is not torch.ops.prim.device.default
        self.questions += func is torch.ops.aten._local_scalar_dense.default
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            moves = source.device.type != result.device.type
            self.copies += moves and not (kwargs or {}).get("non_blocking", False)
        return result


def copied(module: nn.Module) -> nn.Module:
    """copy.deepcopy, which cannot copy fake tensors by itself."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): moved(tensor, torch.clone) for tensor in tensors})


def converted(module: nn.Module, change: Any) -> nn.Module:
    """nn.Module._apply, which cannot swap fake tensors."""
    for child in module.children():
        converted(child, change)
    for tensors in (module._parameters, module._buffers):
        tensors.update(
            {name: moved(tensor, change) for name, tensor in tensors.items() if tensor is not None}
        )
    return module


def moved(tensor: Tensor, change: Any) -> Tensor:
    result = change(tensor.detach())
    return (
        nn.Parameter(result, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result
    )


def known_writer(block: Block, linear: str, tokens: Tensor) -> ResidualWriter | None:
    """What `find_residual_writer` finds, with the decision, for which it needs values, made by
    name."""
    writer = find_residual_writer(block, linear, tokens)
    return writer if linear in ("attn.proj", "mlp.fc2") else None


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation without values takes as long as one on many: searches are kept short."""
    for name in CANDIDATES:
        monkeypatch.setattr(f"marrq.{name}", (1.0, 0.9))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, a kernel and pinned memory would be asked for, and neither takes a tensor
    without values."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@contextmanager
def without_values(
    monkeypatch: pytest.MonkeyPatch, number: float = 1.0, answers: Answers | None = None
) -> Iterator[None]:
    for file in ("models.blocks", "quantized_model"):
        monkeypatch.setattr(f"marrq.{file}.copy", SimpleNamespace(deepcopy=copied))
    monkeypatch.setattr("marrq.pipeline.group.find_residual_writer", known_writer)
    monkeypatch.setattr("marrq.pipeline.token_weights.find_residual_writer", known_writer)
    # Autograd starts a thread on the device: every gradient is told as soon as it is asked for.
    monkeypatch.setattr(Tensor, "register_hook", lambda y, take: take(torch.empty_like(y)))
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: None)
    monkeypatch.setattr(nn.Module, "_apply", converted)
    with FakeTensorMode(), answers or Answers(number):
        yield


def grid(groups: int) -> Grid:
    return Grid(
        torch.rand(OUTPUTS, groups, device=CUDA), torch.zeros(OUTPUTS, groups, device=CUDA), -4, 3
    )


def test_two_devices_in_one_operation_and_a_question_for_a_value_are_noticed():
    with FakeTensorMode():
        x = torch.randn(4, device=CUDA)
        # torch 2.11 says "two devices" in other words: the error counts, not its message.
        with pytest.raises(RuntimeError):
            x + torch.randn(4)
        (x + x).add_(1)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("terms", [0, 1, 2])
def test_the_sweep_runs_on_the_device_and_never_waits_for_it(terms: int, groups: int):
    with FakeTensorMode():
        weight, upper = (
            torch.randn(OUTPUTS, INPUTS, device=CUDA),
            torch.randn(INPUTS, INPUTS, dtype=torch.float64, device=CUDA),
        )
        factor = Factor(torch.arange(INPUTS, device=CUDA), upper, 0.01)
        for alpha in (0.5, torch.rand(OUTPUTS, device=CUDA)):
            codes = sweep(weight, grid(groups), factor, (upper,) * terms, alpha, block_size=3)
            assert (codes.device.type, codes.shape, codes.dtype) == (
                "cuda",
                weight.shape,
                weight.dtype,
            )


@pytest.mark.parametrize("of_outputs", [False, True])
def test_summing_statistics_never_waits_for_the_device(of_outputs: bool):
    with FakeTensorMode():
        sums = ResidualStatistics.zeros(
            INPUTS, CUDA, torch.rand(OUTPUTS, device=CUDA) if of_outputs else None
        )
        sums.add(
            torch.randn(10, INPUTS, device=CUDA),
            torch.randn(10, OUTPUTS if of_outputs else INPUTS, device=CUDA),
        )
        centred = (sums + sums).centre_()
        weight = torch.randn(OUTPUTS, INPUTS, device=CUDA)
        tensors = (
            centred.hessian,
            *vars(centred.drift).values(),
            centred.output_shift(weight, weight),
        )
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, marks=[pytest.mark.slow] if settings else [])
        for name, method in METHODS.items()
        for settings in (
            "",
            ",lowrank=srr:2",
            ",lowrank=lqer:2:int8,bias-correction=off",
            *([",clip=weights,act-order=off"] if method.sweeps else []),
        )
    ],
)
def test_a_method_leaves_everything_on_the_device(name: str, settings: str):
    spec = parse_method(name + settings + (",pid.steps=2" if name.startswith("marr") else ""))
    with FakeTensorMode(), Answers():
        halves = [ResidualStatistics.zeros(INPUTS, CUDA) for _ in range(2)]
        for sums in halves:
            sums.add(torch.randn(10, INPUTS, device=CUDA), torch.randn(10, INPUTS, device=CUDA))
        solution = solve(
            torch.randn(OUTPUTS, INPUTS, device=CUDA),
            Problem.of((halves[0], halves[1]), WeightSpec(3, 4), spec),
            spec,
        )
        rounding, branch = solution.rounding, solution.lowrank
        tensors = [
            rounding.codes,
            rounding.grid.scale,
            rounding.grid.zero_point,
            rounding.quantized,
        ]
        tensors += [] if solution.bias_shift is None else [solution.bias_shift]
        tensors += [] if branch is None else [branch.left.codes, branch.right.codes, branch.product]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("stream", "per-tensor"),
        *(
            pytest.param(method, strategy, marks=pytest.mark.slow)
            for method, strategy in (
                ("stream", "per-token"),
                ("marr-rescomp,pid.steps=2", "per-tensor"),
                ("marr-rescomp,pid.steps=2", "per-token"),
                ("exact,lowrank=srr:2", "per-tensor"),
                ("exact,lowrank=srr:2", "per-token"),
                # Every number that is asked is 0 here, the sum of weights too.
                ("gptq,rotate=0,token-weights=off", "per-tensor"),
                ("gptq,rotate=0,token-weights=off", "per-token"),
            )
        ),
    ],
)
def test_a_model_is_quantized_on_the_device(
    monkeypatch: pytest.MonkeyPatch, method: str, strategy: str
):
    with without_values(monkeypatch, number=0.0 if "rotate" in method else 1.0):
        model = quantized(
            vit(**SMALL, init_values=1e-5),
            torch.randn(4, 3, 32, 32),
            "W4A8-g8",
            method,
            "cuda",
            strategy,
        )
        tensors = model.module.state_dict().values()
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert len(quantized_linears(model.module)) == len(model.reports) == 8
        assert model.module(torch.randn(2, 3, 32, 32, device=CUDA)).device.type == "cuda"
        assert {tensor.device.type for tensor in tensors_of(model.module).values()} == {"cpu"}
        # What an export is made of; the model that the user has stays where it is.
        copied = model.on_cpu().module.state_dict().values()
        assert {tensor.device.type for tensor in copied} == {"cpu"}
        assert {tensor.device.type for tensor in tensors} == {"cuda"}


@pytest.mark.slow
def test_a_model_with_windows_is_quantized_on_the_device(monkeypatch: pytest.MonkeyPatch):
    with without_values(monkeypatch):
        model = quantized(swin(), torch.randn(2, 3, 32, 32), "W4A8", "rtn", "cuda")
        assert {tensor.device.type for tensor in model.module.state_dict().values()} == {"cuda"}


def counted(monkeypatch: pytest.MonkeyPatch, depth: int, method: str) -> Counts:
    """What a model with so many blocks takes, on a GPU, with all candidates of the searches. The
    sweep's kernel, one launch for each block of columns, does nothing here."""
    for name, factors in CANDIDATES.items():
        monkeypatch.setattr(f"marrq.{name}", factors)
    monkeypatch.setattr("marrq.methods.gptq.block_rounding", lambda w: lambda block: None)
    counts = Counts()
    with without_values(monkeypatch, answers=counts):
        model = vit(**{**SMALL, "depth": depth}, init_values=1e-5)
        quantized(model, torch.randn(4, 3, 32, 32), "W4A8", method, "cuda")
    return counts


@pytest.mark.parametrize(
    ("method", "operators", "questions"), [("rtn", 3000, 50), ("marr,pid.steps=2", 6500, 220)]
)
def test_a_block_takes_a_bounded_number_of_launches_and_waits(
    monkeypatch: pytest.MonkeyPatch, method: str, operators: int, questions: int
):
    """A search that tries one candidate at a time takes 80 times a dozen launches for each weight,
    and then the GPU waits for Python."""
    one, two = (counted(monkeypatch, depth, method) for depth in (1, 2))
    assert two.operators - one.operators <= operators
    assert two.questions - one.questions <= questions
    # Trial forwards take their random numbers and their tokens from the host.
    assert two.copies - one.copies <= 30
