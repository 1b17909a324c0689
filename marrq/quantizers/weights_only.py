"""A quantized model whose activations are not quantized: W4A8 becomes W4A16.

What the weights need stays: the smoothing of an input, because the codes are those of the smoothed
channels; rotations and other changes of basis, which are in the weights; low-rank branches; and the
bias. A bias that was corrected for the mean error of the outputs (marrq/methods/statistics.py)
keeps the small part of that error which came from rounded activations: no artifact says how large
that part is.
"""

import copy
from dataclasses import replace

from marrq.quantized_model import QuantizedModel
from marrq.quantizers.activations import ActivationQuantizer, Smoothing
from marrq.quantizers.linear import quantized_linears


def weights_only(model: QuantizedModel) -> QuantizedModel:
    """A copy of the model with float activations. The scheme of the copy says so."""
    module = copy.deepcopy(model.module)
    for linear in quantized_linears(module).values():
        if isinstance(linear.input, ActivationQuantizer):
            smoothing = linear.input.smoothing
            linear.input = None if smoothing is None else Smoothing(smoothing)
    return replace(model, module=module, scheme=replace(model.scheme, activation=None))
