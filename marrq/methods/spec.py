"""What the user chooses about the method: its name, its settings, and both written as text.

    marr-exact
    gptaq,alpha=global=0.5
    marr-gptaq,alpha=grid,feedback=calibration,lowrank=srr:32,rotate=0,pid.initial=0.5

A setting is a field of MethodSpec, AlphaSpec or PID. The field carries its key, its meaning and the
form of its values (methods/setting.py); reading, writing, the list of known settings and the table
of the README all come from there. Nothing here imports torch, so that the command line knows the
settings before it loads a model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from marrq.errors import MarrqError, choices
from marrq.methods.alpha_spec import PID, AlphaSpec
from marrq.methods.lowrank_spec import BRANCH, LowRankSpec
from marrq.methods.refinement_spec import RefinementSpec
from marrq.methods.registry import METHODS, Wants, method_named
from marrq.methods.setting import (
    NOT_NEGATIVE,
    ON_OFF,
    SEED,
    Setting,
    changed,
    check_settings,
    choice,
    none_or,
    setting,
    settings_of,
)
from marrq.schemes import Scheme

Clip = Literal["weights", "outputs"]
Balance = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class MethodSpec:
    """The method and its settings. name: one of METHODS (methods/registry.py)."""

    name: str = "marr-stream"
    # Two dampings: the sweep needs H to be invertible, no more. The target's solve is a ridge
    # regression from few tokens, and wants to be regularized.
    damping: float = field(
        default=0.01,
        metadata=setting(
            "damping", "λ / mean(diag H) of the Hessian that the sweep factors", NOT_NEGATIVE
        ),
    )
    target_damping: float = field(
        default=0.1,
        metadata=setting(
            "target-damping", "λ / mean(diag H) of the solve for the exact target", NOT_NEGATIVE
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
    # What an error costs the model differs from token to token: a class token is worth many others.
    token_weights: bool = field(
        default=True,
        metadata=setting(
            "token-weights", "weigh tokens by what their errors cost the model's outputs", ON_OFF
        ),
    )
    # Free of charge at run time: it changes the values of a bias, or adds a bias.
    correct_bias: bool = field(
        default=True,
        metadata=setting(
            "bias-correction", "the bias takes up the mean error of the outputs", ON_OFF
        ),
    )
    lowrank: LowRankSpec | None = field(
        default=None,
        metadata=setting(
            "lowrank",
            "a low-rank branch in floating point, or a second code for the weights of salient "
            "columns (serq)",
            none_or(BRANCH),
        ),
    )
    # The last three change the model before its weights are quantized (marrq/transforms).
    rotation: int | None = field(
        default=None,
        metadata=setting("rotate", "rotate the residual stream; seed of the draw", none_or(SEED)),
    )
    equalize: bool = field(
        default=True,
        metadata=setting(
            "equalize", "move per-channel scales from the input of a linear to its weight", ON_OFF
        ),
    )
    balance: Balance = field(
        default="auto",
        metadata=setting(
            "balance",
            "balance the values of each head by a change of basis; auto: if activations have 4 "
            "bits or fewer",
            choice(Balance),
        ),
    )

    # After the last block, and apart from it: no code depends on it (marrq/refinement).
    refinement: RefinementSpec = field(default_factory=RefinementSpec)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def unrefined(self) -> "MethodSpec":
        """The same method without the refinement: it finds the same codes."""
        return replace(self, refinement=RefinementSpec())

    @property
    def wants(self) -> Wants:
        """The statistics that the method works from."""
        return METHODS[self.name].wants

    def balances(self, scheme: Scheme) -> bool:
        """Whether the values of the heads are balanced (marrq/transforms/value_basis.py).

        `auto` says yes if activations are coarse. If the weights alone are coarse, balancing costs
        accuracy: a sweep that compensates makes more of inputs that are correlated."""
        return scheme.has_coarse_activations if self.balance == "auto" else self.balance == "on"


METHOD_SETTINGS: dict[str, Setting] = {
    **settings_of(AlphaSpec, ("alpha",)),
    **settings_of(MethodSpec),
    **settings_of(PID, ("alpha", "pid"), "pid."),
    **settings_of(RefinementSpec, ("refinement",)),
}
"""Every setting by key, in the order in which a text has them."""

DEFAULTS: dict[str, str] = {key: one.write(MethodSpec()) for key, one in METHOD_SETTINGS.items()}
"""The default of every setting as text."""


BOUNDS = {"pid.lower", "pid.upper"}
USED_BY = {
    "grid": {"alpha", "feedback", *BOUNDS},
    "closed": {"alpha", "feedback", *BOUNDS},
    "global": {"alpha"},
}
"""The settings about α that a strategy uses, if it does not use all. The bounds are those of α in
closed form, at which a grid of values is fitted too."""

SWEEP_SETTINGS = {"damping", "act-order", "clip"}
"""The settings of the column sweep, which a method without one does not use."""


def parse_method(text: str) -> MethodSpec:
    """`NAME[,KEY=VALUE…]` to a MethodSpec. Raises MarrqError that names the unknown name, key or
    value."""
    name, *pairs = text.split(",")
    return with_settings(name, read_pairs(pairs))


def read_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Texts KEY=VALUE to a dictionary. Raises MarrqError for a text without a value."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not value:
            raise MarrqError(f"setting {text!r} has no value: write KEY=VALUE")
        if key in pairs:
            raise MarrqError(
                f"{key}={pairs[key]} and {key}={value} are both given: leave one of them out"
            )
        pairs[key] = value
    return pairs


def read_settings(named: Mapping[str, str | None], texts: Iterable[str]) -> dict[str, str]:
    """Settings that have an option of their own, by key, and texts KEY=VALUE of `--set`. Raises
    MarrqError for a text without a value, and for a setting that is given twice.

    named: None for an option that was not given."""
    pairs = read_pairs(texts)
    given = {key: value for key, value in named.items() if value is not None}
    # Neither wins: nobody can know which of the two was meant.
    for key in given:
        if key in pairs:
            raise MarrqError(
                f"--{key} and --set {key}={pairs[key]} are both given: leave one of them out"
            )
    return {**given, **pairs}


def with_settings(name: str, settings: Mapping[str, str]) -> MethodSpec:
    """The method of that name with settings as text. Raises MarrqError for an unknown name, an
    unknown key, a wrong value, and for a setting that the method would not use."""
    # `marr,alpha=grid` is a method's text to `marrq compare`, but no name.
    if "," in name:
        raise MarrqError(
            f"unknown method {name!r}: give the name alone; settings go in --alpha or --set"
        )
    spec = MethodSpec(method_named(name))
    changes: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, text in settings.items():
        if key not in METHOD_SETTINGS:
            raise MarrqError(
                f"unknown setting {key!r} of a method: {choices(key, METHOD_SETTINGS)}"
            )
        one = METHOD_SETTINGS[key]
        changes.setdefault(one.owner, {}).update(one.read(text))
    # The fields of one object change together: pid.initial=2 is valid beside pid.upper=3 only.
    for owner, values in changes.items():
        spec = changed(spec, owner, values)
    _check_alpha(spec, [key for key in settings if METHOD_SETTINGS[key].owner[:1] == ("alpha",)])
    _check_sweep(spec, settings)
    spec.refinement.check_used(settings)
    return spec


def _check_sweep(spec: MethodSpec, given: Iterable[str]) -> None:
    """Raise MarrqError for a choice about the sweep or its target that the method would not use.

    given: the keys that the user wrote"""
    info, unused = METHODS[spec.name], set()
    if not info.sweeps:
        unused |= SWEEP_SETTINGS
    # A branch beside a method with an α is fitted to the exact target (methods/solve.py).
    has_branch = spec.lowrank is not None and spec.lowrank.is_branch
    if not info.solves and not (info.has_alpha and has_branch):
        unused.add("target-damping")
    for key in given:
        if key in unused:
            raise MarrqError(
                f"method {spec.name!r} has no use for {key}: leave it out, or choose the method "
                "marr"
            )


def _check_alpha(spec: MethodSpec, given: list[str]) -> None:
    """Raise MarrqError for a choice about α that the method would not use.

    given: the keys about α that the user wrote; a value that is the default was chosen too"""
    info = METHODS[spec.name]
    if info.searches_alpha:
        used = USED_BY.get(spec.alpha.strategy)
        unused = [key for key in given if used is not None and key not in used]
        if unused:
            raise MarrqError(
                f"alpha={spec.alpha.strategy} has no use for {unused[0]}: leave it out, or choose "
                "alpha=pid"
            )
        return
    if not given:
        return
    if not info.has_alpha:
        raise MarrqError(
            f"method {spec.name!r} has no α: leave out alpha, feedback and pid, or choose the "
            "method marr"
        )
    # Every method with an α takes a fixed value; a search belongs to the marr methods.
    if spec.alpha.value is None or given != ["alpha"]:
        raise MarrqError(
            f"method {spec.name!r} searches no α: choose marr-{spec.name}, or a fixed α by "
            "alpha=global=0.5 without feedback and pid"
        )


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
