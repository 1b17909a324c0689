"""The full-precision model as the teacher: what it gives for the images of the refinement, and how
far a quantized model is from it.

Its outputs are computed once, before the pipeline changes the model, and are kept: a step then
costs one forward and one backward pass of the quantized model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marrq.distributed import ONE_PROCESS, Processes
from marrq.errors import MarrqError
from marrq.models.load import VisionModel
from marrq.models.named_outputs import OutputKind, as_tuple, kinds_of_change
from marrq.pipeline.collect import Images
from marrq.quantized_model import BATCH_SIZE
from marrq.refinement.loss import distance

StepDone = Callable[[int, int, str], None]
"""Called after each step with the number of steps done, the number of all, and a note."""


def no_steps(done: int, count: int, note: str) -> None:
    """A StepDone for a caller who shows nothing."""


@dataclass(frozen=True)
class Teacher:
    """Images, and what the full-precision model gives for them.

    images: first those to learn from, then those that judge.
    files_sha256: a hash of their names.
    outputs: each output for all images, on the CPU: [images, …].
    kinds: of the outputs.
    """

    images: Images
    files_sha256: str
    outputs: Sequence[Tensor]
    kinds: Sequence[OutputKind]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: VisionModel,
        images: Images,
        files_sha256: str,
        step_done: StepDone = no_steps,
        processes: Processes = ONE_PROCESS,
    ) -> "Teacher":
        """Run the full-precision model, on the device that it is on; each process runs some of the
        batches, and all call this together.

        Raises MarrqError if the model gives NaN or infinity."""
        device, batches = next(model.module.parameters()).device, range(0, len(images), BATCH_SIZE)
        # With fewer batches than processes, every process has all: there is little to share.
        is_shared = processes.size <= len(batches)
        starts = processes.share(batches) if is_shared else batches
        parts: list[tuple[Tensor, ...]] = []
        for start in starts:
            batch = images[start : start + BATCH_SIZE].to(device)
            parts.append(tuple(output.cpu() for output in as_tuple(model.module(batch))))
            if not all(output.isfinite().all() for output in parts[-1]):
                raise MarrqError(
                    "the full-precision model gives NaN or infinity for an image that the "
                    "refinement would learn from: leave out --refine"
                )
            step_done(len(parts), len(starts), "full precision")
        # From batches of all outputs to one tensor for each output.
        shares = [torch.cat(of_one) for of_one in zip(*parts, strict=True)]
        outputs = shares
        if is_shared:
            outputs = [processes.all_gather(share.to(device)).cpu() for share in shares]
        kinds = kinds_of_change(outputs, model.outputs, model.labels)
        return cls(images, files_sha256, outputs, kinds)

    def loss(self, module: nn.Module, rows: slice, temperature: float) -> Tensor:
        """The loss of a model on some of the images: their mean, summed over the outputs, a scalar.
        temperature: see loss.py."""
        device = next(module.parameters()).device
        found = as_tuple(module(self.images[rows].to(device)))
        wanted = [output[rows].to(device) for output in self.outputs]
        each = zip(found, wanted, self.kinds, strict=True)
        return torch.stack([distance(*one, temperature) for one in each]).sum()
