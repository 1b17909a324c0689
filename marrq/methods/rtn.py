"""Round to nearest: each weight goes to the nearest value of its row's grid. The baseline that uses no data."""

from torch import Tensor

from marrq.affine import search_weight_grid
from marrq.methods.problem import MethodSpec, Problem, Solution


def rtn(weight: Tensor, problem: Problem, spec: MethodSpec) -> Solution:
    """Codes on the clip-searched grid that all methods share; the statistics serve the report alone."""
    grid = search_weight_grid(weight, problem.code_range)
    return problem.solution(weight, grid, grid.quantize(weight))
