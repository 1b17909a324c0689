"""Balance a block on both paths before it is quantized: a change of basis of the values of each
head (marrq/transforms/value_basis.py).

The change is chosen from full-precision tokens and full-precision weights, and folded into both
copies of the block. So every method and every scheme starts from the same weights.
"""

import torch
from torch import Tensor

from marrq.pipeline.collect import BlockPair
from marrq.pipeline.group import SAMPLE_BATCHES
from marrq.quantized_model import QuantizationSettings
from marrq.transforms.value_basis import ValuePath, balancing_basis, find_value_path, fold_basis

BALANCE_SEED = 0


def balance(pair: BlockPair, settings: QuantizationSettings) -> set[str]:
    """Fold the basis into both copies of the block, in place.

    Returns the paths of the linears that read balanced inputs: none if the method does not balance.
    """
    if pair.quantized.kind != "block" or not settings.method.balances(settings.scheme):
        return set()
    # One generator for all value paths of a block, each draws its own rotation.
    generator = torch.Generator().manual_seed(BALANCE_SEED)
    value_paths = _value_paths(pair)
    for value_path in value_paths:
        sample = _sample(pair, value_path.target)
        # The statistics will raise an error that names the linear.
        if not sample.isfinite().all():
            return set()
        # H and K of the formula: the sample's moments and Wᵀ W, both in full precision.
        weight = pair.original.linear(value_path.target).weight
        change = balancing_basis(sample, weight, value_path.width, generator)
        # W A V = (W T⁻¹) A (T V): the block's function stays, on both paths.
        fold_basis(pair.original, value_path, change)
        fold_basis(pair.quantized, value_path, change)
    return {value_path.target for value_path in value_paths}


def _value_paths(pair: BlockPair) -> list[ValuePath]:
    """Every way from the values of the block's heads to a linear that alone reads its input."""
    first = pair.inputs.first_original.to(pair.device)
    found = [
        find_value_path(pair.original, group[0], first)
        for group in pair.original.groups
        # Linears that share an input (q, k and v) read a norm and not values.
        if len(group) == 1
    ]
    return [value_path for value_path in found if value_path is not None]


def _sample(pair: BlockPair, linear: str) -> Tensor:
    """The linear's input on the full-precision path in some batches of all processes:
    [tokens, n]."""
    first, in_features = pair.inputs.first_original, pair.original.linear(linear).in_features
    inputs = [x.flatten(0, -2) for _, x in pair.original_inputs(linear, SAMPLE_BATCHES)]
    # The empty tensor lets a process without a sampled batch take part in the gathering.
    empty = first.new_zeros(0, in_features, device=pair.device)
    return pair.processes.all_gather(torch.cat([empty, *inputs]))
