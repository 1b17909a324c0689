"""The quantization methods, one file each; `problem.py` says what a method is given and returns."""

from collections.abc import Callable

from torch import Tensor

from marrq.errors import MarrqError
from marrq.methods.gptaq import gptaq
from marrq.methods.gptq import gptq
from marrq.methods.marr import marr
from marrq.methods.problem import MethodSpec, Problem, Solution
from marrq.methods.rtn import rtn

Method = Callable[[Tensor, Problem, MethodSpec], Solution]

METHODS: dict[str, Method] = {"rtn": rtn, "gptq": gptq, "gptaq": gptaq, "marr": marr}


def method_named(name: str) -> Method:
    """The method; an unknown name raises with the known ones."""
    if name not in METHODS:
        raise MarrqError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]
