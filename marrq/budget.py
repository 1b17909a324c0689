"""How large a quantized model may be: what the user says, without torch.

    --budget 3.0                    bits a weight in all, scales included, of the quantized linears
    --max-size 10MB                 bytes of all tensors of the artifact, float parts included
    --budget auto --max-drop 1.0    the smallest model that surely loses no more points of top-1

With a budget the scheme has no weight bits of its own and is written `WmixA8`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from marrq.errors import MarrqError
from marrq.methods.spec import MethodSpec
from marrq.schemes import MIXED, WEIGHT_BITS, ActivationStrategy, Scheme, parse_scheme

AUTO = "auto"
UNIFORM_SCHEME, MIXED_SCHEME = "W4A8", f"W{MIXED}A8"
"""The schemes that are taken if the user names none."""
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(kB|MB|GB)")
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Budget:
    """One of three limits.

    bits_per_weight: all that is stored for the quantized linears, over their weights.
    size_bytes: of all tensors of the artifact.
    max_drop: points of top-1, of k-NN for embeddings, that the smallest model may lose.
    sensitivity: a file of `marrq sensitivity`; None measures anew.
    """

    bits_per_weight: float | None = None
    size_bytes: int | None = None
    max_drop: float | None = None
    sensitivity: Path | None = None


def budget_of(
    budget: str | None, max_size: str | None, max_drop: float | None, sensitivity: Path | None
) -> Budget | None:
    """What the options say together; None if no budget is given. Raises MarrqError for options that
    do not go together, and for texts that are no budget and no size."""
    if budget is not None and max_size is not None:
        raise MarrqError(
            f"--budget {budget} and --max-size {max_size} are both given: leave one of them out"
        )
    if (budget == AUTO) != (max_drop is not None):
        raise MarrqError(
            "--max-drop is how much the model of --budget auto may lose: give both or neither"
        )
    if budget is None and max_size is None:
        if sensitivity is not None:
            raise MarrqError("--sensitivity serves a budget: give --budget or --max-size too")
        return None
    if max_size is not None:
        return Budget(size_bytes=_bytes_in(max_size), sensitivity=sensitivity)
    if budget == AUTO:
        # A comparison with NaN is false.
        if max_drop is None or not 0 <= max_drop <= 100:
            raise MarrqError(f"--max-drop is a number of points from 0 to 100: got {max_drop}")
        return Budget(max_drop=max_drop, sensitivity=sensitivity)
    return Budget(bits_per_weight=_bits_in(str(budget), "--budget", AUTO), sensitivity=sensitivity)


def limit_of(budget: float | str) -> Budget:
    """What the Python API is given: bits a weight such as 3.0, or a size such as "10MB". Raises
    MarrqError for anything else."""
    text = str(budget)
    if SIZE.fullmatch(text):
        return Budget(size_bytes=_bytes_in(text))
    return Budget(bits_per_weight=_bits_in(text, "budget", "a size such as 10MB"))


def _bits_in(text: str, name: str, otherwise: str) -> float:
    """name: of what the user gave; otherwise: what else it may be."""
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    # NaN and infinity are floats too. Scales are counted, so even the fewest bits take more.
    if not min(WEIGHT_BITS) < bits < 64:
        raise MarrqError(
            f"{name} must be more than {min(WEIGHT_BITS)} bits a weight, such as 3.0, or "
            f"{otherwise}: got {text!r}"
        )
    return bits


def _bytes_in(text: str) -> int:
    match = SIZE.fullmatch(text)
    if match is None:
        raise MarrqError(f"--max-size must be a size such as 10MB or 800kB: got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def default_scheme(budget: Budget | None) -> str:
    """The scheme that is taken if the user names none."""
    return UNIFORM_SCHEME if budget is None else MIXED_SCHEME


def scheme_of(text: str | None, strategy: ActivationStrategy, budget: Budget | None) -> Scheme:
    """The scheme that the user means. Raises MarrqError for an unknown one, and as `check_scheme`
    does."""
    scheme = parse_scheme(default_scheme(budget) if text is None else text, strategy)
    check_scheme(scheme, budget)
    return scheme


def check_scheme(scheme: Scheme, budget: Budget | None) -> None:
    """Raise MarrqError for a scheme that goes with a budget, or without one, alone."""
    if budget is not None and not scheme.mixed:
        mixed = re.sub(r"W\d+", f"W{MIXED}", str(scheme))
        raise MarrqError(
            f"a budget gives each linear weight bits of its own: write --scheme {mixed}, not "
            f"{scheme}"
        )
    if budget is None and scheme.mixed:
        raise MarrqError(
            f"the scheme {scheme} leaves the weight bits to a budget: give --budget or --max-size, "
            "or a scheme such as W4A8"
        )


def check_method(spec: MethodSpec, budget: Budget | None, resume: bool) -> None:
    """Raise MarrqError for what a budget cannot count or do."""
    if budget is not None and spec.lowrank is not None:
        raise MarrqError(
            f"a budget counts codes and scales, not the low-rank branch {spec.lowrank}: leave out "
            "one of the two"
        )
    if budget is not None and budget.max_drop is not None and resume:
        raise MarrqError(
            "--budget auto makes several models and keeps none of their blocks: leave out --resume"
        )


def check_costs(spec: MethodSpec) -> None:
    """Raise MarrqError for settings that the costs of linears cannot follow."""
    check_method(spec, Budget(), resume=False)
    if spec.refinement.on:
        raise MarrqError(
            "the costs of linears are those of their codes, which no refinement changes: leave out "
            "refine"
        )
