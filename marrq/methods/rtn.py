"""Round to nearest, the baseline: each weight goes to the nearest value of its row's grid.

    code = clamp(round(w / scale) + zero_point)

No calibration data, no compensation.
"""

from torch import Tensor

from marrq.methods.problem import Problem, Rounding
from marrq.methods.spec import MethodSpec
from marrq.quantizers.affine import search_weight_grid


def rtn(weight: Tensor, problem: Problem, spec: MethodSpec) -> Rounding:
    """Codes [m, n] on the grid that is searched by the weight alone."""
    # Not by the outputs after a sweep: this method looks at no data.
    grid = search_weight_grid(weight, problem.weight_spec).with_salient(problem.whole.salient)
    return Rounding(grid.codes(weight), grid)
