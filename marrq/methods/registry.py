"""The methods by name: the aim of each, the statistics that it wants, and where its code is.

Nothing here imports torch, so that the command line knows the names before it loads a model. So the
registry names the code of a method by text, and methods/solve.py imports it. To add a method, write
its file and add a line here.
"""

from dataclasses import dataclass, replace
from typing import Literal

from marrq.errors import MarrqError, choices

Wants = Literal["input drift", "residual stream"]

INPUT_DRIFT: Wants = "input drift"
"""Sums of dx = x̃ - x: how far the quantized inputs are from the full-precision inputs. All
methods need them: J, which judges and reports a linear, is the distance to the full-precision
output."""
RESIDUAL_STREAM: Wants = "residual stream"
"""For linears that write to the residual stream, sums of the shortfall e of that stream
(methods/exact.py); for all others the input drift."""


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without its code.

    code: FILE.NAME in this folder, a function or, for a method with α, a ResidualTarget
    aim: the output or the weight that the codes aim at, for people
    paper: its number on arXiv, or "" for our own
    wants: the statistics that the pipeline has to collect
    sweeps: whether it rounds column by column and compensates (methods/gptq.py)
    solves: whether its target is the solution of a regression (methods/exact.py)
    has_alpha: whether a residual strength α multiplies its correction
    searches_alpha: whether it finds an α for each linear"""

    code: str
    aim: str
    paper: str = ""
    wants: Wants = INPUT_DRIFT
    sweeps: bool = True
    solves: bool = False
    has_alpha: bool = False
    searches_alpha: bool = False


RESIDUAL_METHODS: dict[str, MethodInfo] = {
    "gptaq": MethodInfo(
        "gptaq.GptaqTarget",
        "the full-precision output, by a residual term in the sweep; α = 0.25",
        "2504.02692",
        has_alpha=True,
    ),
    "rescomp": MethodInfo(
        "rescomp.RescompTarget",
        "as gptaq, with a second residual term; α = 0.25",
        "2604.07955",
        has_alpha=True,
    ),
    "exact": MethodInfo(
        "exact.ExactTarget",
        "the full-precision output, by the weight that comes nearest to it; α = 1",
        "2504.09629",
        solves=True,
        has_alpha=True,
    ),
    "stream": MethodInfo(
        "exact.ExactTarget",
        "as exact, but linears that write to the residual stream aim at the full-precision stream",
        wants=RESIDUAL_STREAM,
        solves=True,
        has_alpha=True,
    ),
}
"""Methods with one residual strength α for all linears. Each has a MARR method too, which searches
α for each linear."""

METHODS: dict[str, MethodInfo] = {
    "rtn": MethodInfo(
        "rtn.rtn", "nothing: each weight goes to the nearest value of its grid", sweeps=False
    ),
    "gptq": MethodInfo(
        "gptq.gptq", "the output of the original weight on the quantized inputs", "2210.17323"
    ),
    **RESIDUAL_METHODS,
    **{
        f"marr-{name}": replace(
            info,
            aim=f"as {name}, with an α for each linear (MARR)",
            paper="2605.17997",
            searches_alpha=True,
        )
        for name, info in RESIDUAL_METHODS.items()
    },
}
"""Every method by name."""

ALIASES = {"marr": "marr-stream"}
"""Short names; marr-stream is the best of the MARR methods."""


def method_named(name: str) -> str:
    """The full name of a method. Raises MarrqError with the known names for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise MarrqError(f"unknown method {name!r}: {choices(name, (*METHODS, *ALIASES))}")
    return name


def method_names_for_help() -> str:
    """Every method in one sentence, for the help of the command line."""
    # The marr methods differ by their prefix alone, so that listing them would only repeat names.
    plain = [name for name, info in METHODS.items() if not info.searches_alpha]
    aliases = " ".join(f"{alias} is {name}." for alias, name in ALIASES.items())
    return f"{', '.join(plain)}; or marr- before {', '.join(RESIDUAL_METHODS)}. {aliases}"


def methods_table() -> str:
    """Every method with its aim and its paper, as a Markdown table."""
    rows = []
    for name, info in METHODS.items():
        paper = f"[{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""
        rows.append(f"| `{name}` | {info.aim} | {paper} |")
    return "\n".join(["| method | aim | paper |", "|---|---|---|", *rows])
