"""The loop: Adam on what learned.py lists, towards the outputs of the full-precision model.

    loss    marrq/refinement/loss.py, of batches of images that calibration has not used
    rates   those of learned.py, over 10 steps from 0 up, then along a cosine down to 0
    Adam    β₁ = 0.9, β₂ = 0.99 (arXiv 1412.6980): few steps, so that the second moment must follow

This is the only place of marrq that trains anything. Nothing but images is read, no labels.

Held-out images judge the result: their loss is taken before the first step and after the last. If
it did not fall, the model gets back the numbers that it had, and the record says so.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from marrq.errors import MarrqError
from marrq.methods.refinement_spec import RefinementSpec
from marrq.quantized_model import QuantizedModel, RefinementRecord
from marrq.quantizers.linear import quantized_linears
from marrq.refinement.learned import Learned, learn
from marrq.refinement.teacher import StepDone, Teacher, no_steps

BETAS = (0.9, 0.99)
WARM_UP_STEPS = 10
OVERFLOWS = (
    "the quantized model's own outputs overflow, so choose a scheme with more bits, or leave out "
    "--refine"
)


def refine(
    model: QuantizedModel, teacher: Teacher, step_done: StepDone = no_steps
) -> QuantizedModel:
    """Refine a quantized model in place, as its method says; return it with the record.

    teacher: its images are `images` of the RefinementSpec to learn from, then `held_out` that
        judge.

    Raises MarrqError if the loss is not finite; then the model is not to be used.
    """
    spec, module = model.method.refinement, model.module
    before = _finite(_held_out_loss(module, teacher, spec), "before its first step", OVERFLOWS)
    # Numbers that may change are kept as they are: a result that does not help is taken back.
    state = copy.deepcopy(module.state_dict())
    image = teacher.images[:1].to(next(module.parameters()).device)
    learned = learn(module, image, spec.codes)
    _train(learned, teacher, spec, model.calibration.seed, step_done)
    learned.store()
    after = _finite(_held_out_loss(module, teacher, spec), "after its last step", _slower(spec))
    moved = sum(
        int((linear.codes != state[f"{path}.codes"]).sum())
        for path, linear in quantized_linears(module).items()
    )
    record = RefinementRecord(
        spec.images, spec.held_out, teacher.files_sha256, spec.steps, before, after, moved
    )
    if not record.helped:
        module.load_state_dict(state)
    return replace(model, refinement=record)


def _train(
    learned: Learned, teacher: Teacher, spec: RefinementSpec, seed: int, step_done: StepDone
) -> None:
    """All steps. The modules of the model stay in evaluation mode: no dropout, no statistics."""
    shares = [_share_of_rate(step, spec.steps) for step in range(spec.steps)]
    # Images that are seen again bring no new evidence: e times the same noise has e times its
    # standard deviation, and √e times that of as many images.
    walk = math.hypot(*shares) * math.sqrt(spec.epochs)
    groups = learned.groups(spec.rate, walk)
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    rates = [group["lr"] for group in groups]
    for step, rows in enumerate(batches(spec, seed)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * shares[step]
        loss = teacher.loss(learned.module, rows, spec.temperature)
        # The first step's loss is that of the numbers as they were.
        advice = _slower(spec) if step else OVERFLOWS
        value = _finite(float(loss.detach()), f"at step {step + 1} of {spec.steps}", advice)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_done(step + 1, spec.steps, f"loss {value:.3f}")


def _finite(loss: float, when: str, advice: str) -> float:
    """The loss, which no record may have if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise MarrqError(f"the refinement's loss is {loss} {when}: {advice}")
    return loss


def _slower(spec: RefinementSpec) -> str:
    return f"lower refine.rate, which is {spec.rate:g}"


def batches(spec: RefinementSpec, seed: int) -> Iterator[slice]:
    """The rows of each step: every epoch has the same batches in another random order. All images
    are among them; if they do not fill the last batch, all batches are about even."""
    generator, count = torch.Generator().manual_seed(seed), spec.steps // spec.epochs
    ends = [spec.images * place // count for place in range(count + 1)]
    for _ in range(spec.epochs):
        for place in torch.randperm(count, generator=generator).tolist():
            yield slice(ends[place], ends[place + 1])


def _share_of_rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step: a linear warm-up, then half a period of a cosine."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _held_out_loss(module: nn.Module, teacher: Teacher, spec: RefinementSpec) -> float:
    """The mean loss over the images that judge."""
    count = len(teacher.images)
    total = 0.0
    for start in range(spec.images, count, spec.batch):
        rows = slice(start, min(start + spec.batch, count))
        # The loss is a mean over its images: the last batch may have fewer.
        total += float(teacher.loss(module, rows, spec.temperature)) * (rows.stop - rows.start)
    return total / (count - spec.images)
