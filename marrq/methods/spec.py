"""What the user chooses about the method: its name, its settings, and both written as text.

    marr-exact
    gptaq,alpha=global=0.5
    marr-gptaq,alpha=grid,feedback=calibration,lowrank=srr:32,rotate=0,pid.initial=0.5

A setting is a field of MethodSpec, AlphaSpec or PID. The field carries its key, its meaning and the
form of its values (methods/setting.py); reading, writing, the list of known settings and the table
of the README all come from there. Nothing here imports torch, so that the command line knows the
settings before it loads a model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from marrq.errors import MarrqError
from marrq.methods.registry import ALIASES, METHODS, Wants, method_named
from marrq.methods.setting import (
    COUNT,
    NUMBER,
    ON_OFF,
    SEED,
    Form,
    Setting,
    choice,
    none_or,
    setting,
    settings_of,
)
from marrq.schemes import Scheme

AlphaStrategy = Literal["pid", "grid", "global"]
Feedback = Literal["held-out", "calibration"]
Clip = Literal["weights", "outputs"]
Balance = Literal["auto", "on", "off"]
LowRankKind = Literal["srr", "qera", "lqer"]

LOW_RANK = re.compile(r"(\w+):(\d+)(?::(\w+))?", re.ASCII)
NUM_BITS: dict[str | None, int] = {None: 16, "fp16": 16, "int8": 8}


def parse_lowrank(text: str) -> "LowRankSpec":
    """`srr:32`, the same as `srr:32:fp16`, or `srr:32:int8` to a LowRankSpec. Raises MarrqError for
    anything else."""
    # KIND:RANK[:STORAGE]; without a storage, 16 bits.
    match = LOW_RANK.fullmatch(text)
    if not match or match[3] not in NUM_BITS:
        raise MarrqError(
            f"unknown low-rank branch {text!r}: write {{srr,qera,lqer}}:RANK[:fp16|:int8], for "
            "example srr:32"
        )
    return LowRankSpec(cast(LowRankKind, match[1]), int(match[2]), NUM_BITS[match[3]])


BRANCH = Form(
    "srr, qera or lqer, then :RANK, then :int8 if stored in 8 bits",
    lambda key, text: parse_lowrank(text),
    none_or(str),
)


@dataclass(frozen=True)
class LowRankSpec:
    """A low-rank branch L R beside the codes (methods/lowrank.py).

    kind: how L and R are found
    rank: r
    num_bits: 16 stores L and R as float16; 8 as int8, with a float32 scale for each of the r
    components of L and of R"""

    kind: LowRankKind
    rank: int
    num_bits: int = 16

    def __post_init__(self) -> None:
        if self.kind not in get_args(LowRankKind):
            raise MarrqError(
                f"a low-rank branch must be one of {', '.join(get_args(LowRankKind))}: got "
                f"{self.kind!r}"
            )
        if self.rank < 1:
            raise MarrqError(
                f"the rank of a low-rank branch must be 1 or more: got {self.rank}; leave the "
                "branch out for none"
            )
        if self.num_bits not in NUM_BITS.values():
            raise MarrqError(
                "a low-rank branch is stored with 8 (int8) or 16 (float16) bits: got "
                f"{self.num_bits}"
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.rank}" + (":int8" if self.num_bits == 8 else "")


@dataclass(frozen=True)
class PID:
    """Settings of MARR's controller; methods/marr.py has its law. The paper publishes `tolerance`
    alone."""

    # The three gains of the law, and how fast its memory fades.
    proportional: float = field(
        default=0.6, metadata=setting("proportional", "gain of the error", NUMBER)
    )
    integral: float = field(
        default=0.1, metadata=setting("integral", "gain of the sum of errors", NUMBER)
    )
    derivative: float = field(
        default=0.1, metadata=setting("derivative", "gain of the change of the error", NUMBER)
    )
    leak: float = field(
        default=0.5, metadata=setting("leak", "share of the sum that is kept at each step", NUMBER)
    )
    # α = 0 is no correction and α = 1 all of it; a search may go somewhat beyond.
    initial: float = field(default=0.25, metadata=setting("initial", "first α", NUMBER))
    lower: float = field(default=0.0, metadata=setting("lower", "least α", NUMBER))
    upper: float = field(default=1.5, metadata=setting("upper", "largest α", NUMBER))
    # Three ends of a search. A step costs a whole sweep.
    steps: int = field(default=8, metadata=setting("steps", "most steps of a search", COUNT))
    tolerance: float = field(
        default=1e-5,
        metadata=setting(
            "tolerance", "the search ends if J changes by less, as a share of the first J", NUMBER
        ),
    )
    # Rounding makes J jitter, which hides the gain of a smaller move of α.
    settled: float = field(
        default=0.02, metadata=setting("settled", "the search ends if α moves by less", NUMBER)
    )

    def __post_init__(self) -> None:
        if not self.lower <= self.initial <= self.upper or self.steps < 1:
            raise MarrqError(
                f"a PID needs lower <= initial <= upper and at least one step: got {self}"
            )


@dataclass(frozen=True)
class AlphaSpec:
    """How the residual strength α of a module is found.

    strategy: `pid` and `grid` search α for each module, `global` takes `value` for all modules
    value: None stands for the method's own constant
    grid: the values that `grid` tries"""

    # `global=0.5` is one setting in two fields: the number goes to `value`.
    strategy: AlphaStrategy = field(
        default="pid",
        metadata=setting(
            "alpha",
            "how α is found: a search by pid or grid for each module, or global=VALUE for all",
            choice(AlphaStrategy),
            argument="value",
        ),
    )
    value: float | None = None
    # J on the data that produced the codes cannot tell fit from noise; J on other data can.
    feedback: Feedback = field(
        default="held-out",
        metadata=setting(
            "feedback",
            "images that judge an α: the half that its sweep has not seen, or the images it has",
            choice(Feedback),
        ),
    )
    # 0 to 1.5, the bounds of the PID.
    grid: tuple[float, ...] = tuple(i / 8 for i in range(13))
    pid: PID = field(default_factory=PID)

    def __post_init__(self) -> None:
        # Text is checked when it is read; these catch a spec that was built in Python.
        if self.strategy not in get_args(AlphaStrategy) or self.feedback not in get_args(Feedback):
            raise MarrqError(
                "alpha is found by pid, grid or global, with feedback held-out or calibration: got "
                f"{self.strategy}, {self.feedback}"
            )
        if (self.value is not None) != (self.strategy == "global"):
            raise MarrqError(
                "a value of alpha goes with the strategy global alone, as in global=0.5: got "
                f"{self.strategy}, {self.value}"
            )


@dataclass(frozen=True)
class MethodSpec:
    """The method and its settings. name: one of METHODS (methods/registry.py)."""

    name: str = "marr-stream"
    # Two dampings: the sweep needs H to be invertible, no more. The target's solve is a ridge
    # regression from few tokens, and wants to be regularized.
    damping: float = field(
        default=0.01,
        metadata=setting(
            "damping", "λ / mean(diag H) of the Hessian that the sweep factors", NUMBER
        ),
    )
    target_damping: float = field(
        default=0.1,
        metadata=setting(
            "target-damping", "λ / mean(diag H) of the solve for the exact target", NUMBER
        ),
    )
    # What is rounded first is compensated by the most columns behind it.
    act_order: bool = field(
        default=True,
        metadata=setting(
            "act-order", "sweep columns by descending diag H, the most active inputs first", ON_OFF
        ),
    )
    clip: Clip = field(
        default="outputs",
        metadata=setting(
            "clip",
            "clip a row's grid by the error of its weights, or of its outputs after a sweep",
            choice(Clip),
        ),
    )
    alpha: AlphaSpec = field(default_factory=AlphaSpec)
    # Free of charge at run time: it changes the values of a bias, or adds a bias.
    correct_bias: bool = field(
        default=True,
        metadata=setting(
            "bias-correction", "the bias takes up the mean error of the outputs", ON_OFF
        ),
    )
    lowrank: LowRankSpec | None = field(
        default=None,
        metadata=setting("lowrank", "a low-rank branch in floating point beside the codes", BRANCH),
    )
    # The last three change the model before its weights are quantized (marrq/transforms).
    rotation: int | None = field(
        default=None,
        metadata=setting("rotate", "rotate the residual stream; seed of the draw", SEED),
    )
    equalize: bool = field(
        default=True,
        metadata=setting(
            "equalize", "move per-channel scales between a linear and the layer before it", ON_OFF
        ),
    )
    balance: Balance = field(
        default="auto",
        metadata=setting(
            "balance",
            "another basis for the values of the heads; auto: if activations have 4 bits or fewer",
            choice(Balance),
        ),
    )

    @property
    def wants(self) -> Wants:
        """The statistics that the method works from."""
        return METHODS[self.name].wants

    def balances(self, scheme: Scheme) -> bool:
        """Whether the values of the heads get another basis (marrq/transforms/value_basis.py).

        `auto` says yes if activations are coarse. If the weights alone are coarse, the basis costs
        accuracy: a sweep that compensates makes more of inputs that are correlated."""
        return scheme.has_coarse_activations if self.balance == "auto" else self.balance == "on"


METHOD_SETTINGS: dict[str, Setting] = {
    **settings_of(AlphaSpec, ("alpha",)),
    **settings_of(MethodSpec),
    **settings_of(PID, ("alpha", "pid"), "pid."),
}
"""Every setting by key, in the order in which a text has them."""

DEFAULTS: dict[str, str] = {key: one.write(MethodSpec()) for key, one in METHOD_SETTINGS.items()}
"""The default of every setting as text."""


def parse_method(text: str) -> MethodSpec:
    """`NAME[,KEY=VALUE…]` to a MethodSpec. Raises MarrqError that names the unknown name, key or
    value."""
    name, *pairs = text.split(",")
    return with_settings(name, {key: value for key, _, value in (p.partition("=") for p in pairs)})


def with_settings(name: str, settings: Mapping[str, str]) -> MethodSpec:
    """The method of that name with settings as text. Raises MarrqError for an unknown name, an
    unknown key, a wrong value, and for an α that the method would not use."""
    spec = MethodSpec(method_named(name))
    for key, value in settings.items():
        if key not in METHOD_SETTINGS:
            raise MarrqError(
                f"unknown setting {key!r} of a method: choose one of {', '.join(METHOD_SETTINGS)}"
            )
        spec = METHOD_SETTINGS[key].read(spec, value)
    info = METHODS[spec.name]
    # A search belongs to the marr methods, a value of α to all methods that have an α.
    is_constant = info.has_alpha and spec.alpha.value is not None
    if not info.searches_alpha and spec.alpha != AlphaSpec() and not is_constant:
        searching = f"marr-{spec.name}" if info.has_alpha else ALIASES["marr"]
        raise MarrqError(f"method {spec.name!r} searches no alpha: choose {searching}")
    return spec


def text_of(spec: MethodSpec) -> str:
    """The text that `parse_method` reads back: the name, and the settings that are not at their
    defaults."""
    # Compared as text: a setting is written if it would be read back as another value.
    texts = {key: one.write(spec) for key, one in METHOD_SETTINGS.items()}
    changed = [f"{key}={text}" for key, text in texts.items() if text != DEFAULTS[key]]
    return ",".join([spec.name, *changed])


def settings_table() -> str:
    """Every setting with its default, its values and its meaning, as a Markdown table."""
    rows = [
        f"| `{key}` | `{DEFAULTS[key]}` | {one.form.values} | {one.meaning} |"
        for key, one in METHOD_SETTINGS.items()
    ]
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows])
