"""Round to nearest: each weight goes to the nearest value of its row's grid. The baseline that uses
no data."""

from torch import Tensor

from marrq.methods.problem import Problem, Rounding
from marrq.methods.spec import MethodSpec
from marrq.quantizers.affine import search_weight_grid


def rtn(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """Codes on the clip-searched grid that all methods share."""
    grid = search_weight_grid(weight, problem.weights)
    return Rounding(grid.spread(weight.shape[1]).quantize(weight), grid)
