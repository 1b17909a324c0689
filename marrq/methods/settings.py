"""A method written as text: its name, and what differs from the defaults.

    marr-exact
    gptaq,alpha=global=0.5
    marr-gptaq,alpha=grid,feedback=calibration,rotate=0,lowrank=srr:32,pid.initial=0.5

The same settings are options of `marrq quantize`; `marrq compare` takes the text.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, cast, get_args

from marrq.errors import MarrqError
from marrq.methods.lowrank import parse_lowrank
from marrq.methods.solve import PATHS, method_named
from marrq.methods.spec import PID, AlphaSpec, AlphaStrategy, Balance, Clip, Feedback, MethodSpec

SWITCH = {"on": True, "off": False}


def parse_method(text: str) -> MethodSpec:
    """`NAME[,KEY=VALUE…]` to a MethodSpec. Raises MarrqError naming the unknown name, key or
    value."""
    name, *settings = text.split(",")
    pairs = [setting.partition("=") for setting in settings]
    return with_settings(name, {key: value for key, _, value in pairs})


def with_settings(name: str, settings: dict[str, str]) -> MethodSpec:
    """The method of that name with settings as text."""
    spec = MethodSpec(method_named(name))
    for key, value in settings.items():
        if key.startswith("pid."):
            spec = _with_gain(spec, key.removeprefix("pid."), value)
        elif key in SETTINGS:
            spec = SETTINGS[key](spec, value)
        else:
            raise MarrqError(
                f"unknown setting {key!r} of a method: choose one of "
                f"{', '.join((*SETTINGS, 'pid.GAIN'))}"
            )
    return _checked(spec)


def text_of(spec: MethodSpec) -> str:
    """The text that `parse_method` reads back: only what differs from the defaults."""
    default = _told(MethodSpec())
    return ",".join(
        [
            spec.name,
            *(f"{key}={value}" for key, value in _told(spec).items() if value != default[key]),
        ]
    )


def _told(spec: MethodSpec) -> dict[str, str]:
    """All settings as text."""
    alpha = spec.alpha
    return {
        "alpha": alpha.strategy if alpha.value is None else f"global={_digits(alpha.value)}",
        "feedback": alpha.feedback,
        "damping": _digits(spec.damping),
        "target-damping": _digits(spec.target_damping),
        "act-order": _on_or_off(spec.act_order),
        "clip": spec.clip,
        "bias-correction": _on_or_off(spec.correct_bias),
        "lowrank": str(spec.lowrank),
        "rotate": str(spec.rotation),
        "equalize": _on_or_off(spec.equalize),
        "balance": spec.balance,
        **{f"pid.{gain}": _digits(value) for gain, value in vars(alpha.pid).items()},
    }


def _digits(value: float) -> str:
    """As short as it can be read back."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _on_or_off(value: bool) -> str:
    return "on" if value else "off"


def _checked(spec: MethodSpec) -> MethodSpec:
    """What a method would not use is refused, not ignored: a search belongs to the marr methods, a
    value of α to all that have one."""
    is_constant = spec.name in PATHS and spec.alpha.value is not None
    if not spec.name.startswith("marr-") and spec.alpha != AlphaSpec() and not is_constant:
        raise MarrqError(
            f"method {spec.name!r} searches no alpha: choose "
            f"marr-{spec.name if spec.name in PATHS else 'stream'}"
        )
    return spec


def _alpha(spec: MethodSpec, text: str) -> MethodSpec:
    strategy, _, value = text.partition("=")
    number = _number("alpha", value) if value else None
    return replace(
        spec, alpha=replace(spec.alpha, strategy=cast(AlphaStrategy, strategy), value=number)
    )


def _feedback(spec: MethodSpec, text: str) -> MethodSpec:
    return replace(spec, alpha=replace(spec.alpha, feedback=cast(Feedback, text)))


def _with_gain(spec: MethodSpec, gain: str, text: str) -> MethodSpec:
    types = {field.name: int if field.name == "steps" else float for field in fields(PID)}
    if gain not in types:
        raise MarrqError(f"unknown setting of the PID {gain!r}: choose one of {', '.join(types)}")
    return replace(
        spec,
        alpha=replace(
            spec.alpha, pid=replace(spec.alpha.pid, **{gain: _number(gain, text, types[gain])})
        ),
    )


def _number(key: str, text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise MarrqError(f"setting {key!r} must be a number: got {text!r}") from error


def _switch(key: str, text: str) -> bool:
    if text not in SWITCH:
        raise MarrqError(f"setting {key!r} must be on or off: got {text!r}")
    return SWITCH[text]


def _clip(text: str) -> Clip:
    if text not in get_args(Clip):
        raise MarrqError(f"setting 'clip' must be one of {', '.join(get_args(Clip))}: got {text!r}")
    return cast(Clip, text)


def _balance(text: str) -> Balance:
    if text not in get_args(Balance):
        raise MarrqError(
            f"setting 'balance' must be one of {', '.join(get_args(Balance))}: got {text!r}"
        )
    return cast(Balance, text)


SETTINGS: dict[str, Callable[[MethodSpec, str], MethodSpec]] = {
    "alpha": _alpha,
    "feedback": _feedback,
    "damping": lambda spec, text: replace(spec, damping=_number("damping", text)),
    "target-damping": lambda spec, text: replace(
        spec, target_damping=_number("target-damping", text)
    ),
    "bias-correction": lambda spec, text: replace(
        spec, correct_bias=_switch("bias-correction", text)
    ),
    "equalize": lambda spec, text: replace(spec, equalize=_switch("equalize", text)),
    "balance": lambda spec, text: replace(spec, balance=_balance(text)),
    "act-order": lambda spec, text: replace(spec, act_order=_switch("act-order", text)),
    "clip": lambda spec, text: replace(spec, clip=_clip(text)),
    "lowrank": lambda spec, text: replace(spec, lowrank=parse_lowrank(text)),
    "rotate": lambda spec, text: replace(spec, rotation=_number("rotate", text, int)),
}
"""What can be set, by key."""
